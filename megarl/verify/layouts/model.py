"""A small model of the same kind as the user's, in which every degree divides and every weight tells itself apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from megarl.config.schema import Config
from megarl.convert import family, read_spec
from megarl.convert.hf_io import write_json
from megarl.convert.writer import ShardedWriter
from megarl.models.generate import random_weights, spec_of
from megarl.models.spec import ModelSpec

LAYERS = 4
WINDOW = 6  # shorter than most sequences of the step
VOCAB = 299  # odd, so that tp pads it
STD, NORM_STD = 0.1, 0.2  # with all norms at 1 a swapped norm would go unseen


def shrunken(cfg: Config) -> ModelSpec:
    """`shrink` of the config's model, which may not be there yet."""
    path = Path(cfg.model.path)
    return shrink(read_spec(path) if (path / "config.json").exists() else spec_of(cfg.model.generate))


def shrink(spec: ModelSpec) -> ModelSpec:
    """The architecture with few layers and small widths.

    Kept: the family, dense among MoE layers, grouped key/value heads, tied embeddings, norms, rotary positions, which
    layers have a sliding window (of at most `WINDOW`), how many experts a token has (at most 4) and whether their gates
    are renormalised.
    """
    moe = tuple(layer for layer in range(LAYERS) if layer in spec.moe_layers)
    if spec.is_moe and len(spec.moe_layers) < spec.num_layers and len(moe) in (0, LAYERS):
        moe = tuple(range(1, LAYERS))  # some layers are dense, but beyond those kept
    top_k, latent, grouped = min(spec.top_k, 4), bool(spec.kv_lora_rank), spec.num_heads > spec.num_kv_heads
    return replace(
        spec,
        rope=replace(spec.rope, width=spec.rope.width * 16 // spec.head_dim if not spec.kv_lora_rank else 8),
        num_layers=LAYERS,
        hidden_size=64,
        num_heads=8 if grouped else 4,
        num_kv_heads=max(n for n in (1, 2, 4) if n <= spec.num_kv_heads) if grouped else 4,
        head_dim=16 if not latent else 24,
        q_lora_rank=20 if spec.q_lora_rank else 0,
        kv_lora_rank=12 if latent else 0,
        nope_head_dim=16 if latent else 0,
        rope_head_dim=8 if latent else 0,
        v_head_dim=12 if latent else 0,
        shared_width=32 if spec.shared_width else 0,
        router_groups=4 if spec.router_groups > 1 else 1,
        router_top_groups=max(2, -(-top_k // 2)) if spec.router_groups > 1 else 1,
        mtp_layers=0,
        intermediate_size=96,
        vocab_size=VOCAB,
        max_position_embeddings=128,
        num_experts=8 if spec.is_moe else 0,
        top_k=top_k,
        moe_intermediate_size=32 if spec.is_moe else 0,
        moe_layers=moe,
        windows=tuple(min(spec.windows[i % spec.num_layers], WINDOW) for i in range(LAYERS if spec.windows else 0)),
    )


def write_checkpoint(folder: Path, spec: ModelSpec, seed: int) -> None:
    """config.json and random weights, norms around 1; the same seed gives the same bytes."""
    folder.mkdir(parents=True)
    table = family(spec.family)
    write_json(folder / "config.json", table.write_config(spec))
    writer = ShardedWriter(folder, {name: (torch.float32, size) for name, size in table.hf_shapes(spec).items()})
    for name, tensor in random_weights(spec, seed, STD, NORM_STD):
        writer.add(name, tensor)
    writer.close()
