"""A checksum of every tensor on both sides of a sync: of the learner's slices, and of what the engine computes with.

The sum over elements of an element's bits times a hash of its position in the full tensor, modulo 2^64. Sums of disjoint
slices add up, so each sender sums what it sends and each engine rank what it hosts; a value that is wrong, at another
place or left out changes the sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from megarl.rollout.engine_shards import Box
from megarl.rollout.exchange import values_of
from megarl.rollout.sync_plan import Piece, SyncEntry

if TYPE_CHECKING:
    from megarl.rollout.weight_sync import WeightSync

MASK = (1 << 64) - 1
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
FACTORS = 0x9E3779B97F4A7C15 - (1 << 64), 0xBF58476D1CE4E5B9 - (1 << 64)  # of splitmix64, as signed numbers


@torch.no_grad()
def differing_tensors(sync: WeightSync, chunks: list[nn.Module]) -> list[str]:
    """The tensors whose checksums differ, each with the first rank that has it wrong; the same on every rank.

    Collective. Reads every weight back out of vLLM's layers, so it takes several times a sync.
    """
    rank, plan = sync.mesh.rank, sync.plan
    expected: dict[str, int] = {}
    for sums in sync.mesh.all_gather_object(_sent(sync, chunks)):
        for name, value in sums.get(rank, {}).items():
            expected[name] = (expected.get(name, 0) + value) & MASK
    entries, boxes = {entry.hf_name: entry for entry in plan.entries}, plan.hosted(rank)
    wrong = [
        name
        for name, values in sync.engine.hosted_weights()
        if checksum(values, entries[name], boxes[name]) != expected.get(name)
    ]
    out: dict[str, str] = {}
    for other, names in enumerate(sync.mesh.all_gather_object(wrong)):
        for name in names:
            out.setdefault(name, f"{name} on rank {other}")
    return [out[name] for name in entries if name in out]


def _sent(sync: WeightSync, chunks: list[nn.Module]) -> dict[int, dict[str, int]]:
    """Receiver -> tensor -> the sum of what this rank gives it."""
    held = sync.held(chunks)
    out: dict[int, dict[str, int]] = {}
    for block in sync.exchange.schedule:
        own = {sync.mesh.rank: block.incoming.get(sync.mesh.rank, [])}
        for receiver, runs in (block.outgoing | own).items():
            sums = out.setdefault(receiver, {})
            for piece in (piece for run in runs for piece in run.pieces):
                name = piece.entry.hf_name
                sums[name] = (sums.get(name, 0) + _of_piece(piece, held)) & MASK
    return out


def _of_piece(piece: Piece, held: Mapping[str, Tensor]) -> int:
    values = values_of(piece, held[piece.entry.source]).reshape(piece.shape)
    return checksum(values, piece.entry, piece.box)


def checksum(values: Tensor, entry: SyncEntry, box: Box) -> int:
    """Of the `box` of a tensor, in the precision that it is synced in. Negative zeros and denormals count as zeros, but for
    the codes of FP8, which no kernel changes."""
    dtype = getattr(torch, entry.dtype)
    values = values.to(dtype)
    if dtype.itemsize > 1:
        values = torch.where(values.abs() < torch.finfo(dtype).tiny, torch.zeros_like(values), values)
    bits = values.contiguous().view(BITS[dtype.itemsize]).long()
    place = torch.zeros((), dtype=torch.int64, device=values.device)
    for size, part in zip(entry.shape, box, strict=True):
        place = place.unsqueeze(-1) * size + torch.arange(part.start, part.stop, device=values.device)
    place = place * FACTORS[0]
    place = (place ^ (place >> 29)) * FACTORS[1] | 1
    return int((bits * place).sum()) & MASK
