"""A weight sync of every family that vLLM serves here: biases, shared experts, other names, norms over all heads."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from tests.dist.harness import run_ranks
from tests.families import SHAPE, all_cases

CASES = {name: case for name, case in all_cases().items() if case.serve is not None}
FAST = ("qwen2_moe",)
WIDE = dict(hidden_size=128, max_position_embeddings=96)  # heads of 32, which vLLM's CPU attention takes


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in CASES])
def test_every_weight_is_the_learners(name, tmp_path):
    case = CASES[name]
    case.write(tmp_path, **WIDE, **case.serve)
    words = models.WordLevel({f"w{i}": i for i in range(SHAPE["vocab_size"])}, unk_token="w0")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token="w0", eos_token="w1").save_pretrained(tmp_path)
    degrees = dict(ep=2) if dict(ep=2) in case.layouts else dict(pp=2)
    rollout = {"tensor_parallel": 2}
    for rank in run_ranks("tests.dist.vllm_cases:family", 2, str(tmp_path), rollout, timeout=300, **degrees):
        # vLLM keeps products of a latent attention's weights and has a loader of its own for gpt-oss
        assert name.startswith(("gpt_oss", "deepseek")) or rank["reload"] is None
        # its CPU kernel rounds attention sinks to bfloat16
        assert max(rank["gaps"]) <= (1e-4 if name.startswith("gpt_oss") else 1e-5)
        assert rank["differing"] == rank["sums"] == []
        assert rank["reload"] or rank["moved"][0] == rank["moved"][1]  # no more than the least possible
