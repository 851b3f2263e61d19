"""Qwen3-MoE: Qwen3 whose MLP is a router and experts in all layers, or in those config.json names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megarl.convert.families.parts import ASKED_KV_HEADS, DENSE_MLP, FIXED, MODEL, NO_WINDOW, attention, keys, moe_mlp
from megarl.convert.family import Family
from megarl.convert.hf_config import MOST, Key
from megarl.errors import BadInput
from megarl.models.spec import ModelSpec

MOE_KEYS = keys(
    ASKED_KV_HEADS,
    Key("num_experts", "num_experts", aliases=("num_local_experts",), most=MOST),
    Key("top_k", "num_experts_per_tok"),
    Key("moe_intermediate_size", "moe_intermediate_size"),
    Key("norm_topk_prob", "norm_topk_prob", bool, False),
)


def read_moe_layers(config: Mapping[str, Any], where: str) -> dict[str, tuple[int, ...]]:
    """Every decoder_sparse_step-th layer is MoE, except mlp_only_layers."""
    dense, step = config.get("mlp_only_layers") or [], config.get("decoder_sparse_step", 1)
    if not isinstance(step, int) or step < 1:
        raise BadInput(f"{where}: decoder_sparse_step={step!r} must be a positive int")
    layers = range(config["num_hidden_layers"])
    if not isinstance(dense, list) or any(i not in layers for i in dense):
        raise BadInput(f"{where}: mlp_only_layers={dense!r} must list layers from 0 to {len(layers) - 1}")
    return {"moe_layers": tuple(i for i in layers if i not in dense and (i + 1) % step == 0)}


def write_moe_layers(spec: ModelSpec) -> dict[str, Any]:
    dense = [i for i in range(spec.num_layers) if i not in spec.moe_layers]
    return {"decoder_sparse_step": 1, "mlp_only_layers": dense}


QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    keys=MOE_KEYS,
    fixed=FIXED | NO_WINDOW | {"attention_bias": (False,)},
    model=MODEL,
    same={"qk_norm": "head"},
    layer=lambda spec, index: attention(spec) + (moe_mlp() if index in spec.moe_layers else DENSE_MLP),
    read_extra=read_moe_layers,
    write_extra=write_moe_layers,
    extra_keys=("decoder_sparse_step", "mlp_only_layers"),
)
