import torch

from tests.families import Case

COMMON = dict(
    num_key_value_heads=4,
    kv_lora_rank=20,
    q_lora_rank=24,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=12,
    moe_intermediate_size=32,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_shared_experts=2,
    first_k_dense_replace=1,
    routed_scaling_factor=1.7,
)
V3 = COMMON | dict(n_group=4, topk_group=2)
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 40.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
}


def random_selection_bias(model) -> None:
    """Large enough to change the choice of most tokens."""
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            torch.nn.init.normal_(buffer, std=0.3)


# the only latent that vLLM's CPU kernel takes; its norms of the latents use the model's epsilon
SERVED = dict(kv_lora_rank=512, qk_nope_head_dim=64, qk_rope_head_dim=64, v_head_dim=64, rms_norm_eps=1e-6)

CASES = {
    "deepseek_v3": Case(
        "DeepseekV3Config", V3 | {"rope_parameters": YARN}, serve=SERVED, weights=random_selection_bias
    ),
    "deepseek_v3-halves": Case(
        "DeepseekV3Config",
        V3 | {"q_lora_rank": None, "rope_interleave": False, "n_group": 1, "topk_group": 1},
        layouts=(dict(tp=2),),
        serve=SERVED | {"rope_interleave": True},
        weights=random_selection_bias,
    ),
    "deepseek_v2": Case(
        "DeepseekV2Config",
        COMMON | dict(topk_method="group_limited_greedy", n_group=4, topk_group=2, rope_parameters=YARN),
        serve=SERVED,
    ),
    "deepseek_v2-lite": Case(
        "DeepseekV2Config",
        COMMON | dict(q_lora_rank=None, topk_method="greedy", n_group=4, topk_group=1),
        layouts=(),
        serve=SERVED,
    ),
}
