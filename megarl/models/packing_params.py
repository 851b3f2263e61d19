"""What attention needs to know about one packed row: positions, document borders, and how to run it fast."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.distributed import ProcessGroup

from megarl.data.packing import zigzag
from megarl.models.rope import tables
from megarl.models.spec import Rope

# documents whose lengths differ by less than this share one padded attention call; more calls cost more than the padding
BUCKET_RATIO = 1.25
# queries that a sliding window cuts a document into at least; fewer cost more in calls than they save in keys
SHORTEST_CUT = 64


@dataclass
class AttentionBucket:
    """Queries of similar length with their keys, laid out as right-padded rectangles.

    Where a document's queries are all of its tokens, a causal kernel needs no mask: a real query only looks at keys
    before it, which are real, and what padded queries produce is never read back.
    """

    documents: int  # B
    index: Tensor | None  # [B * queries] into this rank's rows; padding repeats a real one. None: the rows as they are
    keys: Tensor | None  # [B * keys] into the ranks' keys laid end to end; None: as `index`
    mask: Tensor | None  # [B or 1, 1, queries, keys] bool: what a query may see; None: causal

    @property
    def key_index(self) -> Tensor | None:
        return self.index if self.keys is None else self.keys


@dataclass
class Layout:
    """How the layers with one sliding window attend."""

    buckets: tuple[AttentionBucket, ...]
    restore: Tensor | None  # [n] into the concatenated bucket outputs; None: they are in order


@dataclass
class PackedRow(PackedSeqParams):
    """Megatron's packed-sequence parameters plus what the torch layers precompute once per micro-batch.

    n rows on this rank. Under context parallelism keys and values are gathered from the group, in rank order.
    """

    position_ids: Tensor | None = None  # [n] int64, from 0 in every document
    layouts: dict[int, Layout] = field(default_factory=dict)  # by window; 0: of layers that see all keys
    rotary: tuple[Tensor, Tensor] | None = None  # cos, sin: [n, rotated width], float32 or wider
    cp_group: ProcessGroup | None = None  # None: this rank has all keys
    real: Tensor | None = None  # [n] bool: rows that are no padding, for `FP8Layers`; None: all
    routing: Any = None  # `RowRouting` of the pass, for models with a `RoutingReplay`

    @classmethod
    def build(
        cls,
        cu_seqlens: Tensor,
        position_ids: Tensor,
        rope: Rope,
        cp_group: ProcessGroup | None = None,
        dtype: torch.dtype = torch.float32,
        windows: Iterable[int] = (),
    ) -> PackedRow:
        """`cu_seqlens` [documents + 1] int32 of the whole row and `position_ids` [n] of this rank's, on the device.

        `dtype`: of the rotary tables. `windows`: `ModelSpec.windows`.
        """
        cp, rank = (1, 0) if cp_group is None else (cp_group.size(), cp_group.rank())
        longest = int((cu_seqlens[1:] - cu_seqlens[:-1]).max())
        layouts = {window: attention_layout(cu_seqlens, window, cp, rank) for window in {*windows} or {0}}
        return cls(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            position_ids=position_ids,
            layouts=layouts,
            rotary=tables(rope, position_ids, dtype),
            cp_group=cp_group if cp > 1 else None,
        )


def attention_layout(cu_seqlens: Tensor, window: int = 0, cp: int = 1, rank: int = 0) -> Layout:
    """Of one context-parallel rank's part of a packed row, `cu_seqlens` [documents + 1] of the whole."""
    segments = _windowed(_segments(cu_seqlens.tolist(), cp, rank), window)
    return _layout(segments, _key_order(cu_seqlens, cp), window, cu_seqlens.device)


@dataclass(frozen=True)
class _Segment:
    """Consecutive queries of one document on this rank: rows `start .. start + length`, keys `first .. first + seen`.

    Query i sees the keys up to the (seen - length + i)-th of its document, so the last one sees all.
    """

    start: int
    length: int
    first: int  # in the whole row
    seen: int


def _segments(cu_seqlens: list[int], cp: int, rank: int) -> list[_Segment]:
    """In the order of this rank's rows; one a document, or two under context parallelism (see `packing.zigzag`)."""
    documents = list(itertools.pairwise(cu_seqlens))
    if cp == 1:
        return [_Segment(first, end - first, first, end - first) for first, end in documents]
    out, start = [], 0
    for first, end in documents:
        chunk = (end - first) // (2 * cp)
        for number in (rank, 2 * cp - 1 - rank):
            out.append(_Segment(start, chunk, first, (number + 1) * chunk))
            start += chunk
    return out


def _key_order(cu_seqlens: Tensor, cp: int) -> Tensor | None:
    """[whole row]: where each of its tokens is among the ranks' rows laid end to end; None: in place."""
    if cp == 1:
        return None
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).cpu().long()
    gathered = torch.cat([zigzag(lengths, cp, rank) for rank in range(cp)])
    order = torch.empty_like(gathered)
    order[gathered] = torch.arange(gathered.numel())
    return order


def _windowed(segments: list[_Segment], window: int) -> list[_Segment]:
    """The segments cut so that each sees few keys but those in the windows of its queries; 0: as they are."""
    if not window:
        return segments
    step, out = max(window, SHORTEST_CUT), []
    for segment in segments:
        for done in range(0, segment.length, step):
            length = min(step, segment.length - done)
            seen = segment.seen - segment.length + done + length
            hidden = max(0, seen - length - window + 1)
            out.append(_Segment(segment.start + done, length, segment.first + hidden, seen - hidden))
    return out


def _layout(segments: list[_Segment], key_order: Tensor | None, window: int, device: torch.device) -> Layout:
    reach = window or max(segment.seen for segment in segments)  # keys that a query may see
    if key_order is None and all(_plain(s, reach) for s in segments) and len({segment.length for segment in segments}) == 1:
        return Layout((AttentionBucket(len(segments), None, None, None),), None)
    groups: list[list[_Segment]] = []
    for segment in sorted(segments, key=lambda s: (_plain(s, reach), -s.seen, -s.length)):
        if groups and _similar(groups[-1][0], segment, reach):
            groups[-1].append(segment)
        else:
            groups.append([segment])
    offset = 0
    restore = torch.empty(sum(segment.length for segment in segments), dtype=torch.int64)
    buckets = []
    for group in groups:
        start, length, first, seen = (
            torch.tensor([getattr(s, name) for s in group])[:, None] for name in ("start", "length", "first", "seen")
        )
        column = torch.arange(int(length.max()))[None]
        own = torch.minimum(column, length - 1)
        index = start + own
        real = column < length
        restore[index[real]] = offset + torch.arange(index.numel()).view_as(index)[real]
        offset += index.numel()
        keys = mask = None
        if key_order is not None or not _plain(group[0], reach):
            key_column = torch.arange(int(seen.max()))[None]
            keys = first + torch.minimum(key_column, seen - 1)
            keys = (keys if key_order is None else key_order[keys]).flatten().to(device)
            if not _plain(group[0], reach):
                last = (seen - length + own)[:, :, None]
                mask = ((key_column[:, None] <= last) & (key_column[:, None] > last - reach))[:, None].to(device)
                mask = mask[:1] if len({(s.length, s.seen) for s in group}) == 1 else mask
        buckets.append(AttentionBucket(len(group), index.flatten().to(device), keys, mask))
    return Layout(tuple(buckets), restore.to(device))


def _plain(segment: _Segment, reach: int) -> bool:
    """Whether a causal kernel computes it without a mask."""
    return segment.seen == segment.length <= reach


def _similar(longest: _Segment, other: _Segment, reach: int) -> bool:
    """Whether padding `other` to the longest of its bucket costs less than a call of its own."""
    return _plain(longest, reach) == _plain(other, reach) and all(
        mine <= BUCKET_RATIO * its + 8
        for mine, its in ((longest.length, other.length), (longest.seen, other.seen))
    )
