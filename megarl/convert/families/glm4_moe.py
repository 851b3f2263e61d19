"""GLM-4.5: rotary positions on half of a head, a sigmoid router with a selection bias, shared experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megarl.convert.families.parts import (
    ASKED_KV_HEADS,
    FIXED,
    MODEL,
    attention,
    first_layers_dense,
    groups,
    keys,
    layer_with_shared_experts,
    mtp_prefixes,
    read_mtp,
    shared_width,
    write_first_layers_dense,
    write_shared,
)
from megarl.convert.family import Family
from megarl.convert.hf_config import MOST, Key, checked
from megarl.models.spec import ModelSpec


def read_extra(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    normed = checked("use_qk_norm", config.get("use_qk_norm", False), bool, where)
    return {
        "qk_norm": "head" if normed else "none",
        **shared_width(config, where, 1),
        **first_layers_dense(config, where, 1),
        **groups(config, where, 1, 1),
        **read_mtp(config, where),
    }


def write_extra(spec: ModelSpec) -> dict[str, Any]:
    own = {"use_qk_norm": spec.qk_norm == "head", "num_nextn_predict_layers": spec.mtp_layers}
    routing = {"n_group": spec.router_groups, "topk_group": spec.router_top_groups}
    return own | routing | write_shared(spec) | write_first_layers_dense(spec)


GLM4_MOE = Family(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    keys=keys(
        ASKED_KV_HEADS,
        Key("num_experts", "n_routed_experts", aliases=("num_local_experts", "num_experts"), most=MOST),
        Key("top_k", "num_experts_per_tok"),
        Key("moe_intermediate_size", "moe_intermediate_size"),
        Key("norm_topk_prob", "norm_topk_prob", bool, True),
        Key("router_scaling", "routed_scaling_factor", float, 1.0),
        Key("qkv_bias", "attention_bias", bool, False),
        Key("norm_eps", "rms_norm_eps", float, 1e-5),
    ),
    fixed=FIXED | {"norm_topk_prob": (True,)},
    model=MODEL,
    same={"router_score": "sigmoid", "selection_bias": True},
    layer=lambda spec, index: layer_with_shared_experts(spec, index, attention(spec)),
    read_extra=read_extra,
    write_extra=write_extra,
    extra_keys=(
        "n_shared_experts", "first_k_dense_replace", "n_group", "topk_group", "use_qk_norm",
        "num_nextn_predict_layers", "num_mtp_layers",
    ),
    partial_rope=0.5,
    aside=mtp_prefixes,
)  # fmt: skip
