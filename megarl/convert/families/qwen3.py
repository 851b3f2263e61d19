"""Qwen3 (dense): config.json and weights, in both directions."""

from __future__ import annotations

from megarl.convert.families.parts import DENSE_MLP, FIXED, MODEL, NO_WINDOW, attention, keys
from megarl.convert.family import Family
from megarl.convert.hf_config import Key

QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    keys=keys(Key("head_dim", "head_dim", default=128)),
    fixed=FIXED | NO_WINDOW | {"attention_bias": (False,)},
    model=MODEL,
    same={"qk_norm": "head"},
    layer=lambda spec, index: attention(spec) + DENSE_MLP,
)
