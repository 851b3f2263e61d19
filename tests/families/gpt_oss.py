from tests.families import Case

SMALL = dict(num_local_experts=8, num_experts_per_tok=2, head_dim=16, sliding_window=5)
YARN = {
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 150_000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 16,
        "truncate": False,
        "beta_fast": 32.0,  # vLLM asks for both
        "beta_slow": 1.0,
    }
}

CASES = {
    "gpt_oss": Case(
        "GptOssConfig",
        SMALL | YARN,
        serve={"head_dim": 64, "intermediate_size": 128},
        layouts=(dict(tp=2), dict(ep=2), dict(pp=2), dict(tp=2, ep=2, pp=2), dict(tp=4)),
        refuses=((dict(tp=2, etp=2), "parallel.etp = 2"),),
    ),
    "gpt_oss-plain": Case(
        "GptOssConfig",
        SMALL | {"attention_bias": False, "layer_types": ["full_attention"] * 4},
        layouts=(),
        serve=None,  # vLLM has biases and windows whatever the configuration says
    ),
}
