"""FP8 on several ranks: blocks that a layout does not cut give the same step, and delayed scales are one per matrix."""

from __future__ import annotations

import numpy as np
import pytest

from tests.dist.checkpoints import make
from tests.dist.harness import run_in_turn


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    path, saved = (str(tmp_path_factory.mktemp(name)) for name in ("model", "saved"))
    make(path, head_dim=32)
    exact = dict(path=path, fp8="mxfp8", dtype="float64")
    delayed = dict(path=path, fp8="delayed", fp8_history=2, fp8_skip_first=1)
    cases = {
        "tp2": exact | dict(parallel=dict(tp=2)),
        "pp2": exact | dict(parallel=dict(pp=2, recompute="selective")),
        "ep2": exact | dict(parallel=dict(ep=2)),
        "delayed tp2": delayed | dict(parallel=dict(tp=2), save=saved),
        "delayed ep2": delayed | dict(parallel=dict(ep=2)),
        "resumed pp2": delayed | dict(parallel=dict(pp=2), load=saved),
    }
    return run_in_turn("tests.dist.fp8_cases", 2, {name: ("step", case) for name, case in cases.items()})


def test_layouts_that_cut_no_block_change_nothing(found):
    """Stages multiply whole matrices, as one process does. The tokens of a weight's blocks are others under ep."""
    whole = found["pp2"][1]
    assert found["tp2"][0]["loss"] == found["tp2"][1]["loss"] == pytest.approx(whole["loss"], rel=1e-9)
    assert found["tp2"][0]["gradient"] == pytest.approx(whole["gradient"], rel=1e-7)
    assert found["ep2"][0]["loss"] == pytest.approx(whole["loss"], rel=1e-9)
    assert found["ep2"][0]["gradient"] == pytest.approx(whole["gradient"], rel=0.05)


@pytest.mark.parametrize("name", ["delayed tp2", "delayed ep2"])
def test_ranks_agree_on_delayed_scales(found, name):
    one, other = (rank["amaxes"] for rank in found[name])
    assert len(one) == 4 * 4 and one.keys() == other.keys()
    for key in one:
        if not (name == "delayed ep2" and "experts" in key):
            assert one[key] == other[key]
        past = np.array(one[key])[..., 1:]
        is_kept = key.startswith("1 ")  # the first layer
        assert not past[..., int(not is_kept) :].any() and (is_kept or (past[..., 0] > 0).all())


def test_delayed_scales_resume_under_another_layout(found):
    resumed = found["resumed pp2"][0]["amaxes"] | found["resumed pp2"][1]["amaxes"]
    assert resumed == found["delayed tp2"][0]["amaxes"]
