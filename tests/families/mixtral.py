from tests.families import Case

CASES = {"mixtral": Case("MixtralConfig", dict(num_local_experts=8, num_experts_per_tok=2))}
