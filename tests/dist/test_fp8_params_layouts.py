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
    assert found["quantised"] > 0 and found["trained"] and not found["initial"], where
    assert found["exact"] and all(found["exact"]) and found["rounded"] > 0, where
    for name in ("start", "middle", "end", "main", "resumed", "resumed end", "export"):
        assert found[name], f"{where}: {name}"
    for name in ("plain into fp8", "plain into fp8 end"):
        assert found[name], f"{where}: {name}"
    assert found["norms"][0] == pytest.approx(found["norms"][1], rel=1e-6), where


@pytest.mark.parametrize("recipe", ["blockwise", "tensorwise", "mxfp8"])
def test_one_rank(recipe, folder, tmp_path):
    steps = {recipe: ("agree", dict(path=folder, saved=str(tmp_path), recipe=recipe, degrees={}))}
    for found in run_in_turn(MODULE, 1, steps)[recipe]:
        hold(recipe, found)
