"""Generated checkpoints: the same bytes from the same settings, a tokenizer that loses nothing, loadable."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file

from megarl.config.schema import DataSource, Generate, Model, Tokenizer
from megarl.convert import read_spec
from megarl.errors import BadInput
from megarl.models.generate import SPECIAL, ensure_checkpoint, generate_checkpoint, make_tokenizer

SMALL = dict(hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, context=96)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    file = tmp_path_factory.mktemp("texts") / "sums.jsonl"
    rows = [
        {"prompt": f"State the final answer: {a} + {b} =", "response": str(a + b)} for a in range(9) for b in range(9)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSource(type="jsonl", path=str(file))


@pytest.fixture(scope="module")
def made(tmp_path_factory, texts):
    settings = Generate(**SMALL, seed=4, tokenizer=Tokenizer(vocab_size=330, train_on=[texts]))
    path = tmp_path_factory.mktemp("made") / "model"
    generate_checkpoint(path, settings)
    return path, settings


def digests(folder):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def test_same_settings_same_bytes_and_other_seed_other_weights(made, tmp_path):
    path, settings = made
    generate_checkpoint(tmp_path / "again", settings)
    assert digests(tmp_path / "again") == digests(path)
    generate_checkpoint(tmp_path / "deeper", settings.model_copy(update={"num_layers": 3}))
    generate_checkpoint(tmp_path / "other", settings.model_copy(update={"seed": 5}))
    first, deeper, other = (load_file(p / "model.safetensors") for p in (path, tmp_path / "deeper", tmp_path / "other"))
    assert all(torch.equal(deeper[name], tensor) for name, tensor in first.items())  # a tensor depends on its name only
    assert not any(torch.equal(other[name], tensor) for name, tensor in first.items() if tensor.dim() > 1)
    matrices = [tensor for tensor in first.values() if tensor.dim() > 1]
    assert len({tensor.flatten()[:8].numpy().tobytes() for tensor in matrices}) == len(matrices)


def test_transformers_loads_it_with_the_weights_asked_for(made):
    from transformers import AutoModelForCausalLM

    path, settings = made
    model, report = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and model.dtype is torch.float32
    weights = {name: p for name, p in model.named_parameters()}
    assert all(bool((p == 1).all()) for name, p in weights.items() if "norm" in name)
    matrices = torch.cat([p.flatten() for name, p in weights.items() if "norm" not in name])
    assert abs(matrices.mean()) < 2e-4 and abs(matrices.std() / settings.init_std - 1) < 0.01
    assert model.config.eos_token_id == 0 and model.generation_config.pad_token_id == 1
    spec = read_spec(path)
    assert (spec.num_experts, spec.top_k, spec.vocab_size, spec.max_position_embeddings) == (8, 2, 330, 96)


def test_tokenizer_keeps_every_text_and_every_digit_alone(made):
    from transformers import AutoTokenizer

    path, _ = made
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert len(tokenizer) == 330 and tokenizer.model_max_length == 96
    assert [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL] == [0, 1, 2, 3]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1)
    for text in ("State the final answer: 120 + 7 =", " leading", "naïve 数学 🙂\n\ttabs", "-3.1415e10", "a" * 50):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    pieces = tokenizer.tokenize("2026-11-22")
    assert pieces == list("2026-11-22")
    trained = len(tokenizer.encode("State the final answer: 1 + 2 ="))
    assert trained <= 14 < len("State the final answer: 1 + 2 =") / 2  # words were learnt from train_on


def test_chat_template_is_short_and_an_answer_continues_its_prompt(made):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(made[0])
    user = [{"role": "user", "content": "1 + 2 ="}]
    prompt = tokenizer.apply_chat_template(user, add_generation_prompt=True, tokenize=False)
    assert prompt == "1 + 2 =<|im_end|>"
    chat = [{"role": "system", "content": "Add."}, *user, {"role": "assistant", "content": "3"}, *user]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert text == "<|im_start|>Add.<|im_end|>1 + 2 =<|im_end|>3<|endoftext|>1 + 2 =<|im_end|>"
    whole = tokenizer.apply_chat_template(chat[1:3], return_dict=False)
    start = tokenizer.apply_chat_template(user, add_generation_prompt=True, return_dict=False)
    assert whole[: len(start)] == start and whole[-1] == tokenizer.eos_token_id


def test_untrained_tokenizer_has_bytes_only_and_too_small_ones_are_refused():
    tokenizer = make_tokenizer(Tokenizer(vocab_size=260), 64)
    assert len(tokenizer) == 260 and len(tokenizer.encode("abc 12")) == 6
    with pytest.raises(BadInput, match="vocab_size=259: must be at least 260"):
        make_tokenizer(Tokenizer(vocab_size=259), 64)


def test_ensure_makes_once_and_refuses_what_does_not_fit(tmp_path):
    settings = Generate(**SMALL, tokenizer=Tokenizer(vocab_size=260))
    model = Model(path=str(tmp_path / "m"), generate=settings)
    assert ensure_checkpoint(model) == model.path
    before = (tmp_path / "m" / "model.safetensors").stat().st_mtime_ns
    ensure_checkpoint(model)
    assert (tmp_path / "m" / "model.safetensors").stat().st_mtime_ns == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]
    with pytest.raises(BadInput, match=r"generate.init_std=0.5.*made with 0.02"):
        ensure_checkpoint(Model(path=model.path, generate=settings.model_copy(update={"init_std": 0.5})))
    with pytest.raises(BadInput, match="no such folder"):
        ensure_checkpoint(Model(path=str(tmp_path / "absent")))
    with pytest.raises(BadInput, match="num_experts_per_tok=9 must be at most num_experts=8"):
        ensure_checkpoint(Model(path=str(tmp_path / "n"), generate=settings.model_copy(update={"top_k": 9})))
    bad = DataSource(type="jsonl", path=str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(BadInput, match="nowhere.jsonl"):
        ensure_checkpoint(Model(path=str(tmp_path / "n"), generate=Generate(tokenizer=Tokenizer(train_on=[bad]))))
    (tmp_path / "m" / "tokenizer_config.json").unlink()
    with pytest.raises(BadInput, match="tokenizer_config.json is missing"):
        ensure_checkpoint(Model(path=model.path))
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]  # nothing half-made
