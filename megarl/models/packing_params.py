"""What attention needs to know about one packed row: positions, document borders, and how to run it fast."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

# documents whose lengths differ by less than this share one padded attention call; more calls cost more than the padding
BUCKET_RATIO = 1.25


@dataclass
class AttentionBucket:
    """Documents of similar length, laid out as a right-padded rectangle.

    A causal kernel needs no mask for it: a real query only looks at keys before it, which are real, and what padded
    queries produce is never read back.
    """

    documents: int  # B
    length: int  # L, the longest
    index: Tensor | None  # [B * L] into the packed row; padding repeats a real token. None: the row as it is


@dataclass
class PackedRow(PackedSeqParams):
    """Megatron's packed-sequence parameters plus what the torch layers precompute once per micro-batch."""

    position_ids: Tensor | None = None  # [n] int64, from 0 in every document
    buckets: tuple[AttentionBucket, ...] = ()
    restore: Tensor | None = None  # [n] into the concatenated bucket outputs; None: they are in order
    rotary: tuple[Tensor, Tensor] | None = None  # cos, sin: [n, head_dim] float32
    routed_experts: Tensor | None = None  # [n, L, k] for routers under replay; -1: their own choice

    @classmethod
    def build(cls, cu_seqlens: Tensor, position_ids: Tensor, head_dim: int, rope_theta: float) -> PackedRow:
        """`cu_seqlens` [documents + 1] int32 and `position_ids` [n] on the compute device."""
        longest = int((cu_seqlens[1:] - cu_seqlens[:-1]).max())
        buckets, restore = _bucket(cu_seqlens)
        return cls(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            position_ids=position_ids,
            buckets=buckets,
            restore=restore,
            rotary=_rotary(position_ids, head_dim, rope_theta),
        )


def _rotary(position_ids: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """RoFormer (2104.09864) eq. 34 in the half-split layout of Hugging Face: cos and sin `[n, head_dim]` in float32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device=position_ids.device).float() / head_dim
    angles = position_ids.float()[:, None] * (1.0 / theta**exponents)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def _bucket(cu_seqlens: Tensor) -> tuple[tuple[AttentionBucket, ...], Tensor | None]:
    starts = cu_seqlens[:-1].tolist()
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
    if len(set(lengths)) == 1:
        return (AttentionBucket(len(lengths), lengths[0], None),), None
    order = sorted(range(len(lengths)), key=lambda d: -lengths[d])
    groups: list[list[int]] = []
    for document in order:
        if groups and lengths[groups[-1][0]] <= BUCKET_RATIO * lengths[document] + 8:
            groups[-1].append(document)
        else:
            groups.append([document])
    device, offset = cu_seqlens.device, 0
    restore = torch.empty(sum(lengths), dtype=torch.int64)
    buckets = []
    for group in groups:
        longest = lengths[group[0]]
        first = torch.tensor([starts[d] for d in group])[:, None]
        size = torch.tensor([lengths[d] for d in group])[:, None]
        column = torch.arange(longest)[None]
        index = first + torch.minimum(column, size - 1)
        real = column < size
        restore[index[real]] = offset + torch.arange(index.numel()).view_as(index)[real]
        buckets.append(AttentionBucket(len(group), longest, index.flatten().to(device)))
        offset += index.numel()
    return tuple(buckets), restore.to(device)
