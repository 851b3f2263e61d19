"""Gated experts by two grouped matrix products."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megarl import platform

ALIGNMENT = 16  # bytes


def gated_experts(
    x: Tensor, weight1: Tensor, weight2: Tensor, ends: Tensor, probs: Tensor, rows: Tensor | None
) -> Tensor:
    """See `platform.gated_experts`."""
    own = x if rows is None else platform.take_rows(x, rows)
    first, second = (getattr(weight, "product", grouped_mm) for weight in (weight1, weight2))
    out = second(WeightedSwiGLU.apply(first(own, weight1.flatten(1, 2), ends), probs), weight2, ends)
    return out if rows is None else platform.sum_rows(out, rows, len(x))


def grouped_mm(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Rows `ends[e-1]:ends[e]` of `x [rows, K]` times `weights[e].T`, `weights [E, N, K]`: `[rows, N]`.

    PyTorch's grouped product knows no float64 and wants rows of whole `ALIGNMENT`s; others go expert by expert.
    """
    if x.shape[0] == 0:  # no backward for zero rows, and every rank must still produce a gradient
        return x @ weights.sum(0).t()
    aligned = not any(size * x.element_size() % ALIGNMENT for size in weights.shape[1:])
    if aligned and x.dtype is not torch.float64:
        return F.grouped_mm(x, weights.transpose(1, 2), offs=ends)
    sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
    return torch.cat([rows @ weight.t() for rows, weight in zip(x.split(sizes), weights, strict=True)])


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor, ends: Tensor) -> Tensor:
    """See `platform.grouped_linear`."""
    counts = torch.diff(ends, prepend=ends.new_zeros(1)).long()
    return grouped_mm(x, weight, ends) + bias.repeat_interleave(counts, dim=0, output_size=len(x))


class WeightedSwiGLU(torch.autograd.Function):
    """`silu(gate) * up * prob` of `[n, 2F]` and `[n]`, with a backward that writes both halves into one tensor.

    PyTorch's own operators work on strided halves and copy their gradients together again.
    """

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, probs: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        ctx.save_for_backward(gate_up, probs)
        return F.silu(gate).mul_(up).mul_(probs[:, None])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate_up, probs = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        sigmoid = gate.sigmoid()
        silu = gate * sigmoid
        out = torch.empty_like(gate_up)
        grad_gate, grad_up = out.chunk(2, dim=-1)
        through_gate = grad * up
        grad_probs = torch.linalg.vecdot(through_gate, silu)
        torch.mul(grad, silu, out=grad_up)
        grad_up.mul_(probs[:, None])
        slope = silu.addcmul_(silu, sigmoid, value=-1).add_(sigmoid)  # d silu = sigmoid + silu (1 - sigmoid)
        torch.mul(through_gate.mul_(probs[:, None]), slope, out=grad_gate)
        return out, grad_probs
