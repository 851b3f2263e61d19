"""Attention with sinks on a CPU, by PyTorch's flash attention kernel and the sum of exponentials it returns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class SinkAttention(torch.autograd.Function):
    """See `platform.sink_attention`.

    With l the kernel's log-sum-exp of a query's scores and s the sink, the sum with the sink is l' = log(e^l + e^s), and
    the output is the kernel's times e^(l - l'). The kernel's backward computes the probabilities from l and their mean
    gradient from the output, so l' and the new output in their places make it that of the whole softmax. The sink's
    probability is e^(s - l') and its value 0: its gradient is minus that times the mean gradient.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks: Tensor) -> Tensor:
        ctx.options = dict(dropout_p=0.0, is_causal=mask is None, attn_mask=_scores(mask, query.dtype))
        out, total = FORWARD(query, key, value, **ctx.options)
        sink = sinks.to(total.dtype)[None, :, None]
        whole = torch.logaddexp(total, sink)
        out = (out * torch.exp(total - whole)[..., None]).to(query.dtype)
        ctx.save_for_backward(query, key, value, out, whole, sinks)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, Tensor]:
        query, key, value, out, whole, sinks = ctx.saved_tensors
        grads = BACKWARD(grad, query, key, value, out, whole, **ctx.options)
        mean = torch.linalg.vecdot(grad.to(whole.dtype), out.to(whole.dtype))
        of_sinks = -(torch.exp(sinks.to(whole.dtype)[None, :, None] - whole) * mean).sum(dim=(0, 2))
        return *grads, None, of_sinks.to(sinks.dtype)


def _scores(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What the kernel adds to the scores."""
    if mask is None:
        return None
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, float("-inf"))
