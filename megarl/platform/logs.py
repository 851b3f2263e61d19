"""Keeping the start-up noise of heavy libraries out of the terminal."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def quiet_to_log(path: str | Path) -> Iterator[None]:
    """Append everything written to stdout and stderr meanwhile, also by C code and child processes, to a file.

    Both file descriptors are redirected, so it affects the whole process: use it around a start-up, not around a loop.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush(), sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.dup2(target, 1), os.dup2(target, 2)
        yield
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os.dup2(saved[0], 1), os.dup2(saved[1], 2)
        for descriptor in (*saved, target):
            os.close(descriptor)
