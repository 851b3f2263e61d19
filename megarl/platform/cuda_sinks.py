"""Attention with sinks by PyTorch's own attention, on any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sink_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks: Tensor) -> Tensor:
    """See `platform.sink_attention`: the sink is a last key, whose score the mask gives and whose value is 0."""
    group = query.shape[1] // key.shape[1]
    key, value = (F.pad(x.repeat_interleave(group, dim=1), (0, 0, 0, 1)) for x in (key, value))
    rows, columns = query.shape[2], key.shape[2] - 1
    if mask is None:
        mask = torch.ones(1, 1, rows, columns, dtype=torch.bool, device=query.device).tril()
    hidden = torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill_(~mask, float("-inf"))
    sinks = sinks.to(query.dtype)[None, :, None, None].expand(len(mask), -1, rows, 1)
    scores = torch.cat([hidden.expand(-1, query.shape[1], -1, -1), sinks], dim=-1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=scores.expand(len(query), -1, -1, -1))
