"""A run that stops and resumes, on the same or another layout, is the run that did not stop."""

from __future__ import annotations

import pytest

from tests.dist.checkpoints import make
from tests.dist.harness import run_in_turn

LAYOUTS = {"ep2": dict(ep=2), "tp2": dict(tp=2), "pp2": dict(pp=2)}


def continued(nproc, model, folder, layouts, first=None):
    """layout -> what each of `nproc` ranks found; `first` is trained and saved before the others resume."""
    cases = {
        name: ("two_steps_each_side", dict(path=model, folder=folder, parallel=parallel, resume=name != first))
        for name, parallel in layouts.items()
    }
    return run_in_turn("tests.dist.checkpoint_cases", nproc, cases)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model, folder = str(tmp_path_factory.mktemp("model")), str(tmp_path_factory.mktemp("checkpoints"))
    make(model)
    return model, folder, continued(2, model, folder, {"saved": dict(ep=2)} | LAYOUTS, first="saved")


def test_same_layout_is_bit_identical(saved):
    assert saved[2]["ep2"] == saved[2]["saved"]


@pytest.mark.parametrize("name", ["tp2", "pp2"])
def test_other_layouts_continue_the_same_run(saved, name):
    for rank in saved[2][name]:
        assert rank == pytest.approx(saved[2]["saved"][0], rel=5e-5)


def test_one_process_that_starts_later_continues_the_same_run(saved):
    model, folder, ranks = saved
    assert continued(1, model, folder, {"one": {}})["one"][0] == pytest.approx(ranks["saved"][0], rel=5e-5)
