"""A batch as packed micro-batches: which rank runs which sequences together, and the tensors of one such forward."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megarl.errors import BadInput
from megarl.types import Batch, MicroBatch


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


def pack(batch: Batch, sequences: Sequence[int], pad_multiple: int = 1, pad_token: int = 0) -> MicroBatch:
    """The given sequences as one packed forward of a multiple of `pad_multiple` tokens.

    Padding is one more document of `pad_token`s, outside `MicroBatch.batch`. Without sequences the micro-batch is
    padding alone, so that a rank with nothing to do still takes part in every collective.
    """
    real = batch.select(sequences)
    total = real.tokens.numel()
    padding = -total % pad_multiple if total else pad_multiple
    lengths = torch.cat([real.lengths, real.lengths.new_tensor([padding])]) if padding else real.lengths
    ends = lengths.cumsum(0)
    starts = ends - lengths
    return MicroBatch(
        batch=real,
        tokens=torch.cat([real.tokens, real.tokens.new_full((padding,), pad_token)]),
        position_ids=torch.arange(total + padding) - torch.repeat_interleave(starts, lengths),
        cu_seqlens=torch.cat([ends.new_zeros(1), ends]).to(torch.int32),
        sequence_ids=torch.repeat_interleave(torch.arange(lengths.numel()), lengths),
    )


def micro_batches(
    batch: Batch,
    token_budget: int,
    dp_rank: int,
    dp_size: int,
    pad_multiple: int = 1,
    *,
    attention: float = 0.0,
    count_multiple: int = 1,
) -> list[MicroBatch]:
    """This data-parallel rank's packed micro-batches of a batch that every rank holds whole."""
    plan = plan_micro_batches(
        batch.lengths.tolist(),
        token_budget,
        dp_size,
        pad_multiple,
        attention=attention,
        count_multiple=count_multiple,
    )
    return [pack(batch, sequences, pad_multiple) for sequences in plan[dp_rank]]


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
