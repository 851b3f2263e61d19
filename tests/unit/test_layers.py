"""Hand-written backward passes against finite differences, in float64 where the code allows it."""

from __future__ import annotations

import pytest
import torch

from megarl import platform

platform.setup()

from megarl.models.layers.torch_layers import _rotate  # noqa: E402
from megarl.models.moe.experts import _WeightedSwiGLU  # noqa: E402
from megarl.models.packing_params import _rotary  # noqa: E402


def test_weighted_swiglu_and_its_gradient():
    torch.manual_seed(0)
    gate_up = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    probs = torch.rand(5, dtype=torch.float64, requires_grad=True)
    gate, up = gate_up.chunk(2, -1)
    expected = torch.nn.functional.silu(gate) * up * probs[:, None]
    assert torch.allclose(_WeightedSwiGLU.apply(gate_up, probs), expected, atol=1e-14, rtol=0)
    assert torch.autograd.gradcheck(_WeightedSwiGLU.apply, (gate_up, probs))


def test_rotary_and_its_gradient():
    torch.manual_seed(0)
    rotary = _rotary(torch.arange(6) * 3, 8, 10_000.0, torch.float32)
    x = torch.randn(6, 2, 3, 8, requires_grad=True)
    cos, sin = (part[:, None, None] for part in rotary)
    first, second = x.chunk(2, -1)
    expected = x * cos + torch.cat([-second, first], -1) * sin
    weights = torch.randn_like(expected)
    (mine,) = torch.autograd.grad((_rotate(x, rotary) * weights).sum(), x)
    (plain,) = torch.autograd.grad((expected * weights).sum(), x)
    assert torch.allclose(_rotate(x, rotary), expected, atol=1e-6, rtol=0)
    assert torch.allclose(mine, plain, atol=1e-6, rtol=0)


# oneDNN takes 256 of 300 rows, or all of 512; PyTorch the rest
@pytest.mark.parametrize("counts", [[3, 0, 5], [300, 0, 5], [512, 0, 70], [0, 0, 0]])
def test_grouped_mm_and_its_gradients(counts):
    torch.manual_seed(0)
    x = torch.randn(sum(counts), 96, requires_grad=True)
    weights = torch.randn(3, 64, 96, requires_grad=True)
    out = platform.grouped_mm(x, weights, torch.tensor(counts).cumsum(0).to(torch.int32))
    parts = zip(x.double().split(counts), weights.double(), strict=True)
    expected = torch.cat([rows @ weight.t() for rows, weight in parts])
    assert torch.allclose(out.double(), expected, atol=1e-4, rtol=0)
    upstream = torch.randn_like(out)
    mine = torch.autograd.grad(out, (x, weights), upstream)
    plain = torch.autograd.grad(expected, (x, weights), upstream.double())
    assert all(torch.allclose(a, b, atol=5e-4, rtol=0) for a, b in zip(mine, plain, strict=True))
    assert not mine[1][1].any()  # an expert without a token


def test_chunks_are_sorted_unless_they_are():
    from megatron.core.transformer.moe.token_dispatcher import sort_chunks_by_idxs

    tokens, probs, sizes = torch.arange(12.0).view(6, 2), torch.arange(6.0), torch.tensor([1, 2, 3])
    same, same_probs = sort_chunks_by_idxs(tokens, sizes, torch.tensor([0, 1, 2]), probs=probs)
    assert same is tokens and same_probs is probs
    turned, turned_probs = sort_chunks_by_idxs(tokens, sizes, torch.tensor([2, 0, 1]), probs=probs)
    assert turned_probs.tolist() == [3, 4, 5, 0, 1, 2] and torch.equal(turned, tokens[[3, 4, 5, 0, 1, 2]])
