"""Host memory of this process, the same on every device."""

from __future__ import annotations

import resource
from pathlib import Path

GIB = 2**30


def host_memory() -> dict[str, float]:
    """GiB: resident now (`rss`) and at most so far (`peak_rss`)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "rss": pages * resource.getpagesize() / GIB,
        "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB,
    }
