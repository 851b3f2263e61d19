"""Carrying out a `SyncPlan`: one fused message for each pair of ranks and block, the next block's while this one is used."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megarl import platform
from megarl.rollout.sync_plan import Exchanged, Piece, SyncPlan, message_bytes

if TYPE_CHECKING:
    from megarl.parallel import Mesh

Moved = list[tuple[Piece, Tensor]]
ALIGNMENT = 64  # bytes, of messages in a window


class Exchange:
    """One sync's messages from `held` (Megatron name -> this rank's parameter). Collective over the world.

    Ranks of one machine that can share memory write messages into a window of their own, in one half for every other block,
    tell the receivers where a message lies and wait for their receipts before they use the half again. Other messages
    are sent. Parameters go in the precision of the plan.
    """

    def __init__(self, plan: SyncPlan, mesh: Mesh, held: dict[str, Tensor]) -> None:
        self.plan, self.mesh, self.held = plan, mesh, held
        self.schedule = plan.schedule(mesh.rank)
        sizes = [self._window_bytes(block) for block in self.schedule]
        self.middle = max(sizes[::2], default=0)  # of the window: even blocks lie before it, odd ones behind
        end = self.middle + max(sizes[1::2], default=0)
        self.windows = platform.shared_windows(end, mesh.rank, mesh.all_gather_object)
        self.number = 0  # of the block that was yielded last
        self.open: tuple[list[dist.Work], ...] = ([], [])  # of each half: what must end before it is used again

    def blocks(self, ahead: bool = True) -> Iterator[Moved]:
        """Every block's pieces with their values, which are gone when the next block is asked for.

        `ahead`: the next block is on its way while one is used.
        """
        count = len(self.schedule)
        posted = self._post(0)
        for number, block in enumerate(self.schedule):
            self.number, moved = number, self._collect(block, posted)
            if ahead and number + 1 < count:
                posted = self._post(number + 1)
            yield moved
            del moved
            self._confirm(number)
            if not ahead and number + 1 < count:
                posted = self._post(number + 1)
        for work in itertools.chain(*self.open):
            work.wait()

    def _values(self, piece: Piece) -> Tensor:
        return self.held[piece.entry.source][piece.local]

    def _window_bytes(self, block: Exchanged) -> int:
        distinct = {self._same(receiver): pieces for receiver, pieces in block.outgoing.items()}
        return sum(_aligned(message_bytes(pieces)) for pieces in distinct.values())

    def _same(self, receiver: int) -> int:
        """Receivers with the same number host the same and get the same buffer."""
        return receiver % self.plan.engine.ranks

    def _post(self, number: int) -> dict[int, Message]:
        """Start a block's messages; returns those that will come, by sender."""
        block, half = self.schedule[number], number % 2
        for work in self.open[half]:
            work.wait()
        operations = self._sends(block, half)
        sent = len(operations)
        buffers = {}
        for sender, pieces in block.incoming.items():
            if sender != self.mesh.rank:
                buffers[sender] = self._note() if sender in self.windows else _empty(message_bytes(pieces))
                operations.append(self._operation(dist.irecv, buffers[sender], sender, half))
        works = dist.batch_isend_irecv(operations) if operations else []
        if len(works) < len(operations):  # NCCL makes one of all
            works = works * len(operations)
        receipts = [
            dist.irecv(self._note(), receiver, self.mesh.world_group, tag=2 + half)
            for receiver in block.outgoing
            if receiver in self.windows
        ]
        self.open[half][:] = works[:sent] + receipts
        return {sender: Message(*pair) for (sender, *pair) in zip(buffers, buffers.values(), works[sent:], strict=True)}

    def _sends(self, block: Exchanged, half: int) -> list[dist.P2POp]:
        """Pack the messages of a block, equal ones once."""
        out, packed, at = [], {}, half * self.middle
        for receiver, pieces in block.outgoing.items():
            shared, size = receiver in self.windows, message_bytes(pieces)
            key = self._same(receiver), shared
            if key not in packed:
                buffer = self.windows[self.mesh.rank][at : at + size] if shared else _empty(size)
                for piece, place in zip(pieces, _places(pieces, buffer), strict=True):
                    place.copy_(self._values(piece))
                packed[key] = self._note(at) if shared else buffer
                at += _aligned(size) if shared else 0
            out.append(self._operation(dist.isend, packed[key], receiver, half))
        return out

    def _operation(self, kind: Any, tensor: Tensor, peer: int, half: int) -> dist.P2POp:
        return dist.P2POp(kind, tensor, peer, self.mesh.world_group, tag=half)

    @staticmethod
    def _note(at: int = 0) -> Tensor:
        """What is told about a message in a window: where it lies, and back that it was read."""
        return torch.tensor([at])

    def _collect(self, block: Exchanged, posted: dict[int, Message]) -> Moved:
        """A block's own pieces and, once they are there, the others'."""
        moved = [(piece, self._values(piece)) for piece in block.incoming.get(self.mesh.rank, [])]
        for sender, message in posted.items():
            pieces = block.incoming[sender]
            moved += zip(pieces, _places(pieces, self._arrived(sender, message)), strict=True)
        return moved

    def _arrived(self, sender: int, message: Message) -> Tensor:
        message.work.wait()
        if sender not in self.windows:
            return message.buffer
        return self.windows[sender][int(message.buffer) :]

    def _confirm(self, number: int) -> None:
        for sender in self.schedule[number].incoming:
            if sender != self.mesh.rank and sender in self.windows:
                work = dist.isend(self._note(), sender, self.mesh.world_group, tag=2 + number % 2)
                self.open[number % 2].append(work)


class Message(NamedTuple):
    """What will come from one rank: the message, or for a window the place where it lies."""

    buffer: Tensor
    work: dist.Work


def _empty(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=platform.device())


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _places(pieces: list[Piece], buffer: Tensor) -> Iterator[Tensor]:
    """Where each piece lies in a message, wide elements first so that all are aligned."""
    offsets, at = {}, 0
    for index in sorted(range(len(pieces)), key=lambda i: -pieces[i].entry.item_bytes):
        offsets[index], at = at, at + pieces[index].bytes
    for index, piece in enumerate(pieces):
        raw = buffer[offsets[index] : offsets[index] + piece.bytes]
        yield raw.view(getattr(torch, piece.entry.dtype)).view(piece.shape)

