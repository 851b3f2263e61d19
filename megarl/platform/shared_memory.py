"""Memory of one process that others on the same machine read, and a word from one to the other about it.

Messages of a weight sync between ranks of one machine need no copy through sockets. Neither the memory nor the pipes have
a name in a file system: they are found through the process that made them, and are gone with the last process that has
them open, however that ends.
"""

from __future__ import annotations

import mmap
import os
import select
import socket
import struct
import weakref
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Gather = Callable[[Any], list[Any]]
WORD = struct.Struct("q")
SHM_SHARE = 0.9  # of what is free in /dev/shm, most that is taken: beyond it a process is killed without a word


class SharedWindows:
    """`windows[rank]`: `size` bytes (uint8) of that rank's, for all ranks of this machine, this one's included.

    `tell(rank, topic, number)` and `hear(rank, topic)` carry numbers between two of them, in order, in `topics` lines of
    their own. Made by `share`; the memory goes when this and all tensors made of it have gone.
    """

    def __init__(self, windows: dict[int, Tensor], pipes: dict[tuple[int, int], tuple[int, int]], timeout: float) -> None:
        self.windows, self._pipes, self._timeout = windows, pipes, timeout
        self._close = weakref.finalize(self, _close, [end for ends in pipes.values() for end in ends])

    def close(self) -> None:
        self.windows = {}
        self._close()

    def __contains__(self, rank: int) -> bool:
        return rank in self.windows

    def tell(self, rank: int, topic: int, number: int = 0) -> None:
        os.write(self._pipes[rank, topic][1], WORD.pack(number))

    def hear(self, rank: int, topic: int) -> int:
        """The next number that a rank tells. Raises TimeoutError when none comes."""
        pipe = self._pipes[rank, topic][0]
        if not select.select([pipe], [], [], self._timeout)[0]:
            raise TimeoutError(f"rank {rank} said nothing for {self._timeout:.0f} s")
        return WORD.unpack(os.read(pipe, WORD.size))[0]


def share(size: int, place: tuple[int, int], gather: Gather, topics: int, timeout: float) -> SharedWindows:
    """The windows of this machine's ranks; `place` is (rank, world size).

    Collective: `gather(item)` returns every rank's item in rank order.

    Sizes may differ between ranks. Without windows, on every rank, when the system has no such memory or a rank may not
    look into another's. `timeout`: seconds that `hear` waits.
    """
    rank, world = place
    with ExitStack() as made:
        own = _make(size, world * topics, made)
        offers = gather(own and (socket.gethostname(), os.getpid(), own, [_identity(one) for one in own], size))
        found = SharedWindows({}, {}, timeout)
        if all(offers):
            with suppress(OSError):
                found = _connect(rank, offers, topics, timeout)
        agreed = all(gather(bool(found.windows)))  # and then nobody looks into another any more
    if not agreed:
        found.close()
    return found


@dataclass
class Mapped:
    """Tensors in memory that all ranks of a machine map: `others[rank]` are those of another rank, by name.

    Nothing says when another rank changes them: that is for their users to agree on.
    """

    others: dict[int, dict[str, Tensor]]
    addresses: dict[str, int]  # of this rank's

    def holds(self, tensors: dict[str, Tensor]) -> bool:
        """Whether these tensors of this rank still lie where the others look."""
        return self.addresses == {name: tensor.data_ptr() for name, tensor in tensors.items()}


def map_tensors(tensors: dict[str, Tensor], place: tuple[int, int], gather: Gather) -> Mapped | None:
    """Move the storages of tensors, in place, to memory that the other ranks map; `place` and `gather` as in `share`.

    None, on every rank, unless all ranks are on one machine, may look into each other, and its /dev/shm has room for all.
    A storage is moved at once, and for that moment exists twice. Collective.
    """
    rank, _world = place
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors.values()}
    moved = sum(storage.nbytes() for storage in storages.values() if not storage.is_shared())
    wishes = gather((socket.gethostname(), moved))
    has_room = sum(size for _, size in wishes) < SHM_SHARE * _free_shm()
    if not all(gather(has_room and {host for host, _ in wishes} == {socket.gethostname()})):
        return None
    numbers = {address: number for number, address in enumerate(storages)}
    entries = {
        name: (numbers[t.untyped_storage().data_ptr()], t.dtype, tuple(t.shape), t.stride(), t.storage_offset())
        for name, t in tensors.items()
    }
    handles: list[tuple[int, int, tuple[int, int]]] | None = None
    with suppress(OSError, RuntimeError):
        shared = [storage._share_fd_cpu_() for storage in storages.values()]
        handles = [(handle, size, _identity(handle)) for handle, size in shared]
    offers = gather((os.getpid(), handles, entries))
    others: dict[int, dict[str, Tensor]] | None = None
    with suppress(OSError, TypeError):
        others = {other: _mapped(*offer) for other, offer in enumerate(offers) if other != rank}
    if not all(gather(others is not None)):
        return None
    return Mapped(others, {name: tensor.data_ptr() for name, tensor in tensors.items()})


def _free_shm() -> int:
    try:
        found = os.statvfs("/dev/shm")
    except OSError:
        return 0
    return found.f_bavail * found.f_frsize


def _mapped(process: int, handles: list[tuple] | None, entries: dict[str, tuple]) -> dict[str, Tensor]:
    """Raises OSError when the process cannot be looked into, TypeError when it has no handles to offer."""
    storages = []
    for handle, size, identity in handles:
        memory = _open((None, process, [handle], [identity], size), 0, os.O_RDWR)
        try:
            storages.append(torch.frombuffer(mmap.mmap(memory, size), dtype=torch.uint8))
        finally:
            os.close(memory)
    return {
        name: storages[number].view(dtype).as_strided(*place) for name, (number, dtype, *place) in entries.items()
    }


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _make(size: int, pipes: int, made: ExitStack) -> list[int] | None:
    """Descriptors: of the memory, and of a pipe for every line that this rank listens on."""
    if not hasattr(os, "memfd_create"):
        return None
    with suppress(OSError):
        out = [os.memfd_create("megarl-sync")]
        made.callback(os.close, out[0])
        os.ftruncate(out[0], max(size, 1))
        for _ in range(pipes):
            read, write = os.pipe()
            made.callback(os.close, read)
            made.callback(os.close, write)
            out.append(read)
        return out
    return None


def _connect(rank: int, offers: list[tuple], topics: int, timeout: float) -> SharedWindows:
    windows: dict[int, Tensor] = {}
    pipes: dict[tuple[int, int], tuple[int, int]] = {}
    mine = offers[rank]
    for other, offer in enumerate(offers):
        if offer[0] != mine[0]:
            continue
        memory = _open(offer, 0, os.O_RDWR)
        windows[other] = torch.frombuffer(mmap.mmap(memory, max(offer[4], 1)), dtype=torch.uint8)
        os.close(memory)
        for topic in range(topics if other != rank else 0):
            ends = _open(mine, 1 + other * topics + topic, os.O_RDONLY), _open(offer, 1 + rank * topics + topic, os.O_WRONLY)
            pipes[other, topic] = ends
    return SharedWindows(windows, pipes, timeout)


def _open(offer: tuple, index: int, mode: int) -> int:
    """Raises OSError when the process cannot be looked into, or is another one (of another container) of that number."""
    _host, process, descriptors, identities, _size = offer
    found = os.open(f"/proc/{process}/fd/{descriptors[index]}", mode)
    if _identity(found) != tuple(identities[index]):
        os.close(found)
        raise OSError("another process")
    return found


def _identity(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino
