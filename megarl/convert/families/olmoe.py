"""OLMoE: every layer MoE; one norm over all heads of the queries, one over all heads of the keys."""

from __future__ import annotations

from megarl.convert.families.llama import BIASES
from megarl.convert.families.parts import FIXED, MODEL, all_moe, attention, keys, moe_mlp
from megarl.convert.family import Family
from megarl.convert.hf_config import MOST, Key

OLMOE = Family(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    keys=keys(
        Key("moe_intermediate_size", "intermediate_size"),
        Key("num_experts", "num_experts", default=64, aliases=("num_local_experts",), most=MOST),
        Key("top_k", "num_experts_per_tok", default=8),
        Key("norm_topk_prob", "norm_topk_prob", bool, False),
        Key("norm_eps", "rms_norm_eps", float, 1e-5),
        *BIASES,
    ),
    fixed=FIXED | {"clip_qkv": (None,)},
    model=MODEL,
    same={"qk_norm": "all"},
    layer=lambda spec, index: attention(spec) + moe_mlp(),
    read_extra=lambda config, where: all_moe(config),
)
