"""A sum over ranks that read each other's memory is gloo's sum; where one of them may not, all take gloo."""

from __future__ import annotations

import pytest

from tests.dist.harness import run_ranks


@pytest.mark.parametrize(("unreadable", "short"), [(-1, True), (1, False)])
def test_sums_by_memory(unreadable, short):
    found = run_ranks("tests.dist.reduce_cases:sums", 3, 1_000_001, unreadable, timeout=60)
    assert found == 3 * [{"equal": True, "short way": short}]
