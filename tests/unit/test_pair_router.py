"""The router that gives pairs, against Megatron's that gives maps: the same numbers and gradients to the last bit."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megarl import platform

platform.setup()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection  # noqa: E402
from megatron.core.transformer.moe.router import TopKRouter  # noqa: E402

from megarl.config.schema import Model, Parallel  # noqa: E402
from megarl.models.build import transformer_config  # noqa: E402
from megarl.models.moe.groups import GroupLimited  # noqa: E402
from megarl.models.moe.layer import LocalDispatcher  # noqa: E402
from megarl.models.moe.pair_router import PairRouter  # noqa: E402
from megarl.models.spec import ModelSpec, Rope  # noqa: E402
from megarl.parallel import Mesh  # noqa: E402

SPEC = ModelSpec("qwen3_moe", 1, 16, 2, 2, 8, 32, 12, 8, Rope(1e4, 8), 1e-6, False, moe_layers=(0,), num_experts=12, top_k=3)
KINDS = {
    "after": dict(norm_topk_prob=True),
    "before": dict(norm_topk_prob=False),
    "scaled": dict(norm_topk_prob=False, router_scaling=2.5),
    "sigmoid": dict(router_score="sigmoid"),
    "biased": dict(router_score="sigmoid", selection_bias=True, router_scaling=1.5),
    "one": dict(router_score="sigmoid", selection_bias=True, top_k=1),
    "groups": dict(router_score="sigmoid", selection_bias=True, router_groups=4, router_top_groups=2, group_score="top2"),
}


@pytest.fixture(scope="module")
def mesh():
    yield Mesh.build(Parallel())
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("aux", [0.0, 0.1])
@pytest.mark.parametrize("kind", KINDS)
def test_pairs_are_those_of_the_maps(mesh, kind, aux, dtype):
    spec = replace(SPEC, **KINDS[kind])
    config = transformer_config(spec, Model(path="", dtype=dtype), mesh, Parallel(), aux)
    torch.manual_seed(0)
    theirs, mine = (kind_of(config, get_default_pg_collection()).to(config.params_dtype) for kind_of in (TopKRouter, PairRouter))
    mine.load_state_dict(theirs.state_dict())
    hidden = torch.randn(40, 1, 16, dtype=config.params_dtype, requires_grad=True)
    for router in (theirs, mine):
        torch.nn.init.normal_(router.weight)
        router.set_layer_number(1)
        if spec.selection_bias:
            router._maintain_float32_expert_bias()
            router.expert_bias.copy_(torch.linspace(-0.3, 0.3, 12))
        if spec.router_groups > 1:
            router.router_replay = GroupLimited(spec)
    mine.weight.data.copy_(theirs.weight.data)
    (probs, chosen_map), (gates, chosen) = theirs(hidden), mine(hidden)
    assert torch.equal(torch.zeros_like(chosen_map).scatter(1, chosen, True), chosen_map)
    assert torch.equal(probs.gather(1, chosen), gates)
    assert gates.dtype == probs.dtype
    weights = torch.randn_like(probs)
    gradients = [
        torch.autograd.grad((out * weight).sum(), (hidden, router.weight))
        for out, weight, router in ((probs, weights, theirs), (gates, weights.gather(1, chosen), mine))
    ]
    for one, other in zip(*gradients, strict=True):
        assert one.abs().max() > 0
        # sums over k and over all E numbers, most of them 0, are rounded differently
        assert torch.allclose(one, other, rtol=0, atol=4 * torch.finfo(one.dtype).eps * float(one.abs().max()))


def test_pairs_are_sorted_by_expert_and_token():
    dispatcher = object.__new__(LocalDispatcher)
    dispatcher.config = SimpleNamespace(num_moe_experts=300)
    chosen = torch.stack([torch.randperm(300)[:8] for _ in range(50)])
    chosen[chosen == 7] = 299  # nobody's expert
    gates = torch.rand(50, 8)
    hidden = torch.randn(50, 1, 4)
    dispatcher.dispatch_preprocess(hidden, chosen, gates)
    flat, (counts, rows), weights = dispatcher.dispatch_postprocess(hidden.view(50, 4), gates)
    experts = torch.arange(300).repeat_interleave(counts)
    expected = sorted((e, t, gates[t, i].item()) for t, row in enumerate(chosen.tolist()) for i, e in enumerate(row))
    assert list(zip(experts.tolist(), rows.tolist(), weights.tolist(), strict=True)) == expected
    assert counts[7] == 0 and len(flat) == 50
