"""How a rank learns that it should stop: a flag that a signal handler sets and the step boundary reads."""

from __future__ import annotations

import os
import signal
from types import FrameType


class StopSignal:
    """Set by SIGINT or SIGTERM; `requested` is reduced over the ranks at the step boundary, never in the handler.

    One per process, like the handlers: `StopSignal.install()` returns the same object every time. A second SIGINT ends
    the process at once with exit code 130.
    """

    _installed: StopSignal | None = None

    def __init__(self) -> None:
        self.received: int | None = None

    @classmethod
    def install(cls) -> StopSignal:
        """Take over SIGINT and SIGTERM in this process (main thread only). Idempotent; libraries that set their own
        handlers later are overridden by calling it again."""
        if cls._installed is None:
            cls._installed = cls()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, cls._installed._handle)
        return cls._installed

    @property
    def requested(self) -> bool:
        """Whether this rank was asked to stop."""
        return self.received is not None

    @property
    def exit_code(self) -> int:
        """What a process that stopped for it exits with: 128 + the signal, or 0 if none came."""
        return 0 if self.received is None else 128 + self.received

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            os._exit(128 + number)
        self.received = self.received or number
