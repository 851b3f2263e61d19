"""A run that stops and resumes, on the same or another layout, is the run that did not stop."""

from __future__ import annotations

import pytest

from tests.dist.checkpoints import make
from tests.dist.harness import run_ranks

CASE = "tests.dist.checkpoint_cases:two_steps_each_side"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model, folder = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("checkpoints")
    make(model)
    return str(model), str(folder), run_ranks(CASE, 2, str(model), str(folder), {"ep": 2}, resume=False)


def test_same_layout_is_bit_identical(saved):
    model, folder, expected = saved
    assert run_ranks(CASE, 2, model, folder, {"ep": 2}, resume=True) == expected


@pytest.mark.parametrize("nproc, parallel", [(1, {}), (2, {"tp": 2}), (2, {"pp": 2})])
def test_other_layouts_continue_the_same_run(saved, nproc, parallel):
    model, folder, expected = saved
    for rank in run_ranks(CASE, nproc, model, folder, parallel, resume=True):
        assert rank == pytest.approx(expected[0], rel=5e-5)
