"""A weight sync that went wrong stops the run and names the tensors."""

from __future__ import annotations

import pytest

from tests.dist.harness import run_ranks


@pytest.mark.parametrize(
    "layer_skipped, named",
    [
        (False, "experts.gate_proj/up_proj/down_proj in layer 1 (experts 2, 5)"),
        (True, "self_attn.o_proj in layer 0"),
    ],
)
def test_the_run_stops_with_the_tensor_family_named(branch, layer_skipped, named):
    ranks = run_ranks("tests.e2e.cases:train_with_broken_sync", 2, str(branch.config), layer_skipped)
    for text in ranks:
        assert text.startswith("weight sync: learner and engine log-probs differ")
        assert text.endswith(f"these tensors differ: {named}")
