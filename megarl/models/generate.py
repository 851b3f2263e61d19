"""Small random checkpoints in Hugging Face format, made from a seed: weights, tokenizer, chat template."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megarl import convert
from megarl.config.schema import Generate, Model, Tokenizer
from megarl.convert.hf_io import PROVENANCE, new_folder, read_json, write_json
from megarl.convert.writer import ShardedWriter
from megarl.errors import BadInput
from megarl.models.spec import ModelSpec, Rope

END, PAD, START_TURN, END_TURN = SPECIAL = ("<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>")
BYTES = 256

# Two special tokens a turn at most, so that a prompt costs little more than its text: a user turn is its content and
# <|im_end|>, after which the answer begins; an answer ends with the end token.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}{{ message['content'] + eos_token }}"
    "{%- elif message['role'] == 'system' -%}{{ '<|im_start|>' + message['content'] + '<|im_end|>' }}"
    "{%- else -%}{{ message['content'] + '<|im_end|>' }}"
    "{%- endif -%}{%- endfor -%}"
)


def ensure_checkpoint(model: Model) -> str:
    """`model.path` once a complete checkpoint is there: checked if it exists, made if `model.generate` says how.

    Call it on one process; the others wait at a barrier. Raises BadInput when the folder is damaged, is missing without
    `generate`, or was generated from other settings than the config's.
    """
    path = Path(model.path)
    if not path.exists():
        if model.generate is None:
            raise BadInput(f"model.path={model.path}: no such folder; download the checkpoint or add model.generate")
        generate_checkpoint(path, model.generate)
    convert.validate_folder(path)
    if model.generate is not None and (path / PROVENANCE).exists():
        made = Generate().model_dump(mode="json") | read_json(path / PROVENANCE, f"delete {path} to make it again")
        wanted = model.generate.model_dump(mode="json")
        for key in wanted:
            if made.get(key) != wanted[key]:
                raise BadInput(
                    f"model.generate.{key}={wanted[key]!r}: {path} was made with {made.get(key)!r}; "
                    "delete that folder or change model.path"
                )
    return str(path)


def generate_checkpoint(path: str | Path, gen: Generate) -> None:
    """Writes a checkpoint folder (config.json, model.safetensors, tokenizer), whole or not at all.

    The same settings give the same bytes. Raises BadInput when the shape or the vocabulary is impossible or the place
    cannot be written.
    """
    spec = spec_of(gen)
    family = convert.family(spec.family)
    with new_folder(path) as folder:
        make_tokenizer(gen.tokenizer, gen.context).save_pretrained(folder)
        config = family.write_config(spec) | {
            "dtype": "float32",
            "bos_token_id": None,
            "eos_token_id": SPECIAL.index(END),
            "pad_token_id": SPECIAL.index(PAD),
            "initializer_range": gen.init_std,
        }
        family.read_config(config, "model.generate")
        write_json(folder / "config.json", config)
        tokens = {key: config[key] for key in ("eos_token_id", "pad_token_id")}
        write_json(folder / "generation_config.json", {"do_sample": True, **tokens})
        writer = ShardedWriter(folder, {name: (torch.float32, size) for name, size in family.hf_shapes(spec).items()})
        for name, tensor in random_weights(spec, gen.seed, gen.init_std):
            writer.add(name, tensor)
        writer.close()
        write_json(folder / PROVENANCE, gen.model_dump(mode="json"))


def spec_of(gen: Generate) -> ModelSpec:
    """The architecture that `model.generate` describes."""
    moe: dict[str, Any] = {}
    if gen.family == "qwen3_moe":
        moe = {
            "num_experts": gen.num_experts,
            "top_k": gen.top_k,
            "moe_intermediate_size": gen.moe_intermediate_size,
            "moe_layers": tuple(range(gen.num_layers)),
        }
    return ModelSpec(
        family=gen.family,
        num_layers=gen.num_layers,
        hidden_size=gen.hidden_size,
        num_heads=gen.num_heads,
        num_kv_heads=gen.num_kv_heads,
        head_dim=gen.head_dim,
        intermediate_size=gen.intermediate_size,
        vocab_size=gen.tokenizer.vocab_size,
        max_position_embeddings=gen.context,
        rope=Rope(gen.rope_theta, gen.head_dim),
        norm_eps=1e-6,
        tie_embeddings=gen.tie_embeddings,
        qk_norm="head",
        **moe,
    )


def random_weights(spec: ModelSpec, seed: int, std: float, norm_std: float = 0.0) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, float32 tensor): norms 1 (+- `norm_std`), the rest +- `std`, each from its own generator.

    A tensor depends on the seed, its name and its shape only, so adding a layer leaves the others as they were.
    """
    for name, size in convert.family(spec.family).hf_shapes(spec).items():
        is_norm = name.endswith("norm.weight")
        if is_norm and not norm_std:
            yield name, torch.ones(size)
            continue
        mean, spread = (1.0, norm_std) if is_norm else (0.0, std)
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        yield name, torch.empty(size).normal_(mean, spread, generator=generator)


def make_tokenizer(settings: Tokenizer, context: int):
    """A byte-level BPE tokenizer with `vocab_size` entries in which every digit stands alone.

    Ids 0..3 are the special tokens; entries that training leaves free are filled with reserved ones, so that the
    vocabulary does not depend on the texts. Returns a `PreTrainedTokenizerFast`. Raises BadInput for a vocabulary that
    cannot hold the special tokens and the 256 bytes.
    """
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Core
    from transformers import PreTrainedTokenizerFast

    smallest = len(SPECIAL) + BYTES
    if settings.vocab_size < smallest:
        raise BadInput(f"model.generate.tokenizer.vocab_size={settings.vocab_size}: must be at least {smallest}")
    core = Core(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(_texts(settings), trainer)
    free = settings.vocab_size - core.get_vocab_size()
    core.add_special_tokens([AddedToken(f"<|reserved_{i}|>", special=True) for i in range(free)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END,
        pad_token=PAD,
        model_max_length=context,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _texts(settings: Tokenizer) -> Iterable[str]:
    if not settings.train_on:
        return
    from megarl.data.sources import load_texts

    for source in settings.train_on:
        yield from load_texts(source)
