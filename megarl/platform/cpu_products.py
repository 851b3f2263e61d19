"""Matrix products on a CPU, by oneDNN where it is the faster library.

PyTorch gives float32 products to MKL. On an AMD EPYC core MKL reaches 85 to 120 GFLOP/s where oneDNN, which PyTorch
carries as well, reaches 110 to 270 on the same shapes. But oneDNN generates code for every new shape (0.15 to 0.4 ms): a
dense layer's product is one shape a step and gets its rows as they are, the experts' come in pieces of few sizes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# an expert's piece has a multiple of ROWS rows and at most BLOCK: its intermediates then stay in a core's cache
ROWS, BLOCK = 16, 512
# multiply-adds below which oneDNN's cost of a call, about 10 microseconds, is more than it saves
SMALL = 1 << 20


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a [.., K] @ b[N, K].T`, any strides; not differentiable."""
    if a.dtype == torch.float32:
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return a @ b.t()


def suits(x: Tensor, weight: Tensor) -> bool:
    """Whether `Linear` is faster than PyTorch's own product of these."""
    return x.dtype == weight.dtype == torch.float32 and x.numel() * weight.shape[0] >= SMALL


class Linear(torch.autograd.Function):
    """`x [.., K] @ weight[N, K].T`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor]:
        x, weight = ctx.saved_tensors
        grad_x = product(grad, weight.t()) if ctx.needs_input_grad[0] else None
        rows, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        return grad_x, product(grads.t(), rows.t())


class GatedExperts(torch.autograd.Function):
    """`platform.gated_experts`, a piece of one expert's rows at a time through both products and the activation.

    A piece is rounded up to `ROWS` rows by rows of its neighbours, whose results are dropped and whose part in the weight
    gradients is multiplied by 0.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight1: Tensor, weight2: Tensor, ends: Tensor, probs: Tensor) -> Tensor:
        ctx.pieces = list(_pieces(ends))
        out = torch.empty_like(x)
        gate_ups = []
        for piece in ctx.pieces:
            gate_up = product(x[piece.first : piece.last], weight1[piece.expert])
            gate, up = gate_up.chunk(2, dim=-1)
            activated = F.silu(gate).mul_(up).mul_(probs[piece.first : piece.last, None])
            out[piece.start : piece.end] = product(activated, weight2[piece.expert])[piece.own]
            gate_ups.append(gate_up)
        ctx.save_for_backward(x, weight1, weight2, probs, *gate_ups)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, Tensor]:
        x, weight1, weight2, probs, *gate_ups = ctx.saved_tensors
        grad_x, grad_probs = torch.empty_like(x), torch.empty_like(probs)
        grad1, grad2 = torch.zeros_like(weight1), torch.zeros_like(weight2)
        for piece, gate_up in zip(ctx.pieces, gate_ups, strict=True):
            rows = slice(piece.first, piece.last)
            prob = torch.zeros_like(probs[rows])
            prob[piece.own] = probs[piece.start : piece.end]
            prob = prob[:, None]
            gate, up = gate_up.chunk(2, dim=-1)
            sigmoid = gate.sigmoid()
            silu = gate * sigmoid
            plain = silu * up
            grad_activated = product(grad[rows], weight2[piece.expert].t())
            grad_probs[piece.start : piece.end] = torch.linalg.vecdot(grad_activated, plain)[piece.own]
            grad2[piece.expert] += product(grad[rows].t(), plain.mul_(prob).t())
            grad_activated.mul_(prob)
            grad_gate_up = torch.empty_like(gate_up)
            grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
            torch.mul(grad_activated, silu, out=grad_up)
            slope = silu.addcmul_(silu, sigmoid, value=-1).add_(sigmoid)  # d silu = sigmoid + silu (1 - sigmoid)
            torch.mul(grad_activated.mul_(up), slope, out=grad_gate)
            grad1[piece.expert] += product(grad_gate_up.t(), x[rows].t())
            grad_x[piece.start : piece.end] = product(grad_gate_up, weight1[piece.expert].t())[piece.own]
        return grad_x, grad1, grad2, None, grad_probs


class _Piece(NamedTuple):
    """Rows `start:end` belong to `expert`; computed are `first:last`, which hold them."""

    expert: int
    start: int
    end: int
    first: int
    last: int

    @property
    def own(self) -> slice:
        return slice(self.start - self.first, self.end - self.first)


def _pieces(ends: Tensor) -> Iterator[_Piece]:
    """Equal parts of each expert's rows, none above `BLOCK`."""
    borders = [0, *ends.tolist()]
    for expert, (start, end) in enumerate(itertools.pairwise(borders)):
        size = -(-(end - start) // max(1, -(-(end - start) // BLOCK)))
        size = -(-size // ROWS) * ROWS
        for at in range(start, end, size or 1):
            last = min(at + size, borders[-1])
            yield _Piece(expert, at, min(at + size, end), max(0, last - size), last)
