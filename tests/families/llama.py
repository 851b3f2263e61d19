from tests.families import Case

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

CASES = {
    "llama": Case("LlamaConfig", {"rope_parameters": LLAMA3}, layouts=(dict(tp=2, pp=2), dict(tp=4))),
    "llama-biases": Case(
        "LlamaConfig", {"attention_bias": True, "head_dim": 24}, layouts=(dict(tp=2),), serve={"head_dim": 32}
    ),
}
