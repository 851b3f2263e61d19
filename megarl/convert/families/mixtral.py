"""Mixtral: every layer MoE, the gates of the chosen experts add up to 1."""

from __future__ import annotations

from megarl.convert.families.parts import ASKED_KV_HEADS, FIXED, MODEL, all_moe, attention, keys, moe_mlp
from megarl.convert.family import Family
from megarl.convert.hf_config import MOST, Key

SPARSE_MLP = moe_mlp("block_sparse_moe.gate.weight", "block_sparse_moe.experts.{e}.", "w1 w3 w2")

MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    keys=keys(
        ASKED_KV_HEADS,
        Key("moe_intermediate_size", "intermediate_size"),
        Key("num_experts", "num_local_experts", default=8, aliases=("num_experts",), most=MOST),
        Key("top_k", "num_experts_per_tok", default=2),
        Key("norm_eps", "rms_norm_eps", float, 1e-5),
    ),
    fixed=FIXED | {"sliding_window": (None,)},
    model=MODEL,
    same={"norm_topk_prob": True},
    rope_theta=1e6,
    layer=lambda spec, index: attention(spec) + SPARSE_MLP,
    read_extra=lambda config, where: all_moe(config),
)
