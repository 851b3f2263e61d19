from tests.families import Case

SMALL = dict(num_local_experts=8, num_experts_per_tok=2, head_dim=16, sliding_window=5)
YARN = {"rope_type": "yarn", "rope_theta": 150_000.0, "factor": 8.0, "truncate": False}
YARN = {"rope_parameters": YARN | {"original_max_position_embeddings": 16}}

CASES = {
    "gpt_oss": Case(
        "GptOssConfig",
        SMALL | YARN,
        layouts=(dict(tp=2), dict(ep=2), dict(pp=2), dict(tp=2, ep=2, pp=2), dict(tp=4)),
        refuses=((dict(tp=2, etp=2), "parallel.etp = 2"),),
    ),
    "gpt_oss-plain": Case("GptOssConfig", SMALL | {"attention_bias": False, "layer_types": ["full_attention"] * 4}, layouts=()),
}
