"""FP8 rollout: a sync makes vLLM's FP8 layers multiply with the learner's codes, and what goes wrong is still seen."""

from __future__ import annotations

import pytest

from tests.dist.fp8_rollout_cases import SHAPE
from tests.dist.harness import run_ranks
from tests.dist.vllm_cases import make_checkpoint

SYNC = "tests.dist.fp8_rollout_cases:sync"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_checkpoint(str(tmp_path_factory.mktemp("fp8") / "model"), **SHAPE)


@pytest.fixture(scope="module")
def rank(path):
    return run_ranks(SYNC, 1, path, timeout=900, model=dict(fp8="blockwise", fp8_power_of_two=True))[0]


def test_learner_and_engine_round_alike(rank):
    """Their log-probs are equal until a last bit makes a neighbouring code; without FP8 in the learner none are."""
    mean, same = rank["synced"][0], rank["same_start"]
    assert rank["reload"] is None and mean <= 5e-2 and same >= 8, (mean, same)
    assert rank["plain_learner"][0] >= 3 * mean and rank["plain_learner"][1] <= 1, rank["plain_learner"]


def test_the_engine_has_the_codes_that_the_learner_multiplies_with(rank):
    assert rank["codes"] == {"same": 2 * (4 + 4 * 3), "other": 0}
    assert rank["sums"] == "equal"


def test_activations_are_rounded_as_vllm_rounds_them(rank):
    assert rank["rounding"] == [True, True]


def test_kernels_that_are_written_into_read_what_was_loaded(rank):
    """Those of GPUs, by the installed vLLM's sources."""
    assert rank["as_loaded"] == dict(named=True, linears=True, prepared=True, experts=True)


def test_a_sync_moves_codes_and_factors(rank):
    assert rank["bytes"] == rank["written"]
    attention, experts = (2 * 4 + 2 * 2) * 128 * 256, 4 * 3 * 128 * 256
    plain = 2 * 300 * 256 + 256 + 3 * (2 * 256 + 2 * 128 + 4 * 256) + attention + experts
    coded = 2 * (attention + experts)
    assert rank["bytes"] == 4 * plain + coded + coded // 128**2 * 4


@pytest.mark.parametrize(
    "broken, named",
    [
        ("factors", "experts.down_proj in layer 1 (experts 3)"),
        ("codes_moved", "self_attn.q_proj in layer 1"),
        ("stale", "self_attn.q_proj in layers 0, 1, 2"),
    ],
)
def test_a_planted_error_is_seen_and_named(rank, broken, named):
    check, sums = rank[broken]
    assert isinstance(check, str) and named in check
    assert "checksums differ" in sums


def test_vllms_own_reload_brings_the_same(rank):
    assert rank["reloaded"] == 0


def test_a_precision_that_vllm_has_no_fp8_layers_beside_is_refused(rank):
    message = "rollout.fp8 = 'blockwise': vLLM has FP8 layers beside bfloat16 or float16 here, not float32; set"
    assert rank["refused"] == f"{message} rollout.dtype: bfloat16"


@pytest.mark.slow
def test_experts_of_one_rank_each_and_split_linears(path):
    """Two ranks: experts of a learner with ep go to an engine that splits everything else."""
    ranks = run_ranks(SYNC, 2, path, timeout=1200, ep=2, rollout=dict(tensor_parallel=2, expert_parallel=True))
    for rank in ranks:
        assert rank["synced"][0] <= 5e-2 and rank["same_start"] >= 8
        assert rank["sums"] == "equal" and rank["codes"]["same"] and not rank["codes"]["other"]
        assert rank["reloaded"] == 0 and "experts 3" in rank["factors"][0]


@pytest.mark.slow
def test_bfloat16(path):
    (rank,) = run_ranks(SYNC, 1, path, timeout=1200, dtype="bfloat16", head=0.2)
    assert rank["synced"][0] <= 5e-2 and rank["sums"] == "equal" and rank["codes"] == {"same": 32, "other": 0}
    assert rank["reloaded"] == 0 and "experts 3" in rank["factors"][0]
