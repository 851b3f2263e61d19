"""Carrying out a `SyncPlan`: one fused message for each pair of ranks and block, the next block's while this one is used."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megarl import platform
from megarl.convert.stacks import Stack, stretch
from megarl.platform.shared_memory import Mapped
from megarl.rollout.sync_plan import Exchanged, Piece, Run, SyncPlan, message_bytes

if TYPE_CHECKING:
    from megarl.parallel import Mesh

Moved = list[tuple[Run, Tensor]]  # values: one dimension for a stretch, the piece's shape otherwise
TOPICS = ("ready", "read")  # where in the sender's window a message lies; that the receiver is done with it
TIMEOUT = 600.0  # seconds that a neighbour may be late
ALIGNMENT = 64  # bytes, of messages in a window


class Exchange:
    """The messages of a plan on one rank. Collective over the world, as is every use of `blocks`.

    Where all ranks can map each other's parameters, they read them in place. Otherwise ranks of one machine that can share
    memory write messages into a window of their own, in one half for every other block, tell the receivers where a message
    lies and wait for their receipts before they use the half again; and other messages are sent, in the plan's precision.
    """

    def __init__(self, plan: SyncPlan, mesh: Mesh) -> None:
        self.plan, self.mesh = plan, mesh
        self.schedule = plan.schedule(mesh.rank)
        sizes = [self._window_bytes(block) for block in self.schedule]
        self.middle = max(sizes[::2], default=0)  # of the window: even blocks lie before it, odd ones behind
        end = self.middle + max(sizes[1::2], default=0)
        self.shared = platform.shared_windows(
            end, (mesh.rank, mesh.world_size), mesh.all_gather_object, len(TOPICS), TIMEOUT
        )
        self.sending: tuple[list[dist.Work], ...] = ([], [])  # of even and of odd blocks
        self.unread: tuple[list[int], ...] = ([], [])  # receivers that still read the half
        self._buffers = [0, 0]  # bytes of the messages, without those in the window, of the last even and odd block
        self.message_bytes = 0  # most of both in the last sync
        self.mapped: Mapped | None = None
        # codes of FP8 are made anew in every sync
        self.is_mappable = len(self.shared.windows) == mesh.world_size and plan.fp8 is None
        self._sent = {  # this rank's parameters that others need
            run.first.entry.source
            for block in self.schedule
            for rank, runs in block.outgoing.items()
            for run in runs
            if rank != mesh.rank
        }

    @property
    def window_bytes(self) -> int:
        """This rank's memory that others read messages in."""
        has_window = self.mapped is None and self.mesh.rank in self.shared
        return self.shared.windows[self.mesh.rank].nbytes if has_window else 0

    def blocks(self, held: Mapping[str, Tensor | Stack], ahead: bool = True) -> Iterator[Moved]:
        """Every block's pieces with their values, which are gone when the next block is asked for.

        `held`: an entry's source -> this rank's parameter, or what is sent of it. `ahead`: the next block is on its way
        while one is used.
        """
        self._buffers, self.message_bytes = [0, 0], 0
        if self._map(held):
            yield from self._in_place(held)
            return
        works = self._post(0, held)
        for number, block in enumerate(self.schedule):
            moved = self._collect(block, held, works)
            if ahead:
                works = self._post(number + 1, held)
            yield moved
            del moved
            self._confirm(block)
            if not ahead:
                works = self._post(number + 1, held)
        self._settle(0), self._settle(1)

    def _map(self, held: Mapping[str, Tensor]) -> bool:
        """Whether parameters can be read where they are; those that others need then lie in memory that they map.

        Their storages move there in the first sync, one after another.
        """
        if not self.is_mappable:
            return False
        needed = {name: held[name] for name in self._sent}
        if self.mapped is None and self.mesh.any(any(isinstance(values, Stack) for values in needed.values())):
            self.is_mappable = False
            return False
        if self.mesh.any(self.mapped is None or not self.mapped.holds(needed)):
            self.mapped = platform.map_tensors(needed, (self.mesh.rank, self.mesh.world_size), self.mesh.all_gather_object)
            self.is_mappable = self.mapped is not None
        return self.is_mappable

    def _in_place(self, held: Mapping[str, Tensor]) -> Iterator[Moved]:
        """`blocks` of what this rank and the others hold, which nobody changes meanwhile."""
        mine = self.mesh.rank
        receivers = {rank for block in self.schedule for rank in block.outgoing} - {mine}
        senders = {rank for block in self.schedule for rank in block.incoming} - {mine}
        self._meet(TOPICS.index("ready"), receivers, senders)
        for block in self.schedule:
            sources = {rank: held if rank == mine else self.mapped.others[rank] for rank in block.incoming}
            yield [(run, _values(run, sources[rank])) for rank, runs in block.incoming.items() for run in runs]
        self._meet(TOPICS.index("read"), senders, receivers)

    def _meet(self, topic: int, told: set[int], heard: set[int]) -> None:
        for rank in told:
            self.shared.tell(rank, topic)
        for rank in heard:
            self.shared.hear(rank, topic)

    def _window_bytes(self, block: Exchanged) -> int:
        distinct = {message_key(self.plan, receiver, runs): runs for receiver, runs in block.outgoing.items()}
        return sum(_aligned(message_bytes(runs)) for runs in distinct.values())

    def _settle(self, half: int) -> None:
        """Wait until nobody needs this half of the window and of the messages."""
        for work in self.sending[half]:
            work.wait()
        for receiver in self.unread[half]:
            self.shared.hear(receiver, TOPICS.index("read"))
        self.sending[half].clear(), self.unread[half].clear()

    def _post(self, number: int, held: Mapping[str, Tensor | Stack]) -> dict[int, Message]:
        """Start a block's messages; returns those that will be received, by sender. After the last block: none."""
        if number >= len(self.schedule):
            return {}
        block, half = self.schedule[number], number % 2
        self._settle(half)
        operations = self._send(block, held, half)
        sends, buffers = len(operations), {}
        for sender, runs in block.incoming.items():
            if sender != self.mesh.rank and sender not in self.shared:
                buffers[sender] = _empty(message_bytes(runs))
                operations.append(self._operation(dist.irecv, buffers[sender], sender))
        self._buffers[half] = sum({o.tensor.data_ptr(): o.tensor.nbytes for o in operations}.values())
        self.message_bytes = max(self.message_bytes, sum(self._buffers))
        works = dist.batch_isend_irecv(operations) if operations else []
        if len(works) < len(operations):  # NCCL makes one of all
            works = works * len(operations)
        self.sending[half].extend(works[:sends])
        return {sender: Message(buffer, work) for (sender, buffer), work in zip(buffers.items(), works[sends:], strict=True)}

    def _send(self, block: Exchanged, held: Mapping[str, Tensor | Stack], half: int) -> list[dist.P2POp]:
        """Pack the messages of a block, equal ones once; returns those that have to be sent."""
        operations, packed, at = [], {}, half * self.middle
        for receiver, runs in block.outgoing.items():
            shared, size = receiver in self.shared, message_bytes(runs)
            key = message_key(self.plan, receiver, runs), shared
            if key not in packed:
                buffer = self.shared.windows[self.mesh.rank][at : at + size] if shared else _empty(size)
                for run, place in zip(runs, _places(runs, buffer), strict=True):
                    values = _values(run, held)
                    place.view(values.shape).copy_(values)
                packed[key] = at if shared else buffer
                at += _aligned(size) if shared else 0
            if shared:
                self.shared.tell(receiver, TOPICS.index("ready"), packed[key])
                self.unread[half].append(receiver)
            else:
                operations.append(self._operation(dist.isend, packed[key], receiver))
        return operations

    def _operation(self, kind: Any, tensor: Tensor, peer: int) -> dist.P2POp:
        return dist.P2POp(kind, tensor, peer, self.mesh.world_group)

    def _collect(self, block: Exchanged, held: Mapping[str, Tensor | Stack], works: dict[int, Message]) -> Moved:
        """A block's own pieces and, once they are there, the others'."""
        moved = [(run, _values(run, held)) for run in block.incoming.get(self.mesh.rank, [])]
        for sender, runs in block.incoming.items():
            if sender == self.mesh.rank:
                continue
            if sender in self.shared:
                buffer = self.shared.windows[sender][self.shared.hear(sender, TOPICS.index("ready")) :]
            else:
                works[sender].work.wait()
                buffer = works[sender].buffer
            moved += zip(runs, _places(runs, buffer), strict=True)
        return moved

    def _confirm(self, block: Exchanged) -> None:
        """Tell the senders that their windows were read."""
        for sender in block.incoming:
            if sender != self.mesh.rank and sender in self.shared:
                self.shared.tell(sender, TOPICS.index("read"))


class Message(NamedTuple):
    """What will come from a rank that shares no memory."""

    buffer: Tensor
    work: dist.Work


def message_key(plan: SyncPlan, receiver: int, pieces: Iterable[Piece | Run]) -> Hashable:
    """What a rank sends to two receivers is the same where this is: they host the same, and get the same parameters of it.

    Ranks that host the same need not get all of it from the same ranks: each has the nearest holder of every shard.
    """
    sources = (piece.first.entry.source if isinstance(piece, Run) else piece.entry.source for piece in pieces)
    return 0 if plan.whole else receiver % plan.engine.ranks, tuple(dict.fromkeys(sources))


def _empty(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=platform.device())


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _values(run: Run, held: Mapping[str, Tensor | Stack]) -> Tensor:
    parameter = held[run.first.entry.source]
    if run.start is None:
        return values_of(run.first, parameter)
    return stretch(parameter, run.start, run.count)


def _places(runs: list[Run], buffer: Tensor) -> Iterator[Tensor]:
    """Where each run lies in a message, wide elements first so that all are aligned."""
    offsets, at = {}, 0
    for index in sorted(range(len(runs)), key=lambda i: -runs[i].first.entry.item_bytes):
        offsets[index], at = at, at + runs[index].bytes
    for index, run in enumerate(runs):
        yield buffer[offsets[index] : offsets[index] + run.bytes].view(getattr(torch, run.first.entry.dtype))


def pieces_of(run: Run, values: Tensor) -> Iterator[tuple[Piece, Tensor]]:
    """The pieces of a run, each with its values in its shape."""
    if len(run.pieces) == 1:
        yield run.first, values.reshape(run.first.shape)
        return
    at, flat = 0, values.reshape(-1)
    for piece in run.pieces:
        size = math.prod(piece.shape)
        yield piece, flat[at : at + size].reshape(piece.shape)
        at += size


def values_of(piece: Piece, parameter: Tensor | Stack) -> Tensor:
    """A piece's values as the sender has them."""
    part = parameter[piece.local]
    return part if piece.order is None else part.permute(piece.order)
