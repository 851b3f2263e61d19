"""Qwen2 and Qwen2.5 (dense), and Qwen2-MoE with its gated shared expert."""

from __future__ import annotations

from megarl.convert.families.parts import (
    DENSE_MLP,
    FIXED,
    MODEL,
    NO_WINDOW,
    attention,
    keys,
    moe_mlp,
    plain,
    shared_experts,
)
from megarl.convert.families.qwen3_moe import MOE_KEYS, read_moe_layers, write_moe_layers
from megarl.convert.family import Family
from megarl.convert.hf_config import Key

QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    keys=keys(),
    fixed=FIXED | NO_WINDOW | {"use_mrope": (False,)},
    model=MODEL,
    same={"qkv_bias": True},
    layer=lambda spec, index: attention(spec) + DENSE_MLP,
)

SPARSE_MLP = (
    *moe_mlp(),
    *shared_experts("mlp.shared_expert"),
    plain("mlp.shared_experts.gate_weight", "mlp.shared_expert_gate.weight", "1H"),
)

QWEN2_MOE = Family(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    keys=(
        *MOE_KEYS,
        Key("shared_width", "shared_expert_intermediate_size"),
        Key("qkv_bias", "qkv_bias", bool, True),
    ),
    fixed=FIXED | NO_WINDOW | {"use_mrope": (False,)},
    model=MODEL,
    same={"shared_gate": True},
    layer=lambda spec, index: attention(spec) + (SPARSE_MLP if index in spec.moe_layers else DENSE_MLP),
    read_extra=read_moe_layers,
    write_extra=write_moe_layers,
    extra_keys=("decoder_sparse_step", "mlp_only_layers"),
)
