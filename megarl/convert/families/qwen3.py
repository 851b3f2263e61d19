"""Qwen3 (dense): config.json and weights, in both directions."""

from __future__ import annotations

from megarl.convert.family import Family
from megarl.convert.hf_config import Key
from megarl.convert.rules import gate_up, plain, qkv, vocab

KEYS = (
    Key("num_layers", "num_hidden_layers"),
    Key("hidden_size", "hidden_size"),
    Key("num_heads", "num_attention_heads"),
    Key("num_kv_heads", "num_key_value_heads", default=lambda config: config["num_attention_heads"]),
    Key("head_dim", "head_dim", default=128),
    Key("intermediate_size", "intermediate_size"),
    Key("vocab_size", "vocab_size"),
    Key("max_position_embeddings", "max_position_embeddings"),
    Key("norm_eps", "rms_norm_eps", float, 1e-6),
    Key("tie_embeddings", "tie_word_embeddings", bool, False),
)

# The learner computes with these values only; the first one is what an export writes.
FIXED = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "attention_dropout": (0.0,),
    "use_sliding_window": (False,),
}

MODEL = (
    vocab("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
    plain("decoder.final_layernorm.weight", "model.norm.weight", "H"),
    vocab("output_layer.weight", "lm_head.weight"),
)

ATTENTION = (
    plain("input_layernorm.weight", "input_layernorm.weight", "H"),
    qkv(
        "self_attention.linear_qkv.weight",
        "self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight",
    ),
    plain("self_attention.linear_proj.weight", "self_attn.o_proj.weight", "HQ", split=1),
    plain("self_attention.q_layernorm.weight", "self_attn.q_norm.weight", "D"),
    plain("self_attention.k_layernorm.weight", "self_attn.k_norm.weight", "D"),
    plain("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", "H"),
)  # fmt: skip

DENSE_MLP = (
    gate_up("mlp.linear_fc1.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight"),
    plain("mlp.linear_fc2.weight", "mlp.down_proj.weight", "HF", split=1),
)

QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    keys=KEYS,
    fixed=FIXED,
    model=MODEL,
    same={"qk_norm": "head"},
    layer=lambda spec, index: ATTENTION + DENSE_MLP,
)
