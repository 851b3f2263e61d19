"""Log-probabilities and entropy from vocabulary-parallel logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def token_log_probs(
    logits: Tensor, targets: Tensor, vocab_size: int, group: ProcessGroup, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probability of each row's target, and the entropy it was drawn from.

    logits `[n, V/tp]`, targets `[n]`; columns at or beyond `vocab_size` are padding and get no mass. Returns log-probs
    `[n]` (float32 or wider, differentiable) and entropy `[n]` in nats (no gradient).
    """
    return _VocabParallelLogProb.apply(logits, targets, vocab_size, group, temperature)


class _VocabParallelLogProb(torch.autograd.Function):
    """log softmax at the target over a vocabulary sharded across `group`; one pass, float32 or wider."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, vocab_size: int, group: ProcessGroup, temperature: float
    ) -> tuple[Tensor, Tensor]:
        scaled = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
        width = scaled.shape[-1]
        start = group.rank() * width
        if start + width > vocab_size:
            scaled = scaled.clone() if scaled.data_ptr() == logits.data_ptr() else scaled
            scaled[:, max(0, vocab_size - start) :] = float("-inf")
        peak = scaled.max(dim=-1).values
        _all_reduce(peak, group, dist.ReduceOp.MAX)
        shifted = scaled - peak[:, None]
        weights = shifted.exp()
        local = targets - start
        own = (local >= 0) & (local < width)
        column = local.clamp(0, width - 1)
        target = torch.where(own, shifted.gather(1, column[:, None])[:, 0], 0.0)
        # 0 * -inf of the padding columns would be nan
        weighted = (weights * shifted.clamp(min=-1e4)).sum(-1)
        sums = torch.stack([weights.sum(-1), target, weighted])
        _all_reduce(sums, group, dist.ReduceOp.SUM)
        total, target, weighted = sums.unbind(0)
        log_total = total.log()
        ctx.save_for_backward(weights.div_(total[:, None]), own, column)
        ctx.temperature, ctx.dtype = temperature, logits.dtype
        entropy = log_total - weighted / total
        ctx.mark_non_differentiable(entropy)
        return target - log_total, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _entropy: Tensor) -> tuple:
        probs, own, column = ctx.saved_tensors
        out = probs * (-grad[:, None])
        out.scatter_add_(1, column[:, None], torch.where(own, grad, 0.0)[:, None])
        return (out / ctx.temperature).to(ctx.dtype), None, None, None, None


def _all_reduce(x: Tensor, group: ProcessGroup, op: Any) -> None:
    if group.size() > 1:
        dist.all_reduce(x, op=op, group=group)
