"""What the tables of several families have in common: the rules of a layer's parts, as transformers names them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megarl.convert.hf_config import Key
from megarl.convert.rules import Rule, experts, gate_up, plain, qkv, vocab
from megarl.models.spec import ModelSpec


def own_head_dim(config: Mapping[str, Any]) -> int:
    return config["hidden_size"] // config["num_attention_heads"]


KEYS = (
    Key("num_layers", "num_hidden_layers"),
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
