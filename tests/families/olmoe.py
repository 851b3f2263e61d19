from tests.families import Case

MOE = dict(num_experts=8, num_experts_per_tok=2)

CASES = {
    "olmoe": Case("OlmoeConfig", MOE),
    "olmoe-biases": Case(
        "OlmoeConfig",
        MOE | {"attention_bias": True, "norm_topk_prob": True},
        layouts=(dict(tp=4),),
        serve={"attention_bias": False, "norm_topk_prob": False},
    ),
}
