"""Processes that were started with a mark in their environment, however far they have gone from who started them."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path


def marked(mark: str) -> list[int]:
    """Processes with `mark`, which is NAME=VALUE, that are still there."""
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if mark.encode() in environ.read_bytes().split(b"\0"):
                found.append(int(environ.parent.name))
    return found


def end_marked(mark: str, seconds: float = 10.0) -> None:
    """Kills them, and what they start meanwhile, until none is left or the time is over."""
    deadline = time.monotonic() + seconds
    while (left := marked(mark)) and time.monotonic() < deadline:
        for process in left:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.05)
