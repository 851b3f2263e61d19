"""Hand-written backward passes against finite differences, in float64 where the code allows it."""

from __future__ import annotations

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
    rotary = _rotary(torch.arange(6) * 3, 8, 10_000.0)
    x = torch.randn(6, 2, 3, 8, requires_grad=True)
    cos, sin = (part[:, None, None] for part in rotary)
    first, second = x.chunk(2, -1)
    expected = x * cos + torch.cat([-second, first], -1) * sin
    weights = torch.randn_like(expected)
    (mine,) = torch.autograd.grad((_rotate(x, rotary) * weights).sum(), x)
    (plain,) = torch.autograd.grad((expected * weights).sum(), x)
    assert torch.allclose(_rotate(x, rotary), expected, atol=1e-6, rtol=0)
    assert torch.allclose(mine, plain, atol=1e-6, rtol=0)
