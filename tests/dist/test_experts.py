"""No token is dropped, however skewed the routing; an expert, or a whole rank, may have none."""

from __future__ import annotations

import pytest

from tests.dist.harness import run_in_turn


@pytest.mark.parametrize("ep", [1, 2])
def test_a_layer_is_the_dense_definition(ep):
    cases = {kind: ("against_dense", dict(ep=ep, skewed=kind == "skewed")) for kind in ("even", "skewed")}
    for kind, ranks in run_in_turn("tests.dist.experts_cases", ep, cases).items():
        empty, here = ([rank.pop(name) for rank in ranks] for name in ("empty", "here"))
        assert sum(here) == ep * 50 * 2
        if kind == "even":
            assert sum(empty) == 0
        else:
            assert (empty, here[1:]) == (([6], []) if ep == 1 else ([2, 4], [0]))
        for gaps in ranks:
            assert max(gaps.values()) < 1e-11, (kind, gaps)
