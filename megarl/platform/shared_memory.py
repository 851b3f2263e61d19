"""Memory of one process that others on the same machine read.

Messages of a weight sync between ranks of one machine need no copy through sockets. The memory has no name in a file
system: it is found through the process that made it, and is gone with the last process that maps it, however that ends.
"""

from __future__ import annotations

import mmap
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor


def share(size: int, rank: int, gather: Callable[[Any], list[Any]]) -> dict[int, Tensor]:
    """Rank -> `size` bytes (uint8) of that rank's, for all ranks of this machine, this one's included.

    Collective: `gather(item)` returns every rank's item in rank order. Sizes may differ between ranks. Empty, on every
    rank, when the system has no such memory or a rank may not look into another's.
    """
    own = _make(size)
    offers = gather(None if own is None else (socket.gethostname(), os.getpid(), own, _identity(own), size))
    windows: dict[int, Tensor] | None = {} if all(offers) else None
    if windows is not None:
        for other, (host, *offer) in enumerate(offers):
            if host == socket.gethostname():
                window = _map(own, size) if other == rank else _open(*offer)
                if window is None:
                    windows = None
                    break
                windows[other] = window
    agreed = all(gather(windows is not None))  # and then nobody needs the descriptors any more
    if own is not None:
        os.close(own)
    return windows if agreed and windows is not None else {}


def _make(size: int) -> int | None:
    if not hasattr(os, "memfd_create"):
        return None
    with suppress(OSError):
        descriptor = os.memfd_create("megarl-sync")
        os.ftruncate(descriptor, max(size, 1))
        return descriptor
    return None


def _open(process: int, descriptor: int, identity: tuple[int, int], size: int) -> Tensor | None:
    """None when the process cannot be looked into, or is another one (of another container) with the same number."""
    with suppress(OSError):
        found = os.open(f"/proc/{process}/fd/{descriptor}", os.O_RDWR)
        try:
            return _map(found, size) if _identity(found) == identity else None
        finally:
            os.close(found)
    return None


def _identity(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


def _map(descriptor: int, size: int) -> Tensor:
    return torch.frombuffer(mmap.mmap(descriptor, max(size, 1)), dtype=torch.uint8)
