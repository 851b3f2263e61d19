"""DeepSeek-V2 and V3: latent attention, shared experts, group-limited routing, first layers dense."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megarl.convert.families.parts import (
    FIXED,
    MODEL,
    first_layers_dense,
    groups,
    keys,
    layer_with_shared_experts,
    mtp_prefixes,
    plain,
    read_mtp,
    shared_width,
    write_first_layers_dense,
    write_shared,
)
from megarl.convert.family import Family
from megarl.convert.hf_config import MOST, Key, checked
from megarl.convert.rules import Rule
from megarl.errors import BadInput
from megarl.models.spec import ModelSpec

KEYS = tuple(
    key
    for key in keys(
        Key("kv_lora_rank", "kv_lora_rank", default=512),
        Key("nope_head_dim", "qk_nope_head_dim", default=128),
        Key("rope_head_dim", "qk_rope_head_dim", default=64),
        Key("v_head_dim", "v_head_dim", default=128),
        Key("num_experts", "n_routed_experts", aliases=("num_local_experts", "num_experts"), most=MOST),
        Key("top_k", "num_experts_per_tok"),
        Key("moe_intermediate_size", "moe_intermediate_size"),
        Key("router_scaling", "routed_scaling_factor", float, 1.0),
    )
    if key.field != "head_dim"
)


def attention(spec: ModelSpec) -> tuple[Rule, ...]:
    """Norms and latent attention of one layer. A query or key is its unrotated and its rotated part, head by head."""
    prefix = "self_attention.linear_"
    if spec.q_lora_rank:
        queries = (
            plain(f"{prefix}q_down_proj.weight", "self_attn.q_a_proj.weight", "AH"),
            plain("self_attention.q_layernorm.weight", "self_attn.q_a_layernorm.weight", "A"),
            plain(f"{prefix}q_up_proj.weight", "self_attn.q_b_proj.weight", "QA", split=0),
        )
    else:
        queries = (plain(f"{prefix}q_proj.weight", "self_attn.q_proj.weight", "QH", split=0),)
    return (
        plain("input_layernorm.weight", "input_layernorm.weight", "H"),
        *queries,
        plain(f"{prefix}kv_down_proj.weight", "self_attn.kv_a_proj_with_mqa.weight", "BH"),
        plain("self_attention.kv_layernorm.weight", "self_attn.kv_a_layernorm.weight", "C"),
        plain(f"{prefix}kv_up_proj.weight", "self_attn.kv_b_proj.weight", "XC", split=0),
        plain(f"{prefix}proj.weight", "self_attn.o_proj.weight", "HY", split=1),
        plain("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", "H"),
    )


def read_latent(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Widths that no single key holds; a q_lora_rank of null means queries straight from the hidden state."""
    heads, kv_heads = config["num_attention_heads"], config.get("num_key_value_heads")
    if kv_heads not in (None, heads):
        raise BadInput(
            f"{where}: num_key_value_heads={kv_heads} must be num_attention_heads={heads} in latent attention"
        )
    rank = config.get("q_lora_rank", 1536)
    widths = (config.get("qk_nope_head_dim", 128), config.get("qk_rope_head_dim", 64))
    return {
        "q_lora_rank": 0 if rank is None else checked("q_lora_rank", rank, int, where),
        "head_dim": sum(checked("qk_nope_head_dim + qk_rope_head_dim", width, int, where) for width in widths),
    }


def layer(spec: ModelSpec, index: int) -> tuple[Rule, ...]:
    return layer_with_shared_experts(spec, index, attention(spec))


def write_latent(spec: ModelSpec) -> dict[str, Any]:
    own = {"q_lora_rank": spec.q_lora_rank or None, "head_dim": spec.rope_head_dim}
    return own | write_shared(spec) | write_first_layers_dense(spec)


# what transformers and the published files say besides: sums of other keys, options of training
EXTRA = ("q_lora_rank", "head_dim", "qk_head_dim", "n_shared_experts", "first_k_dense_replace", "n_group", "topk_group")
COMMON = FIXED | {"attention_bias": (False,), "moe_layer_freq": (1,)}


def read_v3(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    return {
        **read_latent(config, where),
        **shared_width(config, where, 1),
        **first_layers_dense(config, where, 3),
        **groups(config, where, 8, 4),
        **read_mtp(config, where),
    }


DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    keys=(
        *(key for key in KEYS if key.field != "router_scaling"),
        Key("router_scaling", "routed_scaling_factor", float, 2.5),
        Key("norm_topk_prob", "norm_topk_prob", bool, True),
    ),
    fixed=COMMON | {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",), "norm_topk_prob": (True,)},
    model=MODEL,
    same={"router_score": "sigmoid", "selection_bias": True, "group_score": "top2"},
    layer=layer,
    read_extra=read_v3,
    write_extra=lambda spec: (
        write_latent(spec)
        | {
            "n_group": spec.router_groups,
            "topk_group": spec.router_top_groups,
            "num_nextn_predict_layers": spec.mtp_layers,
            "rope_interleave": spec.rope.interleaved,
        }
    ),
    extra_keys=(*EXTRA, "num_nextn_predict_layers", "num_mtp_layers", "rope_interleave"),
    interleaved_rope=lambda config: config.get("rope_interleave", True) is not False,
    aside=mtp_prefixes,
)


def read_v2(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """With `topk_method: greedy` the groups of config.json do not count."""
    grouped = config.get("topk_method", "greedy") == "group_limited_greedy"
    return {
        **read_latent(config, where),
        **shared_width(config, where, 2),
        **first_layers_dense(config, where, 0),
        **(groups(config, where, None, None) if grouped else {}),
    }


DEEPSEEK_V2 = Family(
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    keys=KEYS,
    # the gate values stay as they are, whatever norm_topk_prob says: transformers does not look at it
    fixed=COMMON | {"scoring_func": ("softmax",), "mlp_bias": (False,), "norm_topk_prob": (False,)},
    model=MODEL,
    same={"norm_topk_prob": False, "group_score": "max"},
    layer=layer,
    read_extra=read_v2,
    write_extra=lambda spec: (
        write_latent(spec)
        | {
            "n_group": spec.router_groups,
            "topk_group": spec.router_top_groups,
            "topk_method": "group_limited_greedy" if spec.router_groups > 1 else "greedy",
        }
    ),
    extra_keys=(*EXTRA, "topk_method"),
    interleaved_rope=lambda config: True,
)
