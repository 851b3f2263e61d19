"""The engine against transformers, and its seeds against the batch they are drawn in."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megarl.rollout.engine import sample_seed
from tests.dist.harness import run_ranks
from tests.dist.vllm_cases import CHANGED, make_checkpoint, prompts

FLOAT32 = 1e-5  # log-prob gap of two float32 engines


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_checkpoint(str(tmp_path_factory.mktemp("vllm") / "model"))


@pytest.fixture(scope="module")
def engine(path):
    return run_ranks("tests.dist.vllm_cases:sampling", 1, path, timeout=300)[0]


@pytest.fixture(scope="module")
def reference(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model, tokens):
    return model(torch.tensor([tokens])).logits[0].double()


def log_probs(values, tokens, temperature=1.0):
    return torch.log_softmax(values / temperature, -1)[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].numpy()


def test_log_probs_are_of_the_tempered_distribution(engine, reference):
    for row in engine["warm"]:
        tokens = row["prompt"] + row["response"]
        expected = log_probs(logits(reference, tokens), tokens, 0.7)[len(row["prompt"]) - 1 :]
        assert np.abs(np.array(row["log_probs"]) - expected).max() < FLOAT32


def test_greedy_takes_the_argmax(engine, reference):
    for row in engine["greedy"]:
        values = logits(reference, row["prompt"] + row["response"])[len(row["prompt"]) - 1 : -1]
        assert row["response"] == values.argmax(-1).tolist()


def test_score_is_the_log_prob_of_every_token_at_temperature_one(engine, reference):
    for row, scored in zip(engine["greedy"], engine["scored"], strict=True):
        tokens = row["prompt"] + row["response"]
        assert scored[0] == 0.0
        assert np.abs(np.array(scored[1:]) - log_probs(logits(reference, tokens), tokens)).max() < FLOAT32


def test_load_weights_drops_what_earlier_requests_cached(engine, reference):
    changed = reference.get_parameter(CHANGED)
    with torch.no_grad():
        changed.mul_(0.5)
    try:
        for row in engine["reloaded"]:
            tokens = row["prompt"] + row["response"]
            expected = log_probs(logits(reference, tokens), tokens)[len(row["prompt"]) - 1 :]
            assert np.abs(np.array(row["log_probs"]) - expected).max() < FLOAT32
    finally:
        with torch.no_grad():
            changed.mul_(2.0)


def test_a_sample_depends_on_its_seed_and_not_on_the_batch(engine):
    samples = [row["response"] for row in engine["warm"]]
    grouped = [samples[i : i + 4] for i in range(0, len(samples), 4)]
    turned = [row["response"] for row in engine["reversed"]]
    assert grouped == [turned[i : i + 4] for i in range(0, len(turned), 4)][::-1]
    assert grouped[2] == [row["response"] for row in engine["alone"]]


def test_samples_of_a_prompt_and_rounds_differ(engine):
    samples = [tuple(row["response"]) for row in engine["warm"]]
    assert len(set(samples)) == len(samples)
    assert not set(samples) & {tuple(row["response"]) for row in engine["next_round"]}


def test_a_prompt_prefilled_in_two_parts_gives_the_same_samples(engine):
    """110 prompts of 85 tokens exceed the 8192 tokens of one engine step, so one of them is cut."""
    assert engine["chunked"][90:] == engine["unchunked"]
    assert len({tuple(row) for row in engine["chunked"]}) > 100


def test_log_probs_do_not_change_the_sample(engine):
    assert [row["response"] for row in engine["no_log_probs"]] == [row["response"] for row in engine["warm"]]
    assert all(math.isnan(value) for row in engine["no_log_probs"] for value in row["log_probs"])


def test_first_tokens_follow_the_distribution(engine, reference):
    """Chi-square of 4000 draws against transformers' probabilities; rare tokens share one bin."""
    expected = torch.softmax(logits(reference, list(prompts(1)[0].token_ids))[-1], -1).numpy() * 4000
    observed = np.bincount(engine["first_tokens"], minlength=len(expected))
    common = expected >= 10
    observed = np.append(observed[common], observed[~common].sum())
    expected = np.append(expected[common], expected[~common].sum())
    statistic, freedom = ((observed - expected) ** 2 / expected).sum(), len(expected) - 1
    assert freedom > 20
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)


def test_responses_end_where_they_say(engine):
    ends = set(engine["stop_ids"])
    for row in engine["warm"] + engine["next_round"]:
        body, last = row["response"][:-1], row["response"][-1]
        assert not ends & set(body)
        assert row["finish"] == ("stop" if last in ends else "length")
        assert row["finish"] == "stop" or len(row["response"]) == 24
        assert row["mask"] == [1] * len(row["response"])
    assert {row["finish"] for row in engine["warm"] + engine["next_round"]} == {"stop", "length"}


def test_policy_version_is_that_of_the_weights(engine):
    assert {v for row in engine["warm"] for v in row["version"]} == {7}
    assert {v for row in engine["reloaded"] for v in row["version"]} == {8}


def test_text_is_the_response_without_its_end_token(engine, path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    for row in engine["warm"]:
        ids = row["response"][:-1] if row["finish"] == "stop" else row["response"]
        assert row["text"] == tokenizer.decode(ids)


@torch.no_grad()
def test_routed_experts_are_those_of_transformers(engine, reference):
    row = max(engine["warm"], key=lambda row: len(row["response"]))
    tokens = row["prompt"] + row["response"]
    router_logits = reference(torch.tensor([tokens]), output_router_logits=True).router_logits
    routed = np.array(row["routed"])
    assert routed.shape == (len(tokens) - 1, len(router_logits), 2)
    for layer, values in enumerate(router_logits):
        expected = values.view(len(tokens), -1).topk(2).indices.sort(-1).values[:-1]
        assert np.array_equal(np.sort(routed[:, layer], -1), expected.numpy())


def test_seeds_depend_on_every_part():
    seeds = {
        sample_seed(run, prompt, sample, turn)
        for run in (1, 2)
        for prompt in "ab"
        for sample in (0, 1)
        for turn in (0, 1)
    }
    assert len(seeds) == 16 and all(0 <= seed < 2**63 for seed in seeds)
    assert sample_seed(1, "a", 0, 0) == 3707216131063291683  # the same in every process, so that runs can be repeated
