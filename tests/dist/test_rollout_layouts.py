"""Any rollout layout beside any learner layout: the learner's log-probs, every prompt once, the same results everywhere."""

from __future__ import annotations

import pytest

from tests.dist.harness import run_ranks
from tests.dist.rollout_cases import SAMPLES
from tests.dist.vllm_cases import make_checkpoint

LAYOUTS = {
    "columns": (2, dict(ep=2), dict(tensor_parallel=2)),
    "wide-columns": (2, dict(ep=2), dict(tensor_parallel=2)),  # whose cut experts fill the kernels' blocks
    "replicas": (2, dict(tp=2), dict()),
    "experts": (2, dict(pp=2), dict(tensor_parallel=2, expert_parallel=True)),
    "lock-step": (2, dict(ep=2), dict(data_parallel=2, expert_parallel=True)),
    "lock-step-of-tp": (4, dict(tp=2), dict(tensor_parallel=2, data_parallel=2, expert_parallel=True)),
    "two-engines": (4, dict(pp=2, ep=2), dict(data_parallel=2, expert_parallel=True)),
    "uneven-experts": (3, dict(), dict(data_parallel=3, expert_parallel=True)),
}
SLOW = ("columns", "wide-columns", "replicas", "lock-step-of-tp", "two-engines", "uneven-experts")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_checkpoint(str(tmp_path_factory.mktemp("layouts") / "model"))


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return make_checkpoint(str(tmp_path_factory.mktemp("wide") / "model"), hidden_size=128, moe_intermediate_size=64)


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in LAYOUTS]
)
def ranks(request, path, wide):
    """Five prompts, then one: with several replicas an uneven share, then none for all but the first."""
    world, parallel, rollout = LAYOUTS[request.param]
    rollout = rollout | {"routed_experts": True}
    model = wide if request.param == "wide-columns" else path
    return run_ranks(
        "tests.dist.rollout_cases:layout", world, model, [5, 1], parallel=parallel, rollout=rollout, timeout=300
    )


def test_log_probs_are_the_learners(ranks):
    for rank in ranks:
        assert rank["gap"][0] <= 1e-5
        for sampled in rank["rounds"]:
            assert sampled["gap"] <= 1e-5


def test_a_replica_may_have_nothing_to_score(ranks):
    assert [rank["scored"] for rank in ranks] == [2 if rank["replica"] == 0 else 0 for rank in ranks]


def test_every_weight_is_the_learners(ranks):
    for rank in ranks:
        assert rank["differing"] == []
        assert rank["families"] == ranks[0]["families"] > 4 * 8


def test_swapped_experts_are_named(ranks):
    for rank in ranks:
        assert rank["swapped"] == ["experts.gate_proj/up_proj/down_proj in layer 2 (experts 3, 5)"]


def test_every_prompt_is_sampled_by_one_replica(ranks):
    for number, count in enumerate((5, 1)):
        asked = {rank["replica"]: rank["rounds"][number]["asked"] for rank in ranks}
        assert sorted(prompt for share in asked.values() for prompt in share) == [f"p{i}" for i in range(count)]
        shares = sorted(len(share) for share in asked.values())
        assert shares[-1] - shares[0] <= 1


def test_the_ranks_of_a_replica_see_the_same_tokens(ranks):
    for number in range(2):
        by_replica: dict[int, list] = {}
        for rank in ranks:
            by_replica.setdefault(rank["replica"], []).append(rank["rounds"][number])
        for found in by_replica.values():
            assert all((one["asked"], one["own"]) == (found[0]["asked"], found[0]["own"]) for one in found)


def test_every_rank_gets_all_results_in_order(ranks):
    for number, count in enumerate((5, 1)):
        everything = ranks[0]["rounds"][number]["all"]
        assert [group["prompt"] for group in everything] == [f"p{i}" for i in range(count)]
        assert all(len(group["responses"]) == SAMPLES and all(group["responses"]) for group in everything)
        own = {group["prompt"]: group for rank in ranks for group in rank["rounds"][number]["own"]}
        assert everything == [own[f"p{i}"] for i in range(count)]
        assert all(rank["rounds"][number]["all"] == everything for rank in ranks)


def test_a_prompt_is_answered_alike_whatever_is_sampled_beside_it(ranks):
    five, one = (ranks[0]["rounds"][number]["all"] for number in range(2))
    assert one[0] == five[0]


def test_the_experts_of_every_token_are_reported(ranks):
    """All but the last token's, which no forward pass has seen."""
    for sampled in ranks[-1]["rounds"]:
        assert sampled["routed"] == [length - 1 for length in sampled["lengths"]]


def test_shared_memory_is_named_after_the_job_and_leaves_no_name(ranks):
    """vLLM's name is the same in every job; and a killed job cannot take its names back."""
    for rank in ranks:
        assert rank["segments"] == []
        assert rank["segment"] is None or rank["port"] in rank["segment"]
