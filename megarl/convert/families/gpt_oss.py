"""gpt-oss: attention sinks, every other layer with a sliding window, biases everywhere, experts in one tensor a matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megarl.convert.families.parts import ASKED_KV_HEADS, FIXED, MODEL, all_moe, attention, keys
from megarl.convert.family import Family
from megarl.convert.hf_config import MOST, Key
from megarl.convert.rules import plain, stacked_experts
from megarl.errors import BadInput

SPARSE_MLP = (
    plain("mlp.router.weight", "mlp.router.weight", "EH"),
    plain("mlp.router.bias", "mlp.router.bias", "E"),
    # [E, 2, M, H] here
    stacked_experts("mlp.experts.weight1", "mlp.experts.gate_up_proj", "EHU", order=(0, 3, 2, 1)),
    stacked_experts("mlp.experts.bias1", "mlp.experts.gate_up_proj_bias", "EU", order=(0, 2, 1)),
    stacked_experts("mlp.experts.weight2", "mlp.experts.down_proj", "EMH", order=(0, 2, 1)),
    stacked_experts("mlp.experts.bias2", "mlp.experts.down_proj_bias", "EH", order=(0, 1)),
)

YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def read_extra(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Every layer is MoE. The published files repeat the context before stretching under a name of their own."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    context = rope.get("original_max_position_embeddings")
    said = config.get("initial_context_length", context)
    if context is not None and said != context:
        raise BadInput(
            f"{where}: initial_context_length={said!r} and original_max_position_embeddings={context!r} contradict each "
            "other; keep one of them"
        )
    return all_moe(config)


GPT_OSS = Family(
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    keys=keys(
        ASKED_KV_HEADS,
        Key("head_dim", "head_dim", default=64),
        Key("moe_intermediate_size", "intermediate_size"),
        Key("num_experts", "num_local_experts", default=128, aliases=("num_experts",), most=MOST),
        Key("top_k", "num_experts_per_tok", default=4, aliases=("experts_per_token",)),
        Key("norm_eps", "rms_norm_eps", float, 1e-5),
        Key("qkv_bias", "attention_bias", bool, True),
        Key("output_bias", "attention_bias", bool, True),
    ),
    fixed=FIXED | {"swiglu_alpha": (1.702,), "swiglu_limit": (7.0,)},
    model=MODEL,
    same={
        "norm_topk_prob": True,
        "sinks": True,
        "router_bias": True,
        "expert_bias": True,
        "activation": "clamped_swiglu",
    },
    rope_theta=150_000.0,
    rope_scaling=YARN,
    window=128,
    layer=lambda spec, index: attention(spec) + SPARSE_MLP,
    read_extra=read_extra,
    extra_keys=("initial_context_length",),
)
