"""vLLM serves what is exported of every family: greedy tokens and log-probs of transformers."""

from __future__ import annotations

import pytest
import torch

from tests.dist.harness import run_ranks
from tests.e2e.serving_cases import PROMPTS, SCORED
from tests.families import all_cases

SERVED = [name for name, case in all_cases().items() if case.serve is not None and "-" not in name]
DENSE = [name for name, case in all_cases().items() if name in ("llama", "qwen2-tied", "qwen3-tied")]


@pytest.mark.slow
def test_every_moe_family(tmp_path):
    compare(tmp_path, [name for name in SERVED if name not in DENSE])


@pytest.mark.slow
def test_dense_families(tmp_path):
    """In a process of their own: vLLM makes its groups for experts with the first model of a process or never."""
    compare(tmp_path, DENSE)


def test_latent_attention_and_a_selection_bias(tmp_path):
    compare(tmp_path, ["deepseek_v3"])


def compare(folder, names):
    from transformers import AutoModelForCausalLM

    found = run_ranks("tests.e2e.serving_cases:serve", 1, str(folder), names, timeout=280)[0]
    for name in names:
        path = folder / f"{name}-served"
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
        for prompt, response in zip(PROMPTS, found[name]["responses"], strict=True):
            logits = logits_of(model, prompt + response)[len(prompt) - 1 : -1]
            assert len(response) == 12 and logits.argmax(-1).tolist() == response, name
        for tokens, scores in zip(SCORED, found[name]["scores"], strict=True):
            log_probs = torch.log_softmax(logits_of(model, tokens), -1)[:-1]
            expected = log_probs.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
            # vLLM's CPU kernel rounds attention sinks to bfloat16
            assert (expected - torch.tensor(scores[1:])).abs().max() <= (1e-4 if name == "gpt_oss" else 1e-5), name


@torch.no_grad()
def logits_of(model, tokens):
    ids = torch.tensor([tokens])
    return model(ids, attention_mask=torch.ones_like(ids)).logits[0].double()
