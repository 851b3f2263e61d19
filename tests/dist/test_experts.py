"""No token is dropped, however skewed the routing; an expert, or a whole rank, may have none."""

from __future__ import annotations

import pytest

from tests.dist.harness import run_ranks

CASE = "tests.dist.experts_cases:against_dense"


@pytest.mark.parametrize("ep", [1, 2])
@pytest.mark.parametrize("skewed", [False, True])
def test_a_layer_is_the_dense_definition(ep, skewed):
    ranks = run_ranks(CASE, ep, ep, skewed)
    empty, here = ([rank.pop(name) for rank in ranks] for name in ("empty", "here"))
    assert sum(here) == ep * 50 * 2
    assert (empty, here[1:]) == (([6], []) if ep == 1 else ([2, 4], [0])) if skewed else sum(empty) == 0
    for gaps in ranks:
        assert max(gaps.values()) < 1e-11, gaps
