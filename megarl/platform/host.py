"""Host memory of this process, the same on every device."""

from __future__ import annotations

import contextlib
import resource
from pathlib import Path

import psutil

GIB = 2**30


def resident_bytes() -> int:
    """Of this process, now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def host_memory() -> dict[str, float]:
    """GiB: resident now (`rss`), at most so far (`peak_rss`), and of this process's children now (`children`)."""
    children = 0
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # a reward worker may be replaced at any moment
            children += child.memory_info().rss
    return {
        "children": children / GIB,
        "rss": resident_bytes() / GIB,
        "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB,
    }
