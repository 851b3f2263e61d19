"""Every way to compute Adam gives the weights of float64 Adam, and continues a checkpoint of any other."""

from __future__ import annotations

import importlib.util

import pytest

from tests.dist.checkpoints import make
from tests.dist.harness import run_in_turn

CASES = "tests.dist.optimizer_cases"
# a weight decay that is felt, an epsilon of the size of gradients, a norm above the clip, a rate that changes every step
ADAM = dict(lr=3e-3, weight_decay=0.1, eps=1e-4, clip_grad=0.5, warmup_steps=5, schedule="linear")
WAYS = {"fused": {}, "for-loop": dict(implementation="for-loop"), "foreach": dict(implementation="foreach"),
        "offloaded": dict(cpu_offload=True)}  # fmt: skip
L2 = dict(decoupled_weight_decay=False)
RESUMED = [("offloaded", "offloaded", "float32"), ("fused", "offloaded", "float32"), ("offloaded", "for-loop", "float32"),
           ("offloaded", "offloaded", "bfloat16")]  # fmt: skip
PACKAGES = ("te", "apex")
KINDS = [("te", "te"), ("apex", "torch"), ("torch", "te")]  # one's checkpoint, continued by another
PARKED = {
    "float32": ({}, "float32", "torch"),  # main weights are the weights: views of Megatron's buffer of parameters
    "bfloat16": ({}, "bfloat16", "torch"),  # float32 main weights, this rank's shards
    "offloaded": (dict(cpu_offload=True), "bfloat16", "torch"),  # main weights in the hybrid optimizer
    "te": ({}, "float32", "te"),
}
HAS_MUON = importlib.util.find_spec("emerging_optimizers") is not None


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make(folder, num_hidden_layers=2)
    return str(folder)


@pytest.fixture(scope="module")
def one(path):
    def case(ways, dtype, steps, **more):
        optimizers = {name: ADAM | WAYS[name] | more for name in ways}
        return "against_float64", dict(path=path, ways=optimizers, dtype=dtype, steps=steps)

    cases = {
        "float32": case(["fused", "for-loop", "offloaded"], "float32", 20),
        "float32 L2": case(["fused", "foreach"], "float32", 4, **L2),
        "float64": case(["fused"], "float64", 4),
        "float64 L2": case(["for-loop"], "float64", 4, **L2),
        "bfloat16": case(["fused", "offloaded"], "bfloat16", 4),
    }
    for kind in PACKAGES:
        cases[kind] = "fused_against_float64", dict(path=path, kind=kind, optimizer=ADAM, steps=4)
        cases[f"{kind} L2"] = "fused_against_float64", dict(path=path, kind=kind, optimizer=ADAM | L2, steps=4)
    return {name: ranks[0] for name, ranks in run_in_turn(CASES, 1, cases, timeout=290).items()}


@pytest.fixture(scope="module")
def two(path, tmp_path_factory):
    cases = {
        f"{first} {then} {dtype}": (
            "resumed",
            dict(path=path, folder=str(tmp_path_factory.mktemp("checkpoints")), first=ADAM | WAYS[first],
                 then=ADAM | WAYS[then], dtype=dtype),
        )
        for first, then, dtype in RESUMED
    }  # fmt: skip
    for kinds in KINDS:
        folder = str(tmp_path_factory.mktemp("kinds"))
        settings = dict(path=path, folder=folder, first=ADAM, then=ADAM, dtype="float32", kinds=kinds)
        cases[" then ".join(kinds)] = "resumed", settings
    for name, (settings, dtype, kind) in PARKED.items():
        cases[f"parked {name}"] = "parked", dict(path=path, optimizer=ADAM | settings, dtype=dtype, kind=kind)
    cases["refused"] = ("refusals", dict(path=path))
    for kind in ("sgd", "muon") if HAS_MUON else ("sgd",):
        own, folder = ADAM | dict(type=kind), str(tmp_path_factory.mktemp(kind))
        cases[kind] = "resumed", dict(path=path, folder=folder, first=own, then=own, dtype="float32")
    return run_in_turn(CASES, 2, cases, timeout=290)


@pytest.mark.parametrize("name", PARKED)
def test_a_learner_that_leaves_the_device_comes_back_bit_for_bit(two, name):
    for rank in two[f"parked {name}"]:
        assert rank["left"] == {"weights": 0, "gradients": 0, "optimizer": 0} and all(rank["sizes"].values())
        assert rank["same"] == {"weights": True, "optimizer": True} and not rank["gradients"]
        assert rank["norms"][0] == rank["norms"][1] and rank["apart"] == 0.0
        assert rank["refused"] == "the policy's weights and gradients and optimizer are parked on the host"


@pytest.mark.parametrize("case, most", [("float32", 1e-6), ("float32 L2", 1e-6), ("float64", 1e-14), ("float64 L2", 1e-14)])
def test_weights_are_those_of_float64_adam(one, case, most):
    assert all(distance <= most for distance, _ in one[case].values()), one[case]


def test_main_weights_of_a_bfloat16_learner_are_float32(one):
    """bfloat16 weights alone would be 1e-3 off."""
    assert all(distance <= 1e-6 for distance, _ in one["bfloat16"].values()), one["bfloat16"]


def test_all_ways_agree_after_20_steps(one):
    assert one["float32"].keys() == {"fused", "for-loop", "offloaded"}
    assert all(apart <= 1e-6 for _, apart in one["float32"].values()), one["float32"]


@pytest.mark.parametrize("first, then, dtype", RESUMED)
def test_a_checkpoint_is_continued(two, first, then, dtype):
    """By the same way bit for bit; by another as closely as they agree, and in the other's way."""
    for rank in two[f"{first} {then} {dtype}"]:
        if first == then or "for-loop" not in (first, then):  # the host's kernel is PyTorch's fused one
            assert rank["again"] == rank["norms"] and rank["apart"] == 0.0
        else:
            assert rank["again"] == pytest.approx(rank["norms"], rel=1e-5) and 0.0 < rank["apart"] < 1e-6
        assert rank["fused"] == (then != "for-loop")


@pytest.mark.parametrize("kind", PACKAGES)
@pytest.mark.parametrize("decay", ["", " L2"])
def test_the_constructor_of_a_fused_adam_takes_what_megatron_gives_it(one, kind, decay):
    """The pinned release's signature around a step in PyTorch's operators: what each argument means shows in the weights."""
    assert one[f"{kind}{decay}"][0] <= 1e-6


@pytest.mark.parametrize("kinds", KINDS, ids=" then ".join)
def test_a_fused_adam_continues_checkpoints(two, kinds):
    """Its step count is the group's, PyTorch's each parameter's."""
    for rank in two[" then ".join(kinds)]:
        assert rank["again"] == pytest.approx(rank["norms"], rel=0 if kinds[0] == kinds[1] else 1e-5)
        assert rank["apart"] <= (0.0 if kinds[0] == kinds[1] else 1e-6)


def test_kernels_for_cuda_are_refused_without_it(two):
    for rank in two["refused"]:
        for kind in ("te", "apex"):
            assert rank[kind].startswith(f"optimizer.implementation = '{kind}': it has CUDA kernels only")
            assert "\n" not in rank[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "sgd",
        pytest.param("muon", marks=pytest.mark.skipif(not HAS_MUON, reason="Muon needs emerging_optimizers")),
    ],
)
def test_other_optimizers_continue_their_checkpoints(two, kind):
    for rank in two[kind]:
        assert rank["again"] == rank["norms"] and rank["apart"] == 0.0
