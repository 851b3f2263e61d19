"""Routers under replay: they take the given experts, find their own record, and refuse what does not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megarl import platform

platform.setup()

from megarl.config.schema import Generate  # noqa: E402
from megarl.data import BatchLayout, pack  # noqa: E402
from megarl.errors import RunFailed  # noqa: E402
from megarl.models.generate import spec_of  # noqa: E402
from megarl.models.moe.replay import LIVE, RoutingReplay, RowRouting, expert_dtype  # noqa: E402
from megarl.trainers.failed_step import load_micro_batches, save_micro_batches  # noqa: E402
from megarl.trainers.routing import RoutingWatch  # noqa: E402
from megarl.types import Batch  # noqa: E402

SPEC = replace(spec_of(Generate(num_layers=3, num_experts=3, top_k=2)), moe_layers=(1, 2))
SCORES = torch.tensor([[0.1, 0.9, 0.5], [0.7, 0.2, 0.3]], requires_grad=True)
CONFIG = dict(
    moe_router_fusion=False,
    moe_router_force_load_balancing=False,
    moe_expert_capacity_factor=None,
    moe_router_score_function="softmax",
    moe_router_pre_softmax=False,
)


class Layer(torch.nn.Module):
    """What `RoutingReplay` needs of a transformer layer."""

    def __init__(self, number: int, recomputed: bool, **config) -> None:
        super().__init__()
        router = SimpleNamespace(
            config=SimpleNamespace(**(CONFIG | config)),
            routing_type=config.get("routing_type", "none"),
            expert_bias=None,
            router_replay=None,
        )
        self.layer_number = number + 1
        self.mlp = SimpleNamespace(router=router, moe_layer_recompute=recomputed)


def routing(spec=SPEC, recomputed: bool = False, tp: int = 1, tp_rank: int = 0, name: str = "policy", **config):
    chunk = SimpleNamespace(
        decoder=SimpleNamespace(layers=[Layer(n, recomputed, **config) for n in range(spec.num_layers)])
    )
    return RoutingReplay([chunk], spec, SimpleNamespace(tp=tp, tp_rank=tp_rank), name)


def row(owner: RoutingReplay, experts: list | None) -> RowRouting:
    nothing: list = [None] * len(owner.layers)
    return RowRouting(
        owner, None if experts is None else torch.tensor(experts), nothing, list(nothing), list(nothing), [0, 0]
    )


def ask(owner: RoutingReplay, layer: int, of: RowRouting | None, enter: bool = True) -> list[list[int]]:
    replay = owner.layers[layer]
    if enter:
        replay.enter(None, (), {"packed_seq_params": SimpleNamespace(routing=of)})
    top = lambda scores, k, num_groups, group_topk: torch.topk(scores, k, dim=1)  # noqa: E731
    values, chosen = replay.get_replay_topk(SCORES, 2, default_compute_topk=top)
    assert torch.equal(values, SCORES.gather(1, chosen)) and values.requires_grad == torch.is_grad_enabled()
    return chosen.tolist()


def test_routers_take_the_given_experts_keep_their_gradient_and_record_their_own_choice():
    owner = routing()
    assert [layer.number for layer in owner.layers] == [1, 2]
    assert ask(owner, 0, None) == [[1, 2], [0, 2]]
    given = row(owner, [[[0, 1], [0, 1]], [[2, 0], [LIVE, LIVE]]])
    assert ask(owner, 1, given) == [[2, 0], [0, 2]]
    assert given.chosen[1].tolist() == [[1, 2], [0, 2]] and given.used == [0, 1]
    assert torch.allclose(given.gates[1][0], torch.tensor([0.9, 0.5]).softmax(0))
    with pytest.raises(RunFailed, match="layer 1 of the policy recorded nothing"):
        given.stacked()
    ask(owner, 0, given)
    assert given.stacked().tolist() == [[[1, 2], [0, 2]]] * 2 and given.stacked().dtype == torch.int8


def test_a_layer_computed_again_takes_the_experts_of_its_own_micro_batch():
    owner = routing(recomputed=True)
    first, second = (row(owner, [[x, x], [x, x]]) for x in ([0, 1], [2, 1]))
    ask(owner, 0, first), ask(owner, 0, second)
    with torch.no_grad():
        ask(owner, 0, row(owner, None))  # a pass without a backward leaves nothing behind
    assert owner.layers[0].waiting == 2
    assert ask(owner, 0, None, enter=False) == [[0, 1]] * 2
    with pytest.raises(RunFailed, match="layer 1 of the policy left 1 records unused"):
        owner.finish([first, second], uses=2)
    assert ask(owner, 0, None, enter=False) == [[2, 1]] * 2
    assert first.used == second.used == [2, 0]


def test_every_record_is_used_as_often_as_the_pass_asks_for():
    owner = routing()
    one = row(owner, None)
    ask(owner, 0, one)
    with pytest.raises(RunFailed, match="layer 2 of the policy used its record 0 times in a pass, not 1"):
        owner.finish([one], uses=1)
    ask(owner, 1, one)
    owner.finish([one], uses=1)
    ask(owner, 0, one)
    with pytest.raises(RunFailed, match="layer 1 of the policy used its record 2 times in a pass, not 1"):
        owner.finish([one], uses=1)


def test_a_critic_never_gets_the_experts_of_the_policy():
    policy, critic = routing(), routing(name="critic")
    with pytest.raises(RunFailed, match="layer 1 of the critic got a record of the policy"):
        ask(critic, 0, row(policy, None))


@pytest.mark.parametrize(
    "config, setting",
    [
        (dict(moe_router_fusion=True), "moe_router_fusion"),
        (dict(routing_type="sinkhorn"), "sinkhorn"),
        (dict(moe_expert_capacity_factor=1.0), "moe_expert_capacity_factor"),
        (dict(moe_router_force_load_balancing=True), "moe_router_force_load_balancing"),
    ],
)
def test_a_router_that_would_not_ask_is_refused(config, setting):
    with pytest.raises(RunFailed, match=f"layer 1 of the policy has .*{setting}"):
        routing(**config)


def batch(spec=SPEC, dtype=torch.uint8) -> Batch:
    """Two sequences of 3 and 4 tokens with distinct experts everywhere."""
    generator = torch.Generator().manual_seed(0)
    shape = (7, len(spec.moe_layers), spec.num_experts)
    experts = torch.rand(shape, generator=generator).argsort(dim=2)[:, :, : spec.top_k]
    return Batch(torch.arange(7), torch.tensor([3, 4]), torch.ones(7), routed_experts=experts.to(dtype))


@pytest.mark.parametrize("cp", [1, 2])
@pytest.mark.parametrize("tp", [1, 2])
def test_experts_follow_the_rows_of_their_tokens(cp, tp):
    """Whatever the layout, every token but the last of a sequence brings its own experts, once."""
    whole, seen = batch(), {}
    for cp_rank in range(cp):
        micro = pack(whole, [1, 0], BatchLayout(cp=cp, cp_rank=cp_rank, row_multiple=tp))
        parts = [routing(tp=tp, tp_rank=rank).local(micro) for rank in range(tp)]
        assert all(part.dtype == torch.int8 for part in parts)
        rows = torch.cat(parts, dim=1)
        assert rows.shape == (2, micro.tokens.numel(), 2)
        for place, token in enumerate(micro.tokens.tolist()):
            experts = rows[:, place]
            if micro.held[place] < 0 or micro.targets[place] < 0:
                assert (experts == LIVE).all()
            else:
                seen[token] = experts.tolist()
    assert seen == {t: whole.routed_experts[t].tolist() for t in (0, 1, 3, 4, 5)}


def test_three_hundred_experts_keep_their_numbers():
    spec = replace(SPEC, num_experts=300)
    whole = batch(spec, torch.int16)
    whole.routed_experts[4] = torch.tensor([[299, 256], [0, 255]], dtype=torch.int16)
    micro = pack(whole, [1], BatchLayout())
    local = routing(spec).local(micro)
    assert local.dtype == expert_dtype(300) == torch.int16
    assert local[:, 1].tolist() == [[299, 256], [0, 255]]


def spoiled(change) -> Batch:
    whole = batch()
    return whole.replace(routed_experts=change(whole.routed_experts.clone()))


def out_of_range(experts):
    experts[1, 1, 0] = 3
    return experts


def twice(experts):
    experts[4, 0] = 2
    return experts


@pytest.mark.parametrize(
    "change, message",
    [
        (out_of_range, "layer 2: expert 3 is recorded, and the policy has 3"),
        (twice, r"layer 1: an expert is recorded twice for one token: \[2, 2\]"),
        (lambda experts: experts[:, :1], r"the record is \(7, 1, 2\), and the policy needs \(7, 2, 2\)"),
        (lambda experts: experts[:-1], r"the record is \(6, 2, 2\), and the policy needs \(7, 2, 2\)"),
    ],
)
def test_a_record_that_does_not_fit_is_refused(change, message):
    whole = spoiled(change)
    micro = pack(whole.replace(routed_experts=None), [0, 1], BatchLayout())
    micro.batch = micro.batch.replace(routed_experts=whole.routed_experts)
    with pytest.raises(RunFailed, match=message):
        routing().local(micro)


def test_a_micro_batch_with_a_record_too_few_is_refused():
    owner = routing()
    micro = pack(batch(), [0, 1], BatchLayout())
    micro.experts = owner.local(micro)[:1]
    with pytest.raises(RunFailed, match=r"\(1, 7, 2\) experts for 7 rows of the policy's 2 MoE layers \(1, 2\)"):
        owner.begin(micro, torch.device("cpu"))


def test_a_failed_step_keeps_the_experts_it_replayed(tmp_path: Path):
    pinned, free = pack(batch(), [0], BatchLayout()), pack(batch(), [1], BatchLayout())
    pinned.experts = routing().local(pinned)
    save_micro_batches(tmp_path / "step", [pinned, free])
    one, other = load_micro_batches(tmp_path / "step")
    assert torch.equal(one.experts, pinned.experts) and one.experts.dtype == torch.int8
    assert other.experts is None


@pytest.mark.parametrize("rank", [0, 1])
def test_watched_rows_divide_over_sequence_parallel_ranks(rank):
    """The all-gather dispatcher wants equal rows, 3 and 4 tokens here, and tp=4 ranks a multiple of 4."""
    layout = BatchLayout(dp=2, dp_rank=rank, row_multiple=4, equal_rows=True)
    whole = Batch(torch.arange(11), torch.tensor([5, 6]), torch.ones(11))
    watch = RoutingWatch(SimpleNamespace(layout=layout), None, tokens=8, most_changed=0.3)
    assert len(watch._choose(whole).tokens) == 8
