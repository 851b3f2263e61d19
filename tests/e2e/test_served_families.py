"""vLLM serves checkpoints and exports of every family: greedy tokens, log-probs and experts of transformers."""

from __future__ import annotations

import pytest
import torch

from tests.dist.harness import run_ranks
from tests.e2e.serving_cases import LENGTH, PROMPTS, SCORED
from tests.families import all_cases

SERVED = [name for name, case in all_cases().items() if case.serve is not None]
DENSE = [name for name in SERVED if not any("experts" in key for key in all_cases()[name].settings)]
FAST = ["deepseek_v3"]  # latent attention, groups of experts, a selection bias, keys that transformers leaves out


@pytest.mark.slow
def test_every_moe_family(tmp_path):
    compare(tmp_path, [name for name in SERVED if name not in DENSE + FAST])


@pytest.mark.slow
def test_dense_families(tmp_path):
    """In a process of their own: vLLM makes its groups for experts with the first model of a process or never."""
    compare(tmp_path, DENSE)


def test_latent_attention_and_a_selection_bias(tmp_path):
    compare(tmp_path, FAST)


def compare(folder, names):
    from transformers import AutoModelForCausalLM

    found = run_ranks("tests.e2e.serving_cases:serve", 1, str(folder), names, timeout=1200)[0]
    for name, answers in found.items():
        model = AutoModelForCausalLM.from_pretrained(
            folder / name, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        for i, (prompt, response) in enumerate(zip(PROMPTS, answers["responses"], strict=True)):
            logits, experts = forward(model, prompt + response)
            assert logits.argmax(-1)[len(prompt) - 1 : -1].tolist() == response, name
            assert len(response) == LENGTH or response[-1] in (0, model.config.eos_token_id), name
            if experts:  # the last token was sampled and never computed
                assert torch.tensor(answers["experts"][i]).sort(-1).values.equal(torch.stack(experts, 1)[:-1]), name
        assert sum(map(len, answers["responses"])) > LENGTH * len(PROMPTS) / 2, name
        for tokens, scores in zip(SCORED, answers["scores"], strict=True):
            log_probs = torch.log_softmax(forward(model, tokens)[0], -1)[:-1]
            expected = log_probs.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
            # vLLM's CPU kernel rounds attention sinks to bfloat16
            limit = 1e-4 if name.startswith("gpt_oss") else 1e-5
            assert (expected - torch.tensor(scores[1:])).abs().max() <= limit, name


@torch.no_grad()
def forward(model, tokens):
    """[n, V] float64 logits, and of each MoE layer the ascending experts, [n, k]."""
    experts = []
    hooks = [
        module.register_forward_pre_hook(lambda module, inputs: experts.append(inputs[1].sort(-1).values))
        for name, module in model.named_modules()
        if name.endswith(".mlp.experts")
    ]
    ids = torch.tensor([tokens])
    logits = model(ids, attention_mask=torch.ones_like(ids)).logits[0].double()
    for hook in hooks:
        hook.remove()
    return logits, experts
