"""Llama 2 and 3 (dense)."""

from __future__ import annotations

from megarl.convert.families.parts import DENSE_MLP, FIXED, MODEL, attention, keys
from megarl.convert.family import Family
from megarl.convert.hf_config import Key

BIASES = (
    Key("qkv_bias", "attention_bias", bool, False),
    Key("output_bias", "attention_bias", bool, False),
)

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    keys=keys(*BIASES),
    fixed=FIXED | {"mlp_bias": (False,)},
    model=MODEL,
    layer=lambda spec, index: attention(spec) + DENSE_MLP,
)
