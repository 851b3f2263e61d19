"""FP8 parameters, on the stand-in of Transformer Engine, against bfloat16 ones that its products round."""

from __future__ import annotations

import pytest

from tests.dist.harness import run_in_turn
from tests.families import all_cases

MODULE = "tests.dist.fp8_params_cases"
# sizes that every recipe takes
SIZES = dict(hidden_size=128, head_dim=64, intermediate_size=256, moe_intermediate_size=128)
OVERLAP = dict(overlap_grad_reduce=True, overlap_param_gather=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("families") / "model"
    all_cases()["qwen3_moe-mixed-yarn"].write(path, **SIZES)
    return str(path)


def hold(where: str, found: dict) -> None:
    """What `agree` must have found on every rank; all but norms is equal bit for bit."""
    assert found["quantised"] > 0 and not found["initial"], where
    assert found["exact"] and all(found["exact"]) and found["rounded"] > 0, where
    for name in ("start", "middle", "end", "main", "resumed", "resumed end", "plain into fp8", "plain into fp8 end", "export"):
        assert found[name], f"{where}: {name}"
    if "tensorwise" not in where:  # whose scales are no powers of two: a number that was rounded can round to another
        assert found["fp8 into plain"] and found["fp8 into plain end"], where
    assert found["norms"][0] == pytest.approx(found["norms"][1], rel=1e-6), where


@pytest.mark.parametrize(
    "recipe", ["blockwise", *(pytest.param(name, marks=pytest.mark.slow) for name in ("tensorwise", "mxfp8"))]
)
def test_fp8_parameters_give_the_run_of_bfloat16_ones(recipe, folder, tmp_path):
    steps = {recipe: ("agree", dict(path=folder, saved=str(tmp_path), recipe=recipe, degrees={}))}
    (found,) = run_in_turn(MODULE, 1, steps)[recipe]
    hold(recipe, found)


@pytest.mark.slow
def test_so_they_do_on_two_ranks(folder, tmp_path):
    pairs = [("blockwise", OVERLAP), ("tensorwise", OVERLAP), ("mxfp8", {}), ("mxfp8", {"ep": 2}), ("blockwise", {"tp": 2})]
    pairs += [("blockwise", {"pp": 2})]
    steps = {
        f"{recipe} {degrees}": ("agree", dict(path=folder, saved=str(tmp_path / str(i)), recipe=recipe, degrees=degrees))
        for i, (recipe, degrees) in enumerate(pairs)
    }
    for where, ranks in run_in_turn(MODULE, 2, steps).items():
        for found in ranks:
            hold(where, found)
