"""How a rank learns that it should stop: a flag that a thread sets and the step boundary reads."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Mapping
from types import FrameType

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopSignal:
    """Set by SIGINT, SIGTERM or SIGUSR1; `requested` is reduced over the ranks at the step boundary, never in a handler.

    One per process, like the handlers: `StopSignal.install()` returns the same object every time. A second SIGINT ends
    the process at once with exit code 130, and so does the end of the signal's grace time. A thread of its own hears of
    signals (Python runs handlers between two instructions of the main thread, which may wait in a collective).
    """

    _installed: StopSignal | None = None

    def __init__(self) -> None:
        self.received: int | None = None
        self._interrupted = False
        self.grace: Mapping[int, float] = {}

    @classmethod
    def install(cls, grace: Mapping[int, float] | None = None) -> StopSignal:
        """Take over the signals in this process (main thread only). Idempotent; libraries that set their own handlers
        later are overridden by calling it again. `grace`: seconds that the process has after its first signal, by its
        number, kept until it is given again; others have no end."""
        if cls._installed is None:
            cls._installed = cls()
            hears, tells = os.pipe2(os.O_CLOEXEC)
            os.set_blocking(tells, False)
            cls._tells = tells
            threading.Thread(target=cls._installed._listen, args=(hears,), name="signals", daemon=True).start()
        if grace is not None:
            cls._installed.grace = grace
        signal.set_wakeup_fd(cls._tells, warn_on_full_buffer=False)
        for number in STOPS:
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
        if number == signal.SIGINT and self._interrupted:
            os._exit(128 + number)
        self._interrupted = self._interrupted or number == signal.SIGINT
        self.received = self.received or number

    def _listen(self, hears: int) -> None:
        heard: list[int] = []
        while True:
            for number in os.read(hears, 64):
                if number not in STOPS:
                    continue
                if number == signal.SIGINT and number in heard:
                    os._exit(128 + number)
                self.received = self.received or number
                if not heard and number in self.grace:
                    threading.Thread(target=self._end_after, args=(self.grace[number], number), daemon=True).start()
                heard.append(number)

    def _end_after(self, seconds: float, number: int) -> None:
        time.sleep(seconds)
        os._exit(128 + number)
