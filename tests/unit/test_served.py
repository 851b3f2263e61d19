"""Checkpoints that vLLM would compute as other models are refused."""

from __future__ import annotations

import pytest

from megarl.convert import family
from megarl.errors import BadInput
from megarl.rollout.served import check_served
from tests.families import all_cases

CASES, SIZES = all_cases(), {"head": [32, 64], "latent": [576]}
REFUSED = [
    ("deepseek_v2", {}, "kv_lora_rank + qk_rope_head_dim is 28"),
    ("deepseek_v3-halves", {"kv_lora_rank": 568}, "deepseek_v3 with rope_interleave = true"),
    ("glm4_moe", {}, "head_dim is 24"),
    ("glm4_moe", {"head_dim": 32, "tie_word_embeddings": True}, "glm4_moe with tie_word_embeddings = false"),
    ("gpt_oss", {"head_dim": 32, "attention_bias": False}, "gpt_oss with attention_bias = true"),
    ("gpt_oss", {"head_dim": 32, "layer_types": ["full_attention", "sliding_attention"] * 2}, "gpt_oss with layer_types"),
    ("gpt_oss", {"head_dim": 32, "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}, "rope_type = yarn"),
    ("olmoe-biases", {"hidden_size": 128}, "olmoe with attention_bias = false"),
    ("olmoe-biases", {"hidden_size": 128, "attention_bias": False}, "olmoe with norm_topk_prob = false"),
    ("qwen2_moe-mixed", {"hidden_size": 128}, "qwen2_moe with qkv_bias = true"),
]


def check(name, **changes):
    config = CASES[name].configuration(**changes)
    spec = family(config.model_type).read_config(config.to_dict())
    check_served(spec, "here", SIZES["latent" if spec.kv_lora_rank else "head"])


@pytest.mark.parametrize("name, changes, message", REFUSED)
def test_what_vllm_would_compute_otherwise(name, changes, message):
    with pytest.raises(BadInput) as caught:
        check(name, **changes)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.serve is not None])
def test_what_it_serves_is_accepted(name):
    check(name, **{"hidden_size": 128} | CASES[name].serve)
