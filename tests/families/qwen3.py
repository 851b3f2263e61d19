from tests.families import Case

MOE = dict(moe_intermediate_size=32, num_experts=8, num_experts_per_tok=2, head_dim=24, norm_topk_prob=True)

CASES = {
    "qwen3_moe": Case("Qwen3MoeConfig", MOE, serve={"head_dim": 32}),
    "qwen3_moe-raw-gates": Case("Qwen3MoeConfig", MOE | {"norm_topk_prob": False}, layouts=(), serve={"head_dim": 32}),
    "qwen3_moe-mixed-yarn": Case(
        "Qwen3MoeConfig",
        MOE
        | {
            "mlp_only_layers": [2],
            "rope_parameters": {"rope_type": "yarn", "rope_theta": 30_000.0, "factor": 4.0},
        },
        layouts=(dict(pp=2),),
        serve={"head_dim": 32},
    ),
    "qwen3-tied": Case(
        "Qwen3Config",
        {"tie_word_embeddings": True, "head_dim": 24},
        layouts=(dict(tp=2), dict(pp=2), dict(tp=2, pp=2)),
        serve={"head_dim": 32},
    ),
}
