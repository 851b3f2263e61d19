"""Replayed routing is the recorded one, bit for bit, in any layout; an engine's record is the learner's routing."""

from __future__ import annotations

import pytest

from tests.dist.checkpoints import make
from tests.dist.harness import run_ranks
from tests.dist.vllm_cases import make_checkpoint

REPLAYS, ENGINE = "tests.dist.routing_cases:replays", "tests.dist.routing_cases:engine"
TWO = {
    "tp2": dict(tp=2),
    "pp2": dict(pp=2),
    "pp2vpp2": dict(pp=2, vpp=2),
    "ep2": dict(ep=2),
    "cp2": dict(cp=2),
    "ep2 all-gather": dict(ep=2, dispatcher="allgather"),
}
FOUR = {"tp2ep2pp2": dict(tp=2, ep=2, pp=2)}
LAYOUTS = [*TWO, *(pytest.param(name, marks=pytest.mark.slow) for name in FOUR)]
DENSE_STAGE = "pp2 with a stage of dense layers"
BUDGET = 60


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("routing")
    make(folder)
    return str(folder)


@pytest.fixture(scope="module")
def two(checkpoint, tmp_path_factory):
    mixed = tmp_path_factory.mktemp("mixed")
    make(mixed, mlp_only_layers=[0, 1])
    layouts = {name: (checkpoint, degrees) for name, degrees in TWO.items()}
    return run_ranks(REPLAYS, 2, layouts | {DENSE_STAGE: (str(mixed), dict(pp=2))}, BUDGET)


@pytest.fixture(scope="module")
def four(checkpoint):
    return run_ranks(REPLAYS, 4, {name: (checkpoint, degrees) for name, degrees in FOUR.items()}, BUDGET)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("layout", [DENSE_STAGE, *LAYOUTS])
def test_replay_at_the_same_weights_is_exact(request, layout, recompute):
    for rank in request.getfixturevalue("four" if layout in FOUR else "two"):
        assert rank[layout][recompute] == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bad_record_is_refused_and_the_layer_named(request, layout):
    said = [rank[layout]["faults"] for rank in request.getfixturevalue("four" if layout in FOUR else "two")]
    for good, shifted, swapped, *_ in said:
        assert good == ""
        assert "(layer 0: " in shifted  # at later layers of this model most tokens take the same experts
        assert "(layer 1: " in swapped and "layer 2: " in swapped
        assert "layer 0: " not in swapped and "layer 3: " not in swapped
    outside, twice, short = zip(*(one[3:] for one in said))
    assert any("layer 2: expert 8 is recorded, and the policy has 8" in line for line in outside)
    assert any("layer 1: an expert is recorded twice for one token: [5, 5]" in line for line in twice)
    assert all("3, 2), and the policy needs" in line and "4, 2)" in line for line in short)


def test_a_stage_of_dense_layers_records_nothing_and_is_watched_too(two):
    for rank in two:
        assert rank[DENSE_STAGE]["faults"] == [""]


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A checkpoint with more experts than a byte can number."""
    return make_checkpoint(str(tmp_path_factory.mktemp("many") / "model"), num_experts=300, top_k=3)


@pytest.mark.parametrize(
    "parallel, rollout",
    [
        # replicas in short: tests/e2e/test_replaying_run.py compares their record with the learner's routing as well
        pytest.param(dict(pp=2), {}, marks=pytest.mark.slow, id="replicas"),
        pytest.param(dict(tp=2), dict(tensor_parallel=2), id="tensor-parallel"),
    ],
)
def test_the_engine_routes_as_the_learner(many, tmp_path, parallel, rollout):
    """All tokens, prompts in the prefix cache and those prefilled in parts; any disagreement is a near-tie."""
    for rank in run_ranks(ENGINE, 2, many, str(tmp_path), parallel, rollout):
        assert rank["problems"] == [], rank["lines"]
        assert rank["tokens a step"] == 32
        assert rank["cached"] >= 32 * 2, "no sample found its prompt's blocks in the cache"
        assert set(rank["lengths"]) == {1} and len(rank["lengths"]) == 15
        assert rank["dtypes"] == ["uint16", "uint16", "torch.int16", "torch.int16"]
        assert rank["kept"] and rank["largest"] > 255 and rank["distinct"] > 100
        assert "equal bit for bit" in rank["lines"][-2]
        shifted = rank["bad"]["shifted"][0]
        assert shifted.startswith("layer 0: ") and "and not by a near-tie" in shifted
        assert [line.split(":")[0] for line in rank["bad"]["swapped"]] == ["layer 1", "layer 2"]
        assert rank["bad"]["replay"][0].endswith("from layer 1 on")
        assert rank["asked at the start"] == [[4, 3]]
        cannot, nothing, layers, experts = rank["refused"]
        assert cannot.startswith("rollout.routed_experts = true: vLLM ") and "does not record experts" in cannot
        for line, recorded in ((nothing, "nothing"), (layers, "5 layers with 3"), (experts, "4 layers with 4")):
            assert f" records {recorded}" in line and "the learner has 4 MoE layers of 4 with 3; set it to false" in line
