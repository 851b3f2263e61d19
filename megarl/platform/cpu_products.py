"""Matrix products on a CPU, by oneDNN where it is the faster library.

PyTorch gives float32 products to MKL, which is slow on processors of other makers: on an AMD EPYC core 85 to 90 GFLOP/s
where oneDNN, which PyTorch carries as well, reaches 150 to 220 on the same shapes. `torch.nn.functional.grouped_mm` on a
CPU is a loop over MKL products.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

# multiply-adds below which oneDNN's cost of a call, about 10 microseconds, is more than it saves
SMALL = 1 << 20


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a [m, k] @ b[n, k].T`; any strides."""
    if a.dtype != torch.float32 or a.shape[0] * b.numel() < SMALL:
        return a @ b.t()
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


class GroupedProduct(torch.autograd.Function):
    """`platform.grouped_mm` as one product for each group that has rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        ctx.groups = _groups(ends)
        ctx.save_for_backward(x, weights)
        out = x.new_empty(x.shape[0], weights.shape[1])
        for group, rows in ctx.groups:
            out[rows] = product(x[rows], weights[group])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weights = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x, grad_weights = torch.empty_like(x), torch.zeros_like(weights)
        for group, rows in ctx.groups:
            grad_x[rows] = product(grad[rows], weights[group].t())
            grad_weights[group] = product(grad[rows].t(), x[rows].t())
        return grad_x, grad_weights, None


def _groups(ends: Tensor) -> list[tuple[int, slice]]:
    bounds = itertools.pairwise([0, *ends.tolist()])
    return [(group, slice(start, end)) for group, (start, end) in enumerate(bounds) if end > start]
