"""Linear layers of experts with biases on a CPU."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor


class GroupedLinear(torch.autograd.Function):
    """See `platform.grouped_linear`; `ends` as a list."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, ends: list[int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.ends = ends
        out = x.new_empty(len(x), weight.shape[1])
        for expert, own in _slices(ends):
            torch.addmm(bias[expert], x[own], weight[expert].t(), out=out[own])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
        grad_bias = grad.new_empty(weight.shape[:2])
        for expert, own in _slices(ctx.ends):  # of an expert without rows the products are 0
            torch.mm(grad[own], weight[expert], out=grad_x[own])
            torch.mm(grad[own].t(), x[own], out=grad_weight[expert])
            torch.sum(grad[own], dim=0, out=grad_bias[expert])
        return grad_x, grad_weight, grad_bias, None


def _slices(ends: list[int]) -> list[tuple[int, slice]]:
    return [(expert, slice(*borders)) for expert, borders in enumerate(itertools.pairwise([0, *ends]))]
