"""A bound on what an expression from a file may take of this process: a template, a configuration's references."""

from __future__ import annotations

import contextlib
import resource
import signal
import threading
from collections.abc import Iterator
from typing import Any


class TooMuch(Exception):
    """It ran longer, or took more memory, than it was given."""


class _Stop(BaseException):
    """What ends the block: no Exception, which libraries catch and say something else about."""


@contextlib.contextmanager
def bounded(seconds: float, memory: int = 1 << 30) -> Iterator[None]:
    """Raises TooMuch when the block takes longer than `seconds` or, beside what there is, more than `memory` bytes.

    The time is bounded in the main thread only, where signals arrive, and between two instructions of Python.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    ceiling = _data_bytes() + memory
    if soft == resource.RLIM_INFINITY or ceiling < soft:
        resource.setrlimit(resource.RLIMIT_DATA, (ceiling, hard))
    timed = threading.current_thread() is threading.main_thread()
    if timed:
        before = signal.signal(signal.SIGALRM, _stop)
        signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except _Stop:
        raise TooMuch(f"it takes longer than {seconds:g} s") from None
    except MemoryError:
        raise TooMuch(f"it takes more than {memory >> 20} MiB of memory") from None
    except RecursionError:
        raise TooMuch("it is nested too deeply") from None
    finally:
        if timed:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _stop(number: int, frame: Any) -> None:
    raise _Stop


def _data_bytes() -> int:
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        return next((int(line.split()[1]) << 10 for line in status if line.startswith("VmData:")), 0)
