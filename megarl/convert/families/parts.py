"""What the tables of several families have in common: the rules of a layer's parts, as transformers names them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megarl.convert.hf_config import MOST, Key, checked
from megarl.convert.rules import Rule, experts, gate_up, plain, qkv, vocab
from megarl.errors import BadInput
from megarl.models.spec import ModelSpec


def own_head_dim(config: Mapping[str, Any]) -> int:
    return config["hidden_size"] // config["num_attention_heads"]


KEYS = (
    Key("num_layers", "num_hidden_layers", most=MOST),
    Key("hidden_size", "hidden_size"),
    Key("num_heads", "num_attention_heads"),
    Key("num_kv_heads", "num_key_value_heads", default=lambda config: config["num_attention_heads"]),
    Key("head_dim", "head_dim", default=own_head_dim),
    Key("intermediate_size", "intermediate_size"),
    Key("vocab_size", "vocab_size"),
    Key("max_position_embeddings", "max_position_embeddings"),
    Key("norm_eps", "rms_norm_eps", float, 1e-6),
    Key("tie_embeddings", "tie_word_embeddings", bool, False),
)

# where transformers' class has a number of its own that no config.json leaves out knowingly
ASKED_KV_HEADS = Key("num_kv_heads", "num_key_value_heads")


def keys(*changed: Key) -> tuple[Key, ...]:
    """`KEYS` with those of the same field replaced, and the new ones behind."""
    fields = {key.field for key in changed}
    return tuple(key for key in KEYS if key.field not in fields) + changed


# The learner computes with these values only; the first one is what an export writes.
FIXED = {"hidden_act": ("silu",), "attention_dropout": (0.0,)}
NO_WINDOW = {"use_sliding_window": (False,)}

MODEL = (
    vocab("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
    plain("decoder.final_layernorm.weight", "model.norm.weight", "H"),
    vocab("output_layer.weight", "lm_head.weight"),
)


def attention(spec: ModelSpec) -> tuple[Rule, ...]:
    """Norms and grouped-query attention of one layer."""
    q, k, v = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    rules = [
        plain("input_layernorm.weight", "input_layernorm.weight", "H"),
        qkv("self_attention.linear_qkv.weight", f"{q}.weight", f"{k}.weight", f"{v}.weight"),
        plain("self_attention.linear_proj.weight", "self_attn.o_proj.weight", "HQ", split=1),
        plain("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", "H"),
    ]
    if spec.qkv_bias:
        rules.append(qkv("self_attention.linear_qkv.bias", f"{q}.bias", f"{k}.bias", f"{v}.bias", ("Q", "K", "K")))
    if spec.output_bias:
        rules.append(plain("self_attention.linear_proj.bias", "self_attn.o_proj.bias", "H"))
    if spec.sinks:
        rules.append(plain("self_attention.sinks", "self_attn.sinks", "N", split=0))
    if spec.qk_norm == "head":
        rules.append(plain("self_attention.q_layernorm.weight", "self_attn.q_norm.weight", "D"))
        rules.append(plain("self_attention.k_layernorm.weight", "self_attn.k_norm.weight", "D"))
    if spec.qk_norm == "all":
        rules.append(plain("self_attention.q_layernorm.weight", "self_attn.q_norm.weight", "Q", split=0))
        rules.append(plain("self_attention.k_layernorm.weight", "self_attn.k_norm.weight", "K", split=0))
    return tuple(rules)


DENSE_MLP = (
    gate_up("mlp.linear_fc1.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight"),
    plain("mlp.linear_fc2.weight", "mlp.down_proj.weight", "HF", split=1),
)


def moe_mlp(
    router: str = "mlp.gate.weight", expert: str = "mlp.experts.{e}.", names: str = "gate_proj up_proj down_proj"
) -> tuple[Rule, ...]:
    """Router and experts, one tensor an expert on disk."""
    gate, up, down = (f"{expert}{name}.weight" for name in names.split())
    return (
        plain("mlp.router.weight", router, "EH"),
        experts("mlp.experts.weight1", gate, up, dims="MH", split=0),
        experts("mlp.experts.weight2", down, dims="HM", split=1),
    )


def shared_experts(prefix: str) -> tuple[Rule, ...]:
    """The experts that every token passes, as one MLP."""
    gate, up, down = (f"{prefix}.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj"))
    return (
        gate_up("mlp.shared_experts.linear_fc1.weight", gate, up, "SH"),
        plain("mlp.shared_experts.linear_fc2.weight", down, "HS", split=1),
    )


def all_moe(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """`moe_layers`: every layer."""
    return {"moe_layers": tuple(range(config["num_hidden_layers"]))}


def layer_with_shared_experts(spec: ModelSpec, index: int, attend: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """The rules of a layer whose MLP is dense, or experts and shared ones; `attend`: those of its attention."""
    if index not in spec.moe_layers:
        return attend + DENSE_MLP
    return attend + moe_mlp() + selection_bias(spec) + shared_experts("mlp.shared_experts")


def selection_bias(spec: ModelSpec) -> tuple[Rule, ...]:
    """What the router adds to its scores for the choice of experts only: a float32 buffer in every precision."""
    if not spec.selection_bias:
        return ()
    rule = plain("mlp.router.expert_bias", "mlp.gate.e_score_correction_bias", "E")
    return (replace(rule, dtype="float32"),)


def shared_width(config: Mapping[str, Any], where: str, default: int) -> dict[str, int]:
    """`shared_width` of n_shared_experts experts as wide as the others."""
    count = checked("n_shared_experts", config.get("n_shared_experts", default), int, where)
    return {"shared_width": count * checked("moe_intermediate_size", config.get("moe_intermediate_size"), int, where)}


def write_shared(spec: ModelSpec) -> dict[str, int]:
    return {"n_shared_experts": spec.shared_width // spec.moe_intermediate_size}


def first_layers_dense(config: Mapping[str, Any], where: str, default: int) -> dict[str, tuple[int, ...]]:
    """`moe_layers`: all but the first first_k_dense_replace."""
    first, layers = config.get("first_k_dense_replace", default), config["num_hidden_layers"]
    if not isinstance(first, int) or isinstance(first, bool) or not 0 <= first < layers:
        raise BadInput(
            f"{where}: first_k_dense_replace={first!r} must be from 0 to {layers - 1}, so that a layer is MoE"
        )
    return {"moe_layers": tuple(range(first, layers))}


def write_first_layers_dense(spec: ModelSpec) -> dict[str, int]:
    return {"first_k_dense_replace": spec.num_layers - len(spec.moe_layers)}


def groups(config: Mapping[str, Any], where: str, default: int | None, default_top: int | None) -> dict[str, int]:
    """The groups of experts; of one group every expert can be chosen."""
    count = checked("n_group", config.get("n_group", default) or 1, int, where)
    chosen = checked("topk_group", config.get("topk_group", default_top) or count, int, where)
    experts = next(config[key] for key in ("n_routed_experts", "num_local_experts", "num_experts") if config.get(key))
    size = experts // count
    if experts % count or chosen > count or size < 2 or chosen * size < config["num_experts_per_tok"]:
        raise BadInput(
            f"{where}: n_group={count}, topk_group={chosen} do not fit {experts} experts of which a token has "
            f"{config['num_experts_per_tok']}; n_group must divide them and topk_group hold enough"
        )
    return {"router_groups": count, "router_top_groups": chosen}


def read_mtp(config: Mapping[str, Any], where: str) -> dict[str, int]:
    """How many layers behind the last one predict further tokens: published files and transformers 5 name it apart."""
    names = ("num_nextn_predict_layers", "num_mtp_layers")
    count = next((config[name] for name in names if config.get(name) is not None), 0)
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise BadInput(f"{where}: num_nextn_predict_layers={count!r} must be 0 or more")
    return {"mtp_layers": count}


def mtp_prefixes(spec: ModelSpec) -> tuple[str, ...]:
    """How the names of the multi-token-prediction layers' tensors begin."""
    return tuple(f"model.layers.{spec.num_layers + i}." for i in range(spec.mtp_layers))
