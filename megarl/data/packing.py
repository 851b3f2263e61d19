"""A batch as packed micro-batches: which rank runs which sequences together, and the tensors of one such forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megarl.errors import BadInput
from megarl.types import Batch, MicroBatch


@dataclass(frozen=True)
class BatchLayout:
    """How a batch is shared out over ranks and what a packed row must look like there; the default is one process."""

    dp: int = 1
    dp_rank: int = 0
    cp: int = 1
    cp_rank: int = 0
    row_multiple: int = 1  # a rank's rows come in multiples of this (tp under sequence parallelism, 16 for FP8)
    count_multiple: int = 1  # micro-batches come in multiples of this (pp with virtual stages)
    attention: float = 0.0  # cost of a sequence: tokens + attention * tokens²
    equal_rows: bool = False  # the k-th micro-batches of all data-parallel ranks have the same length (all-gather dispatcher)

    @property
    def document_multiple(self) -> int:
        """Tokens of a sequence are padded to a multiple of this: 2 cp chunks of the same size."""
        return 2 * self.cp if self.cp > 1 else 1

    @property
    def multiple(self) -> int:
        """Tokens of a whole packed row, over all context-parallel ranks, come in multiples of this."""
        return self.row_multiple * self.document_multiple

    def padded(self, length: int) -> int:
        """Tokens that a sequence takes up in a row."""
        return -(-length // self.document_multiple) * self.document_multiple


def plan_micro_batches(
    lengths: Sequence[int],
    token_budget: int,
    dp_size: int,
    pad_multiple: int = 1,
    *,
    attention: float = 0.0,
    count_multiple: int = 1,
) -> list[list[list[int]]]:
    """`plan[dp_rank][micro_batch]`: indices of the sequences it holds, ascending.

    Invariants: every sequence is in exactly one micro-batch; the tokens of each, padded to `pad_multiple`, fit
    `token_budget`; every rank has the same number of micro-batches, a multiple of `count_multiple` (interleaved
    pipelines need one of pp); the k-th ones of all ranks are of similar cost `tokens + attention * tokens²`, since
    ranks wait for each other in each. A micro-batch is empty only on a rank that has fewer sequences than
    micro-batches. The same arguments give the same plan.

    Raises BadInput for a sequence above the budget.
    """
    capacity = token_budget // pad_multiple * pad_multiple
    longest = max(lengths, default=0)
    if longest > capacity:
        needed = -(-longest // pad_multiple) * pad_multiple
        raise BadInput(
            f"micro_batch_tokens: {token_budget}, but a sequence has {longest} tokens; set at least {needed}"
        )
    costs = [length + attention * length * length for length in lengths]
    order = sorted(range(len(lengths)), key=lambda index: (-costs[index], index))
    ranks = _balance(order, costs, dp_size)
    packed = [_first_fit(rank, lengths, capacity) for rank in ranks]
    count = max(1, *(len(bins) for bins in packed))
    count = -(-count // count_multiple) * count_multiple
    return [_spread(rank, bins, lengths, costs, capacity, count) for rank, bins in zip(ranks, packed, strict=True)]


def pack(
    batch: Batch, sequences: Sequence[int], layout: BatchLayout = BatchLayout(), rows: int = 0, pad_token: int = 0
) -> MicroBatch:
    """The given sequences as one packed forward, of which this is one context-parallel rank's part.

    The whole row has at least `rows` tokens. Without sequences it is padding alone, so that a rank with nothing to do
    still takes part in every collective.

    Under context parallelism each document is cut into 2 cp chunks of the same size and rank r holds chunks r and
    2 cp - 1 - r ("zig-zag"): causal attention then costs every rank the same.
    """
    real, multiple = batch.select(sequences), layout.multiple
    lengths = [layout.padded(length) for length in real.lengths.tolist()]
    tail = max(-(-sum(lengths) // multiple) * multiple, rows, multiple) - sum(lengths)
    documents = torch.tensor([*lengths, tail] if tail else lengths)
    ends = documents.cumsum(0)
    starts = ends - documents
    total = int(ends[-1])
    row = torch.repeat_interleave(torch.arange(documents.numel()), documents)
    positions = torch.arange(total) - starts[row]
    sizes = torch.cat([real.lengths, real.lengths.new_zeros(documents.numel() - len(real))])  # real tokens of a document
    token = torch.zeros(total, dtype=torch.int64)
    is_real = positions < sizes[row]
    token[is_real] = torch.arange(real.tokens.numel())
    ids = real.tokens.new_full((total,), pad_token)
    ids[is_real] = real.tokens
    targets = torch.where(positions + 1 < sizes[row], token + 1, -1)
    own = zigzag(documents, layout.cp, layout.cp_rank)
    row_of = torch.full((total,), -1)
    row_of[own] = torch.arange(own.numel())
    last = starts[: len(real)] + real.lengths - 1
    return MicroBatch(
        batch=real,
        tokens=ids[own],
        position_ids=positions[own],
        cu_seqlens=torch.cat([ends.new_zeros(1), ends]).to(torch.int32),
        targets=targets[own],
        last_rows=row_of[last],
    )


def zigzag(documents: Tensor, cp: int, rank: int) -> Tensor:
    """[n] int64: the tokens of a packed row that one context-parallel rank holds, document by document.

    `documents` [D]: padded lengths, multiples of 2 cp (of anything for cp = 1).
    """
    if cp == 1:
        return torch.arange(int(documents.sum()))
    chunks = documents // (2 * cp)
    starts = documents.cumsum(0) - documents
    pieces = torch.stack([starts + rank * chunks, starts + (2 * cp - 1 - rank) * chunks], dim=1).flatten()
    sizes = chunks.repeat_interleave(2)
    within = torch.arange(int(sizes.sum())) - torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
    return torch.repeat_interleave(pieces, sizes) + within


def micro_batches(batch: Batch, token_budget: int, layout: BatchLayout = BatchLayout()) -> list[MicroBatch]:
    """This rank's packed micro-batches of a batch that every rank holds whole.

    `token_budget`: tokens of a packed row over all context-parallel ranks. Raises BadInput for a sequence above it.
    """
    return pack_units(batch, [[index] for index in range(len(batch))], token_budget, layout)


def pack_units(
    batch: Batch, units: Sequence[Sequence[int]], token_budget: int, layout: BatchLayout
) -> list[MicroBatch]:
    """As `micro_batches`, for sequences that must stay together: each unit lists the sequences of one."""
    padded = [layout.padded(length) for length in batch.lengths.tolist()]
    sizes = [sum(padded[index] for index in unit) for unit in units]
    plan = plan_micro_batches(
        sizes,
        token_budget,
        layout.dp,
        layout.multiple,
        attention=layout.attention,
        count_multiple=layout.count_multiple,
    )
    rows = [0] * len(plan[0])
    if layout.equal_rows:
        rows = [max(sum(sizes[unit] for unit in rank[k]) for rank in plan) for k in range(len(rows))]
        rows = [-(-row // layout.multiple) * layout.multiple for row in rows]
    return [
        pack(batch, [index for unit in chosen for index in units[unit]], layout, least)
        for chosen, least in zip(plan[layout.dp_rank], rows, strict=True)
    ]


def _balance(order: Sequence[int], costs: Sequence[float], bins: int) -> list[list[int]]:
    """Longest-processing-time: each index, dearest first, to the bin that is cheapest so far (fewest first, on a tie)."""
    filled: list[list[int]] = [[] for _ in range(bins)]
    loads = [0.0] * bins
    for index in order:
        target = min(range(bins), key=lambda b: (loads[b], len(filled[b]), b))
        filled[target].append(index)
        loads[target] += costs[index]
    return filled


def _first_fit(order: Sequence[int], lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """First fit, in the given order: few bins, none above the capacity."""
    bins: list[list[int]] = []
    free: list[int] = []
    for index in order:
        fits = (b for b, room in enumerate(free) if room >= lengths[index])
        target = next(fits, len(bins))
        if target == len(bins):
            bins.append([])
            free.append(capacity)
        bins[target].append(index)
        free[target] -= lengths[index]
    return bins


def _spread(
    order: Sequence[int],
    packed: list[list[int]],
    lengths: Sequence[int],
    costs: Sequence[float],
    capacity: int,
    count: int,
) -> list[list[int]]:
    """Exactly `count` micro-batches of one rank, dearest first: balanced if that fits, else `packed` split further."""
    bins = _balance(order, costs, count)
    if any(sum(lengths[index] for index in one) > capacity for one in bins):
        bins = [list(one) for one in packed] + [[] for _ in range(count - len(packed))]
        for empty in range(len(packed), count):
            fullest = max(range(count), key=lambda b: (len(bins[b]), -b))
            if len(bins[fullest]) > 1:
                bins[empty].append(bins[fullest].pop())
    bins.sort(key=lambda one: (-sum(costs[index] for index in one), one))
    return [sorted(one) for one in bins]
