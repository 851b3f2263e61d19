from tests.families import Case
from tests.families.deepseek import random_selection_bias

MOE = dict(
    moe_intermediate_size=32,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_shared_experts=1,
    first_k_dense_replace=1,
    routed_scaling_factor=2.5,
    head_dim=24,
)

CASES = {
    "glm4_moe": Case(
        "Glm4MoeConfig",
        MOE | {"use_qk_norm": True, "attention_bias": True},
        serve={"head_dim": 32},
        weights=random_selection_bias,
    ),
    "glm4_moe-air": Case("Glm4MoeConfig", MOE, layouts=(), serve={"head_dim": 32}, weights=random_selection_bias),
}
