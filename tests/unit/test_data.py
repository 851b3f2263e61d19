"""Data sources, prompts and supervised rows: what is drawn, in which order, and what bad input says."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import reasoning_gym
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megarl.config.schema import DataSource, Reward
from megarl.data import PromptSource, SFTData, load_eval_prompts, load_rows, load_texts
from megarl.data.mixture import Mixture
from megarl.data.sources import SEED_STRIDE
from megarl.errors import BadInput
from megarl.rewards import required_field

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and the three special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    core = Tokenizer(models.BPE({token: index for index, token in enumerate([*special, *alphabet])}, []))
    core.add_special_tokens(special)
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<|pad|>", eos_token="<|im_end|>", chat_template=TEMPLATE
    )


def jsonl(path, rows, **fields) -> DataSource:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSource(type="jsonl", path=str(path), **fields)


def numbered(path, count: int, **fields) -> DataSource:
    return jsonl(path, [{"prompt": f"{path.stem} {i}", "answer": i, "tag": [i]} for i in range(count)], **fields)


ROWS = [{"prompt": "2+2=", "answer": "4", "level": 3}, {"prompt": "é?", "answer": "ü", "level": 1}]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hf", "hf_dict", "folder"])
def test_every_format_gives_the_same_rows(tmp_path, kind):
    path = tmp_path / kind
    match kind:
        case "jsonl":
            jsonl(path, ROWS)
        case "folder":
            path.mkdir()
            jsonl(path / "b.jsonl", ROWS[1:])
            jsonl(path / "a.jsonl", ROWS[:1])
        case "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
        case "hf":
            datasets.Dataset.from_list(ROWS).save_to_disk(path)
        case "hf_dict":
            data = datasets.Dataset.from_list(ROWS)
            datasets.DatasetDict({"train": data.select([0]), "test": data}).save_to_disk(path)
    kind = {"folder": "jsonl", "hf_dict": "hf"}.get(kind, kind)
    source = DataSource(type=kind, path=str(path), split="test")
    assert list(load_rows(source)) == ROWS
    assert list(load_texts(source)) == ["2+2=", "é?"]


def test_reasoning_gym_rows_are_its_entries():
    source = DataSource(type="reasoning_gym", task="chain_sum", size=5, seed=9, params={"max_terms": 3})
    entries = list(reasoning_gym.create_dataset("chain_sum", size=5, seed=9 * SEED_STRIDE, max_terms=3))
    rows = list(load_rows(source))
    assert [row["entry"] for row in rows] == entries
    assert [(row["prompt"], row["answer"]) for row in rows] == [(e["question"], e["answer"]) for e in entries]


def test_neighbouring_seeds_share_no_more_rows_than_chance():
    """reasoning-gym alone would repeat 499 of 500: the held-out set of seed 2 would be the training set of seed 1."""
    sources = [DataSource(type="reasoning_gym", task="chain_sum", size=500, seed=seed) for seed in (1, 2)]
    first, second = ({row["prompt"] for row in load_rows(source)} for source in sources)
    assert len(first & second) < 50


def test_texts_are_all_texts_of_a_row(tmp_path):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    source = jsonl(tmp_path / "x.jsonl", [{"messages": messages}, {"prompt": "p", "response": "r"}, {"text": "t"}])
    assert list(load_texts(source)) == ["s", "u", "p", "r", "t"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "a"}\n\n{"prompt": "b"}\n', r"x\.jsonl:2: empty line"),
        (b'{"prompt": "a"}\n{"prompt": \n', r"x\.jsonl:2: not a JSON object"),
        (b'{"prompt": "a"}\n["prompt"]\n', r"x\.jsonl:2: list instead of a JSON object"),
        (b'{"prompt": "\xff"}\n', r"x\.jsonl:1: not a JSON object"),
        (b"", r"x\.jsonl: no rows"),
    ],
)
def test_bad_line_is_named_by_file_and_number(tmp_path, content, message):
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(BadInput, match=message) as caught:
        list(load_rows(DataSource(type="jsonl", path=str(tmp_path / "x.jsonl"))))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"type": "jsonl", "path": "/no/such.jsonl"}, "/no/such.jsonl: no such file"),
        ({"type": "jsonl"}, "type jsonl has no path"),
        ({"type": "hf", "path": "/no/such"}, "/no/such: cannot be read as a data set"),
        ({"type": "reasoning_gym"}, "type reasoning_gym has no task"),
        ({"type": "reasoning_gym", "task": "chain_summ"}, r"no data set 'chain_summ'.*chain_sum"),
        ({"type": "reasoning_gym", "task": "chain_sum", "params": {"terms": 2}}, "task chain_sum: .*'terms'"),
        ({"type": "reasoning_gym", "task": "chain_sum", "params": {"min_terms": 9}}, "max_terms must be >="),
    ],
)
def test_source_that_cannot_be_read_says_what_to_set(source, message):
    with pytest.raises(BadInput, match=message):
        list(load_rows(DataSource(**source)))


def test_truncated_parquet_is_named(tmp_path):
    file = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(BadInput, match=r"x\.parquet: cannot be read as Parquet"):
        list(load_rows(DataSource(type="parquet", path=str(file))))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.floats(0.1, 10)), min_size=1, max_size=4),
    st.integers(0, 60),
    st.integers(0, 60),
)
def test_mixture_keeps_shares_goes_through_all_rows_and_continues_exactly(sources, before, after):
    sizes, weights = [size for size, _ in sources], [weight for _, weight in sources]
    mixture = Mixture(sizes, weights, seed=5)
    first = mixture.draw(before)
    resumed = Mixture(sizes, weights, seed=5)
    resumed.load_state_dict(json.loads(json.dumps(mixture.state_dict())))
    second = mixture.draw(after)
    assert second == resumed.draw(after)
    drawn = first + second
    for source, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
        rows = [row for one, row in drawn if one == source]
        assert abs(len(rows) - len(drawn) * weight / sum(weights)) <= len(sizes) - 1 + 1e-6
        for start in range(0, len(rows) - size + 1, size):
            assert sorted(rows[start : start + size]) == list(range(size))


def test_epochs_and_seeds_are_shuffled_differently():
    orders = [Mixture([50], [1], seed).draw(100) for seed in (1, 2)]
    assert orders[0] != orders[1] and orders[0][:50] != orders[0][50:]
    assert orders[0][:50] != sorted(orders[0][:50])


def test_state_of_other_data_is_refused():
    state = Mixture([3, 4], [1, 1], 0).state_dict()
    with pytest.raises(BadInput, match=r"sizes \[3, 4\], now \[3, 5\]"):
        Mixture([3, 5], [1, 1], 0).load_state_dict(state)
    with pytest.raises(BadInput, match="seed 0, now 1"):
        Mixture([3, 4], [1, 1], 1).load_state_dict(state)


def test_prompts_carry_everything_the_reward_needs(tmp_path, tokenizer):
    source = jsonl(
        tmp_path / "x.jsonl", [{"prompt": "2+2=", "answer": 4, "level": 3, "reward": "judge"}], reward="other"
    )
    prompt = PromptSource([source], tokenizer, 0, 99).next(1)[0]
    text = "<|im_start|>user\n2+2=<|im_end|>\n<|im_start|>assistant\n"
    assert (prompt.prompt_id, prompt.source, prompt.text) == ("x/0", "x", text)
    assert list(prompt.token_ids) == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert (prompt.answer, prompt.reward, prompt.metadata) == ("4", "judge", {"level": 3})
    entry = PromptSource([DataSource(type="reasoning_gym", task="gcd", size=3)], tokenizer, 0, 999).next(1)[0]
    assert reasoning_gym.get_score_answer_fn("gcd")(entry.answer, entry.metadata["entry"]) == 1


def test_prompt_ids_are_unique_and_stable(tmp_path, tokenizer):
    (tmp_path / "other").mkdir()
    sources = [numbered(tmp_path / "x.jsonl", 6), numbered(tmp_path / "other" / "x.jsonl", 4, weight=0.5)]
    data = PromptSource(sources, tokenizer, 3, 99)
    again = PromptSource(sources, tokenizer, 8, 99)
    by_id = {prompt.prompt_id: prompt for prompt in data.next(12)}
    assert set(by_id) >= {f"x/{i}" for i in range(6)} | {f"x.2/{i}" for i in range(4)}
    for prompt in again.next(6):
        if "#" not in prompt.prompt_id:
            assert by_id[prompt.prompt_id] == prompt
    small = PromptSource([numbered(tmp_path / "x.jsonl", 2)], tokenizer, 0, 99).next(5)
    assert len({prompt.prompt_id for prompt in small}) == 5
    assert Counter(prompt.prompt_id.split("#")[0] for prompt in small).total() == 5


def test_long_and_held_out_prompts_are_dropped_and_counted(tmp_path, tokenizer):
    held_out = load_eval_prompts([numbered(tmp_path / "x.jsonl", 3)], tokenizer, 99)
    assert [prompt.prompt_id for prompt in held_out] == ["eval/x/0", "eval/x/1", "eval/x/2"]
    texts = {prompt.text for prompt in held_out}
    rows = [{"prompt": f"x {i}", "answer": i, "response": str(i)} for i in range(5)]
    source = jsonl(tmp_path / "x.jsonl", [*rows, {"prompt": "x" * 90, "answer": 0, "response": "0"}])
    longest = max(len(prompt.token_ids) for prompt in held_out)
    data = PromptSource([source], tokenizer, 0, longest, exclude=texts)
    assert data.dropped == {"too_long": 1, "held_out": 3} and len(data) == 2
    assert {prompt.prompt_id for prompt in data.next(2)} == {"x/3", "x/4"}
    sft = SFTData([source], tokenizer, longest + 2, 0, exclude=texts)
    assert sft.dropped == {"too_long": 1, "held_out": 3} and len(sft) == 2
    with pytest.raises(BadInput, match=r"none of 6 prompts is left \(the shortest has \d+ tokens, the limit is 5"):
        PromptSource([source], tokenizer, 0, 5)
    with pytest.raises(BadInput, match="no row is left .* limit is 5"):
        SFTData([source], tokenizer, 5, 0)


def test_eval_prompts_are_unique_and_in_order(tmp_path, tokenizer):
    rows = [{"prompt": text, "answer": text} for text in "abacab"]
    prompts = load_eval_prompts([jsonl(tmp_path / "x.jsonl", rows)], tokenizer, 99)
    assert [prompt.answer for prompt in prompts] == ["a", "b", "c"]
    assert [prompt.prompt_id for prompt in prompts] == ["eval/x/0", "eval/x/1", "eval/x/3"]


@pytest.mark.parametrize(
    ("row", "reward", "message"),
    [
        ({"prompt": "p"}, {"type": "exact_match"}, r"x\.jsonl:2: no answer, which reward of the config needs"),
        ({"prompt": "p", "answer": "1"}, {"type": "reasoning_gym"}, r"x\.jsonl:2: no entry"),
        ({"prompt": "p", "reward": "r"}, {"type": "http"}, r"x\.jsonl:2: reward 'r' is not in reward.named"),
        ({"prompt": "p", "answer": ["1"]}, {"type": "http"}, r"x\.jsonl:2: answer is \['1'\]; set a text"),
        ({"question": "p"}, {"type": "http"}, r"x\.jsonl:2: a row needs messages, or a prompt"),
        ({"prompt": 3}, {"type": "http"}, r"x\.jsonl:2: .*got 3; set text or"),
    ],
)
def test_row_without_what_its_reward_needs_is_named(tmp_path, tokenizer, row, reward, message):
    source = jsonl(tmp_path / "x.jsonl", [{"prompt": "p", "answer": "1", "entry": {}}, row])
    with pytest.raises(BadInput, match=message):
        PromptSource([source], tokenizer, 0, 99, required_field=partial(required_field, Reward(**reward)))


def test_prompt_stream_continues_from_its_state(tmp_path, tokenizer):
    sources = [numbered(tmp_path / "a.jsonl", 7), numbered(tmp_path / "b.jsonl", 5, weight=2)]
    data = PromptSource(sources, tokenizer, 1, 99)
    data.next(9)
    resumed = PromptSource(sources, tokenizer, 1, 99)
    resumed.load_state_dict(data.state_dict())
    assert data.next(20) == resumed.next(20)
    assert data.epochs() == pytest.approx({"a": (29 // 3 + 1) / 7, "b": (29 - 29 // 3 - 1) / 5}, abs=1 / 5)


def test_sft_batches_are_the_rows_and_validation_sees_each_once(tmp_path, tokenizer):
    rows = [{"text": "ab" * (i + 1)} for i in range(7)]
    data = SFTData([jsonl(tmp_path / "x.jsonl", rows)], tokenizer, 99, seed=2)
    batch = data.next(7)
    assert batch.tokens.numel() == batch.response_mask.numel() == batch.lengths.sum()
    ends = np.cumsum(batch.lengths.tolist())
    texts = [tokenizer.decode(piece) for piece in np.split(batch.tokens.numpy(), ends[:-1])]
    assert sorted(texts, key=len) == [row["text"] + "<|im_end|>" for row in rows]
    first = set((ends - batch.lengths.numpy()).tolist())
    assert batch.response_mask.tolist() == [float(i not in first) for i in range(ends[-1])]
    state = data.state_dict()
    whole = list(data.batches(3))
    assert [len(one) for one in whole] == [3, 3, 1] and data.state_dict() == state
    assert sum(one.tokens.numel() for one in whole) == batch.tokens.numel()
    resumed = SFTData([jsonl(tmp_path / "x.jsonl", rows)], tokenizer, 99, seed=2)
    resumed.load_state_dict(state)
    assert data.next(5).tokens.tolist() == resumed.next(5).tokens.tolist()
