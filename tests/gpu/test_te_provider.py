"""The te layer provider and FP8 recipes on CUDA, with Transformer Engine itself. Skipped elsewhere, with the reason.

The scale of every comparison is measured in it: bfloat16 layers of the torch provider are as far from float32 as bfloat16 is,
and emulated FP8 as far as FP8 is.
"""

from __future__ import annotations

import functools

import pytest
import torch

from megarl.platform import features
from tests.dist.harness import run_in_turn, run_ranks
from tests.dist.test_te_provider import hold
from tests.families import all_cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MODULE = "tests.gpu.cases"
# sizes that every recipe takes
SIZES = dict(hidden_size=256, head_dim=64, intermediate_size=512, moe_intermediate_size=128)
TORCH = dict(layers="torch", dtype="bfloat16")
TE = dict(layers="te", dtype="bfloat16")
LAYOUTS = [{}, {"tp": 2}, {"cp": 2}, {"ep": 2}, {"pp": 2}]


@functools.cache
def installed() -> list[str | None]:
    # in a process of its own, so that this one holds no device
    return run_ranks(f"{MODULE}:installed", 1)[0]


@pytest.fixture(autouse=True)
def transformer_engine():
    if installed()[0] is not None:
        pytest.skip(installed()[0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    all_cases()["qwen3_moe-mixed-yarn"].write(root / "model", **SIZES)
    return str(root / "model")


def ranks_of(degrees: dict[str, int]) -> int:
    count = max([1, *degrees.values()])
    if torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} CUDA devices, there are {torch.cuda.device_count()}")
    return count


@pytest.mark.parametrize("degrees", LAYOUTS, ids=str)
def test_te_is_as_near_to_float32_as_torch(degrees, folder):
    variants = {"float32": dict(layers="torch"), "torch": TORCH, "te": TE}
    steps = {"passes": ("passes", dict(path=folder, degrees=degrees, variants=variants))}
    for found in run_in_turn(MODULE, ranks_of(degrees), steps)["passes"]:
        assert found["te"]["provider"] == "te"
        for what in ("log_probs", "gradients"):
            assert found["te"][what] <= 2 * found["torch"][what] + 1e-6, found


@pytest.mark.parametrize("recipe", list(features.TE_RECIPES))
def test_fp8_recipe_is_as_far_from_bfloat16_as_its_emulation(recipe, folder):
    problem = installed()[1 + list(features.TE_RECIPES).index(recipe)]
    if problem is not None:
        pytest.skip(problem)
    variants = {"bfloat16": TE, "emulated": TORCH | {"fp8": recipe}, "te": TE | {"fp8": recipe}}
    (found,) = run_in_turn(MODULE, 1, {"passes": ("passes", dict(path=folder, degrees={}, variants=variants))})["passes"]
    assert found["te"]["finite"] and found["te"]["log_probs"] > 0
    for what in ("log_probs", "gradients"):
        assert found["te"][what] <= 2 * found["emulated"][what] + 1e-3, found
    assert found["te"]["cosine"] >= 0.95, found


@pytest.mark.parametrize("recipe", ["blockwise", "tensorwise", "mxfp8"])
def test_fp8_parameters_are_what_products_round_to(recipe, folder, tmp_path):
    problem = installed()[1 + list(features.TE_RECIPES).index(recipe)]
    if problem is not None:
        pytest.skip(problem)
    (found,) = run_ranks(f"{MODULE}:fp8_params", 1, folder, str(tmp_path), recipe)
    assert found["quantised"] > 0 and found["trained"] and found["resumed"], found
    for rounding, gap in zip(found["rounding"], found["gap"], strict=True):
        assert gap <= rounding / 10, found


def test_documents_of_a_row_do_not_see_each_other(folder):
    (found,) = run_ranks(f"{MODULE}:borders", 1, folder)
    assert found["own"] > 1e-3 and found["others"] == 0, found


def test_names_bits_and_shards(folder, tmp_path):
    steps = {
        "agree": ("agree", dict(path=folder, out=str(tmp_path / "export"), degrees={})),
        "cross_load": ("cross_load", dict(path=folder, folder=str(tmp_path / "shards"), degrees={})),
    }
    results = run_in_turn(MODULE, 1, steps)
    # float32 products of Transformer Engine are in TF32: 10 bits
    hold("cuda", results["agree"], log_probs=2e-2, gradients=2e-2)
    for norms in results["cross_load"][0].values():
        assert norms[2:] == pytest.approx(norms[:2], rel=2e-2)
