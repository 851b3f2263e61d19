"""Log-probabilities and entropy from hidden states, vocabulary-parallel, without ever holding all logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megarl import platform


def linear_log_probs(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, group: ProcessGroup, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Of each row's distribution `softmax(weight @ hidden / temperature)`: log-prob of its target, and entropy.

    hidden `[n, H]`, the same on every rank of `group`; weight `[V/tp, H]`, this rank's rows of the output layer, those
    at or beyond `vocab_size` being padding without mass; targets `[n]` int64. Returns log-probs `[n]` (differentiable)
    and entropy `[n]` in nats (no gradient), in float32, or float64 for a float64 model. The gradient of `hidden` is
    this rank's part of a sum over `group`. `n` is the same on every rank and may be 0.

    Products are in the precision of `hidden`; a weight of another one is converted block by block.

    Logits exist a block of columns at a time and are computed again in the backward pass, unless one block holds them
    all. Blocks of columns and not of rows, because then each gradient of `weight` is one product over all rows: exact
    in any precision, without a second tensor of the weight's size to add up in.
    """
    return _LinearLogProbs.apply(hidden, weight, targets, vocab_size, group, temperature)


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        vocab_size: int,
        group: ProcessGroup,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        rows, dtype = hidden.shape[0], _softmax_dtype(hidden)
        first = group.rank() * weight.shape[0]
        ctx.real = min(max(vocab_size - first, 0), weight.shape[0])  # columns of this rank that are no padding
        local = targets - first
        # softmax over what was seen so far, relative to the largest logit so far: a finite start, for 0 * inf is nan
        peak = hidden.new_full((rows,), torch.finfo(dtype).min, dtype=dtype)
        total, weighted, chosen = torch.zeros(3, rows, dtype=dtype, device=hidden.device)
        kept = None
        blocks = list(_blocks(rows, ctx.real, dtype))
        for start, end in blocks:
            logits = _logits(hidden, weight[start:end], temperature, dtype)
            before, peak = peak, torch.maximum(peak, logits.amax(-1))
            column, here = _columns(local, start, end)
            chosen += torch.where(here, logits.gather(1, column)[:, 0], 0.0)
            total, weighted = _relative_to(peak, before, total, weighted)
            logits.sub_(peak[:, None])
            exps = logits.exp()
            total += exps.sum(-1)
            weighted += logits.mul_(exps).sum(-1)
            kept = exps if len(blocks) == 1 else None
            del logits, exps  # before the next block is made
        own_peak = peak
        if group.size() > 1 and rows:
            peak = own_peak.clone()
            dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
            sums = torch.stack([*_relative_to(peak, own_peak, total, weighted), chosen])
            dist.all_reduce(sums, group=group)
            total, weighted, chosen = sums
        log_total = total.log()
        log_sum = peak + log_total
        entropy = log_total - weighted / total
        ctx.mark_non_differentiable(entropy)
        ctx.first, ctx.temperature = first, temperature
        if len(blocks) == 1:
            ctx.save_for_backward(hidden, weight, targets, log_sum, kept, own_peak)
        else:
            ctx.save_for_backward(hidden, weight, targets, log_sum)
        return chosen - log_sum, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _entropy: Tensor) -> tuple:
        hidden, weight, targets, log_sum, *kept = ctx.saved_tensors
        rows, dtype = hidden.shape[0], log_sum.dtype
        local = targets - ctx.first
        scaled = grad / ctx.temperature
        grad_hidden = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
        grad_weight = torch.empty_like(weight)
        grad_weight[ctx.real if rows else 0 :] = 0
        for start, end in _blocks(rows, ctx.real, dtype):
            part = weight[start:end].to(hidden.dtype)
            if kept:
                exps, own_peak = kept
                grad_logits = exps * (-scaled * (own_peak - log_sum).exp())[:, None]
            else:
                grad_logits = _logits(hidden, part, ctx.temperature, dtype).sub_(log_sum[:, None]).exp_()
                grad_logits.mul_(-scaled[:, None])
            column, here = _columns(local, start, end)
            grad_logits.scatter_add_(1, column, torch.where(here, scaled, 0.0)[:, None])
            grad_logits = grad_logits.to(hidden.dtype)
            if weight.dtype == hidden.dtype:
                torch.mm(grad_logits.t(), hidden, out=grad_weight[start:end])
            else:
                grad_weight[start:end] = grad_logits.t() @ hidden
            if dtype == hidden.dtype:
                grad_hidden.addmm_(grad_logits, part)
            else:
                grad_hidden += grad_logits @ part
            del grad_logits
        return grad_hidden.to(hidden.dtype), grad_weight, None, None, None, None


def _softmax_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _blocks(rows: int, columns: int, dtype: torch.dtype) -> Iterator[tuple[int, int]]:
    """First and last (exclusive) column of each block of logits; none without rows."""
    if rows:
        width = max(1, platform.block_bytes() // (rows * dtype.itemsize))
        for start in range(0, columns, width):
            yield start, min(start + width, columns)


def _logits(hidden: Tensor, weight: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    """A new tensor `[n, columns]`."""
    logits = (hidden @ weight.to(hidden.dtype).t()).to(dtype)
    return logits if temperature == 1.0 else logits.div_(temperature)


def _columns(local: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
    """`[n, 1]`: each target's column in a block; `[n]`: whether it is in the block at all."""
    column = local - start
    return column.clamp(0, end - start - 1)[:, None], (column >= 0) & (column < end - start)


def _relative_to(peak: Tensor, before: Tensor, total: Tensor, weighted: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of `e` and of `e * (x - before)`, `e = exp(x - before)`, as they are relative to a larger `peak`.

    Where nothing was summed yet (0, at the lowest `before`) both stay 0.
    """
    down = before - peak
    scale = down.exp()
    return total * scale, (weighted + total * down) * scale
