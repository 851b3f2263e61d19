"""Grouped matrix products on a CPU, by oneDNN where it is the faster library.

PyTorch gives float32 products to MKL, and `torch.nn.functional.grouped_mm` on a CPU is one of them after the other. On
an AMD EPYC core MKL reaches 85 to 90 GFLOP/s where oneDNN, which PyTorch carries as well, reaches 110 to 200 on the same
shapes. But oneDNN generates code for every new shape (about 0.4 ms), and the experts' row counts are new in every step:
so it gets the largest multiple of `ROWS` of each group, whose few shapes it has soon seen, and PyTorch gets the rest.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

ROWS = 64
# multiply-adds below which oneDNN's cost of a call, about 10 microseconds, is more than it saves
SMALL = 1 << 20


class GroupedProduct(torch.autograd.Function):
    """`platform.grouped_mm`, one product for each group that has rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        ctx.groups = _groups(ends, x.dtype, weights[0].numel())
        ctx.save_for_backward(x, weights)
        out = x.new_empty(x.shape[0], weights.shape[1])
        for group, start, middle, end in ctx.groups:
            if middle > start:
                out[start:middle] = _linear(x[start:middle], weights[group])
            if end > middle:
                torch.mm(x[middle:end], weights[group].t(), out=out[middle:end])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weights = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x, grad_weights = torch.empty_like(x), torch.zeros_like(weights)
        for group, start, middle, end in ctx.groups:
            weight, grad_weight = weights[group], grad_weights[group]
            if middle > start:
                grad_x[start:middle] = _linear(grad[start:middle], weight.t().contiguous())
                grad_weight.copy_(_linear(grad[start:middle].t(), x[start:middle].t()))
            if end > middle:
                torch.mm(grad[middle:end], weight, out=grad_x[middle:end])
                grad_weight.addmm_(grad[middle:end].t(), x[middle:end])
        return grad_x, grad_weights, None


def _linear(a: Tensor, b: Tensor) -> Tensor:
    """`a [m, k] @ b[n, k].T` by oneDNN; any strides."""
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


def _groups(ends: Tensor, dtype: torch.dtype, weight_size: int) -> list[tuple[int, int, int, int]]:
    """(group, first row, first row that PyTorch multiplies, end) of every group that has rows."""
    groups = []
    for group, (start, end) in enumerate(itertools.pairwise([0, *ends.tolist()])):
        rows = (end - start) // ROWS * ROWS
        if dtype != torch.float32 or rows * weight_size < SMALL:
            rows = 0
        if end > start:
            groups.append((group, start, start + rows, end))
    return groups
