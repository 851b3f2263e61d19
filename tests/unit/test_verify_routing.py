"""`verify routing`: which disagreements of engine and learner are near-ties, and which layer is to blame."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megarl import platform

platform.setup()

from megarl.config.schema import Config, Model, Rollout  # noqa: E402
from megarl.data import BatchLayout, pack  # noqa: E402
from megarl.types import Batch  # noqa: E402
from megarl.verify.routing import RoutingCheck, budget  # noqa: E402

ROWS = 10  # and one that is never routed


def compare(margin: float = 1.0, live: int = 0, given: int = 0, dtype: str = "float32", most: float = 0.3):
    """Lines and problems when row 3 of layer 5 has `live` other experts than recorded, and `given` with this margin."""
    recorded = torch.tensor([0, 1]).repeat(2, ROWS + 1, 1)
    recorded[:, -1] = -1

    def routing(changed: int) -> SimpleNamespace:
        chosen = torch.tensor([0, 1]).repeat(2, ROWS + 1, 1)
        chosen[1, 3, :changed] += 2
        return SimpleNamespace(stacked=lambda: chosen, margins=[torch.full((ROWS + 1,), margin)] * 2)

    mesh = SimpleNamespace(pp=1, tp=1, tp_rank=0, all_gather_object=lambda x: [x])
    layers = [SimpleNamespace(number=number) for number in (2, 5)]
    spec = SimpleNamespace(top_k=2, moe_layers=(2, 5))
    policy = SimpleNamespace(spec=spec, mesh=mesh, routing=SimpleNamespace(layers=layers))
    whole = Batch(torch.arange(ROWS + 1), torch.tensor([ROWS + 1]), torch.ones(ROWS + 1))
    check = RoutingCheck(Config(model=Model(path="none"), rollout=Rollout(dtype=dtype)), policy, [pack(whole, [0])])
    check.most_changed = most
    return check.compare([recorded], [routing(live)], [routing(given)])


def test_equal_routing():
    lines, problems = compare()
    assert problems == []
    assert [line.split() for line in lines[1:3]] == [[n, "0.00%", "0.00%", "0", "of", "10"] for n in ("2", "5")]


def test_a_near_tie_is_counted_and_shown():
    lines, problems = compare(margin=2e-6, live=1, given=1)
    assert problems == []
    assert lines[2].split() == ["5", "5.00%", "10.00%", "1", "of", "10:", "2.0e-06"]
    assert lines[-1] == "tokens with any difference: 10.00%; 1 disagreements are near-ties (below 1e-05)"


@pytest.mark.parametrize("margin, changed", [(2e-3, 1), (2e-6, 2)])
def test_anything_else_is_a_problem_of_its_layer(margin, changed):
    _, problems = compare(margin, live=changed, given=changed)
    assert len(problems) == 1 and problems[0].startswith("layer 5: 1 of 10 tokens took other experts in the engine")


@pytest.mark.parametrize("live, given", [(1, 0), (0, 1)])
def test_what_follows_from_another_layer_is_none(live, given):
    assert compare(2e-3, live, given)[1] == []


def test_half_precision_is_measured_against_the_largest_share():
    assert compare(2e-3, 2, 2, "bfloat16")[1] == []
    (problem,) = compare(2e-3, 2, 2, "bfloat16", most=0.05)[1]
    assert problem.startswith("layer 5: 10% of the engine's experts are not the learner's (rl.max_routing_mismatch = 5%)")


def test_a_few_micro_batches_hold_the_longest_sequence():
    batch = Batch(torch.arange(47), torch.tensor([40, 3, 4]), torch.ones(47))
    assert budget(batch, BatchLayout(row_multiple=16)) == 48
    assert budget(batch.select([1, 2]), BatchLayout()) == 4
