from tests.families import Case

MOE = dict(num_experts=8, num_experts_per_tok=2)

# vLLM computes without the biases, whatever config.json says
BIASES = MOE | {"attention_bias": True, "norm_topk_prob": True}
CASES = {
    "olmoe": Case("OlmoeConfig", MOE),
    "olmoe-biases": Case("OlmoeConfig", BIASES, layouts=(dict(tp=4),), serve=None),
}
