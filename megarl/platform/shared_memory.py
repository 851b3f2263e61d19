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
from typing import Any

import torch
from torch import Tensor

Gather = Callable[[Any], list[Any]]
WORD = struct.Struct("q")


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
