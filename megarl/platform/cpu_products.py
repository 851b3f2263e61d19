"""Matrix products on a CPU, by oneDNN where it is the faster library.

PyTorch gives float32 products to MKL. On an AMD EPYC core MKL reaches 85 to 120 GFLOP/s where oneDNN, which PyTorch
carries as well, reaches 110 to 270 on the same shapes. But oneDNN generates code for every new shape (0.15 to 0.4 ms): a
dense layer's product is one shape a step and gets its rows as they are, the experts' come in pieces of few sizes.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# an expert's piece has a multiple of ROWS rows and at most BLOCK: its intermediates then stay in a core's cache
ROWS, BLOCK = 16, 512
# multiply-adds below which oneDNN's cost of a call, about 10 microseconds, is more than it saves
SMALL = 1 << 20
# bytes from which memory is asked for in large pages: what `cpu.LARGEST_KEPT` keeps comes back without a fault
HUGE = 32 << 20


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
    """`platform.gated_experts`, a piece of one expert's rows at a time from the tokens to their results.

    The tokens of a piece are gathered when it needs them and its results added to theirs at once, so that no tensor of
    all dispatched rows, top-k times the size of `x`, comes to be. A piece is rounded up to `ROWS` rows by rows of its
    neighbours, whose results are dropped and whose part in the weight gradients is multiplied by 0.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight1: Tensor, weight2: Tensor, ends: Tensor, probs: Tensor, rows: Tensor
    ) -> Tensor:
        ctx.pieces = list(_pieces(ends))
        out = torch.zeros_like(x, dtype=_sum_dtype(x))
        gate_ups = []
        for piece in ctx.pieces:
            gate_up = product(x.index_select(0, rows[piece.all]), weight1[piece.expert])
            gate, up = gate_up.chunk(2, dim=-1)
            activated = F.silu(gate).mul_(up).mul_(probs[piece.all, None])
            piece.add(product(activated, weight2[piece.expert]), rows, out)
            gate_ups.append(gate_up)
        ctx.save_for_backward(x, weight1, weight2, probs, rows, *gate_ups)
        return out.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, Tensor, None]:
        x, weight1, weight2, probs, rows, *gate_ups = ctx.saved_tensors
        grad_x, grad_probs = torch.zeros_like(x, dtype=_sum_dtype(x)), torch.empty_like(probs)
        grad1, grad2 = _empty_like(weight1), _empty_like(weight2)
        begun: set[int] = set()
        for piece, gate_up in zip(ctx.pieces, gate_ups, strict=True):
            grad_out = grad.index_select(0, rows[piece.all])
            prob = torch.zeros_like(probs[piece.all])
            prob[piece.own] = probs[piece.start : piece.end]
            prob = prob[:, None]
            gate, up = gate_up.chunk(2, dim=-1)
            sigmoid = gate.sigmoid()
            silu = gate * sigmoid
            plain = silu * up
            grad_activated = product(grad_out, weight2[piece.expert].t())
            grad_probs[piece.start : piece.end] = torch.linalg.vecdot(grad_activated, plain)[piece.own]
            part2 = product(grad_out.t(), plain.mul_(prob).t())
            grad_activated.mul_(prob)
            grad_gate_up = torch.empty_like(gate_up)
            grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
            torch.mul(grad_activated, silu, out=grad_up)
            slope = silu.addcmul_(silu, sigmoid, value=-1).add_(sigmoid)  # d silu = sigmoid + silu (1 - sigmoid)
            torch.mul(grad_activated.mul_(up), slope, out=grad_gate)
            part1 = product(grad_gate_up.t(), x.index_select(0, rows[piece.all]).t())
            for whole, part in ((grad1, part1), (grad2, part2)):
                if piece.expert in begun:
                    whole[piece.expert] += part
                else:
                    whole[piece.expert] = part
            begun.add(piece.expert)
            piece.add(product(grad_gate_up, weight1[piece.expert].t()), rows, grad_x)
        for expert in set(range(len(weight1))) - begun:
            grad1[expert] = 0
            grad2[expert] = 0
        return grad_x.to(x.dtype), grad1, grad2, None, grad_probs, None


def _empty_like(weight: Tensor) -> Tensor:
    """In pages of 2 MiB where the kernel has them: the gradient of many experts is above what malloc keeps, and to get
    64 MiB page by page takes 27 ms, more than a tenth of a whole layer's time."""
    out = torch.empty_like(weight)
    if out.nbytes >= HUGE:
        start = -(-out.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        size = out.data_ptr() + out.nbytes - start
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_HUGEPAGE)
    return out


def _sum_dtype(x: Tensor) -> torch.dtype:
    """A token's results are added up in at least float32."""
    return torch.promote_types(x.dtype, torch.float32)


class _Piece(NamedTuple):
    """Dispatched rows `start:end` belong to `expert`; computed are `first:last`, which hold them."""

    expert: int
    start: int
    end: int
    first: int
    last: int

    @property
    def all(self) -> slice:
        return slice(self.first, self.last)

    @property
    def own(self) -> slice:
        return slice(self.start - self.first, self.end - self.first)

    def add(self, results: Tensor, rows: Tensor, out: Tensor) -> None:
        """Add the own ones of the `results` computed to the tokens in `out`."""
        out.index_add_(0, rows[self.start : self.end], results[self.own].to(out.dtype))


def _pieces(ends: Tensor) -> Iterator[_Piece]:
    """Equal parts of each expert's rows, none above `BLOCK`."""
    borders = [0, *ends.tolist()]
    for expert, (start, end) in enumerate(itertools.pairwise(borders)):
        size = -(-(end - start) // max(1, -(-(end - start) // BLOCK)))
        size = -(-size // ROWS) * ROWS
        for at in range(start, end, size or 1):
            last = min(at + size, borders[-1])
            yield _Piece(expert, at, min(at + size, end), max(0, last - size), last)
