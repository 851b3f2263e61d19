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
        return torch.ops.mkldnn._linear_pointwise(_dense(a), _dense(b), None, "none", [], "")
    return a @ b.t()


def _dense(x: Tensor) -> Tensor:
    """A part of wider rows, whose product oneDNN takes a thousand times longer for, copied; a transpose as it is."""
    return x if x.is_contiguous() or (x.ndim == 2 and x.t().is_contiguous()) else x.contiguous()


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
        # oneDNN's left operand is copied in order: the narrower one
        narrow = grads.shape[1] <= rows.shape[1]
        return grad_x, product(grads.t(), rows.t()) if narrow else product(rows.t(), grads.t()).t()


class GatedExperts(torch.autograd.Function):
    """`platform.gated_experts`, a piece of one expert's rows at a time from the tokens to their results.

    The tokens of a piece are gathered when it needs them and its results added to theirs at once, so that no tensor of
    all dispatched rows, top-k times the size of `x`, comes to be. A piece is rounded up to `ROWS` rows by pairs of
    probability 0, which add nothing to any result or gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight1: Tensor, weight2: Tensor, ends: Tensor, probs: Tensor, rows: Tensor
    ) -> Tensor:
        ctx.pieces, ctx.place = pieces, place = _pieces(ends)
        total = sum(pieces.sizes)
        rows = rows.new_zeros(total).scatter_(0, place, rows)
        probs = probs.new_zeros(total).scatter_(0, place, probs)
        out = torch.zeros_like(x, dtype=_sum_dtype(x))
        weights1, weights2 = weight1.flatten(1, 2).unbind(), weight2.unbind()
        gate_ups = []
        for expert, index, prob in pieces.of(rows, probs[:, None]):
            gate_up = product(x.index_select(0, index), weights1[expert])
            gate, up = gate_up.chunk(2, dim=-1)
            activated = F.silu(gate).mul_(up).mul_(prob)
            out.index_add_(0, index, product(activated, weights2[expert]).to(out.dtype))
            gate_ups.append(gate_up)
        ctx.save_for_backward(x, weight1, weight2, probs, rows, *gate_ups)
        return out.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, Tensor, None]:
        x, weight1, weight2, probs, rows, *gate_ups = ctx.saved_tensors
        grad_x, grad_probs = torch.zeros_like(x, dtype=_sum_dtype(x)), torch.empty_like(probs)
        weights1, weights2 = weight1.flatten(1, 2).unbind(), weight2.unbind()
        grad1, grad2 = _WeightGradient(weight1), _WeightGradient(weight2)
        parts = ctx.pieces.of(rows, probs[:, None], grad_probs)
        for (expert, index, prob, grad_prob), gate_up in zip(parts, gate_ups, strict=True):
            grad_out = grad.index_select(0, index)
            gate, up = gate_up.chunk(2, dim=-1)
            silu = F.silu(gate)
            plain = silu * up
            through = product(grad_out, weights2[expert].t())  # the gradient of `activated`, then further back in place
            torch.sum(through * plain, dim=-1, out=grad_prob)
            grad2.add(expert, product(grad_out.t(), plain.mul_(prob).t()))
            grad_gate_up = torch.empty_like(gate_up)
            grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
            torch.mul(through.mul_(prob), silu, out=grad_up)
            torch.ops.aten.silu_backward.grad_input(through.mul_(up), gate, grad_input=grad_gate)
            grad1.add(expert, product(grad_gate_up.t(), x.index_select(0, index).t()))
            grad_x.index_add_(0, index, product(grad_gate_up, weights1[expert].t()).to(grad_x.dtype))
        return grad_x.to(x.dtype), grad1.finish(), grad2.finish(), None, grad_probs.index_select(0, ctx.place), None


class _WeightGradient:
    """Where the pieces' parts of an expert weight's gradient are added up.

    That is Megatron's buffer when the weight has its place in it: autograd then gets a tensor that nobody reads, and no
    second copy of all experts is written, read and added.
    """

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight
        self._in_buffer = hasattr(weight, "grad_added_to_main_grad")
        self._sum = weight.main_grad if self._in_buffer else _empty_like(weight)
        self._experts = self._sum.flatten(1, -2).unbind()
        self._begun = [self._in_buffer] * len(weight)

    def add(self, expert: int, part: Tensor) -> None:
        if self._begun[expert]:
            self._experts[expert].add_(part)
        else:
            self._experts[expert].copy_(part)
            self._begun[expert] = True

    def finish(self) -> Tensor:
        """What the backward returns."""
        if self._in_buffer:
            self._weight.grad_added_to_main_grad = True
            return torch.empty_like(self._weight)
        for expert, begun in zip(self._experts, self._begun, strict=True):
            if not begun:
                expert.zero_()
        return self._sum


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


class _Pieces(NamedTuple):
    """Padded pieces of the dispatched rows in order: whose they are and how many rows each has."""

    experts: list[int]
    sizes: list[int]

    def of(self, *tensors: Tensor) -> Iterator[tuple]:
        """Each piece's expert and its rows of tensors that are padded."""
        return zip(self.experts, *(tensor.split(self.sizes) for tensor in tensors), strict=True)


def _pieces(ends: Tensor) -> tuple[_Pieces, Tensor]:
    """Equal parts of each expert's rows, none above `BLOCK`; and where among their padded rows each row is."""
    experts, sizes, counts = [], [], []
    for expert, (start, end) in enumerate(itertools.pairwise([0, *ends.tolist()])):
        number = -(-(end - start) // BLOCK)
        size = -(-(end - start) // max(number, 1))
        for at in range(start, end, size or 1):
            experts.append(expert)
            counts.append(min(size, end - at))
            sizes.append(-(-size // ROWS) * ROWS)
    counted, padded = torch.tensor(counts, dtype=torch.int64), torch.tensor(sizes, dtype=torch.int64)
    shift = (padded - counted).cumsum(0) - (padded - counted)
    place = torch.arange(sum(counts)) + shift.repeat_interleave(counted)
    return _Pieces(experts, sizes), place
