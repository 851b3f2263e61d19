from tests.families import Case

MOE = dict(moe_intermediate_size=32, shared_expert_intermediate_size=48, num_experts=8, num_experts_per_tok=2)

CASES = {
    "qwen2-tied": Case("Qwen2Config", {"tie_word_embeddings": True}, layouts=(dict(tp=2), dict(pp=2), dict(tp=4))),
    "qwen2_moe": Case("Qwen2MoeConfig", MOE),
    "qwen2_moe-mixed": Case(
        "Qwen2MoeConfig",
        MOE | {"norm_topk_prob": True, "mlp_only_layers": [1], "qkv_bias": False},
        layouts=(),
        serve={"qkv_bias": True},
    ),
}
