"""Where this rank is in its work, and the end of the job when it stays there for too long.

A rank that hangs takes the others with it, each waiting in a collective: what tells them apart is where each one is, and
its stack. So a rank that runs out of time has every rank of this machine write its stack into its log, and names those
that are elsewhere.
"""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from megarl import launcher
from megarl.config.schema import Watchdog as Limits

STACK_SIGNAL = signal.SIGUSR2  # sent to a rank at any time, it writes its stacks into its log and goes on
MARGIN = 30.0  # seconds beyond the longest limit after which a rank whose interpreter is stuck ends itself
LOST = re.compile(r"closed by peer|reset by peer|broken pipe|connection refused|timed out|timeout", re.IGNORECASE)


class Watchdog:
    """Of one rank, from its start on; one thread, which sleeps.

    `part`: sft, rl, ...; `logs`: the folder of the ranks' logs, where their places are kept. Standard error must be this
    rank's log.
    """

    current: Watchdog | None = None  # of this process, as its signal handlers are

    def __init__(self, part: str, logs: Path, limits: Limits) -> None:
        self.part, self.logs, self.limits = part, logs, limits
        self.rank = int(os.environ.get("RANK", "0"))
        self._place = launcher.Place(logs, self.rank)
        self._step, self._closed = 0, threading.Event()
        self.enter("start")
        faulthandler.register(STACK_SIGNAL, file=sys.stderr, all_threads=True, chain=False)
        given = [seconds for seconds in (limits.seconds, *limits.phases.values()) if seconds]
        if given:
            self._longest, self._period = max(given), min(max(min(given) / 4, 0.05), 15.0)
            self._arm()
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        Watchdog.current = self

    @property
    def where(self) -> str:
        """`rl step 7, update`"""
        return f"{self.part} step {self._step}, {self._phase}" if self._step else f"{self.part}, {self._phase}"

    def at_step(self, number: int) -> None:
        """The step that begins; what is entered from now on belongs to it."""
        self._step = number
        self.enter("between phases")

    def enter(self, phase: str) -> None:
        """From now on this rank is in `phase`, and its time starts."""
        limit = self.limits.phases.get(phase.replace(" ", "_"), self.limits.seconds)
        self._phase, self._deadline = phase, time.monotonic() + (limit or float("inf"))
        self._place.write(self.where)

    def close(self) -> None:
        """The work is done."""
        self._closed.set()
        faulthandler.cancel_dump_traceback_later()
        launcher.Place.path(self.logs, self.rank).unlink(missing_ok=True)
        Watchdog.current = None

    def _watch(self) -> None:
        while not self._closed.wait(self._period):
            self._arm()
            if time.monotonic() >= self._deadline:
                self._abort()

    def _arm(self) -> None:
        """The last resort: a thread of the interpreter's own, which needs no lock of Python's, unless it is armed again."""
        faulthandler.dump_traceback_later(self._longest + MARGIN, exit=True, file=sys.stderr)

    def _abort(self) -> None:
        phase = self._phase.replace(" ", "_")
        limit = self.limits.phases.get(phase, self.limits.seconds)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        line = (
            f"{self.where}: not done after {limit:g} s{self.others()}; the stack of every rank is in its log; if this was "
            f"no hang, set watchdog.phases.{phase} higher"
        )
        print(line, file=sys.stderr, flush=True)
        launcher.report_failure(line, 1)
        if not launcher.launched_locally():
            print(f"error: rank {self.rank}: {line}", file=launcher.error_stream(), flush=True)
        os._exit(1)

    def others(self) -> str:
        """Have the other ranks of this machine write their stacks; says which of them are elsewhere, or stopped."""
        said = []
        for rank, process in sorted(_other_ranks()):
            place = launcher.Place.read(self.logs, rank)
            stopped = _is_stopped(process)
            with suppress(ProcessLookupError):
                os.kill(process, STACK_SIGNAL)
                if stopped:
                    os.kill(process, signal.SIGCONT)  # it writes its stack, and then is ended with the others
            if stopped or place != self.where:
                said.append(f"rank {rank} is {'stopped ' if stopped else ''}in {place or 'no known place'}")
        time.sleep(0.5)  # until they have written
        return "".join(f"; {line}" for line in said)


def placed(line: str, error: BaseException | None = None) -> str:
    """`line`, an error's, with this rank's step and phase before it; and a word on what a broken collective means."""
    watchdog = Watchdog.current
    if watchdog is None:
        return line
    if error is not None and type(error).__module__.startswith(("torch", "builtins")) and LOST.search(line):
        waited = watchdog.others() if re.search("timed out|timeout", line, re.IGNORECASE) else ""
        line = f"a collective lost a peer{waited}: {line}"
    own = watchdog.where.partition(",")[0]
    return f"{watchdog.where}: {line.removeprefix(f'{own}: ')}"


def _other_ranks() -> Iterator[tuple[int, int]]:
    """(rank, process) of the other ranks that this one's parent has started."""
    for task in Path(f"/proc/{os.getppid()}/task").glob("*/children"):
        with suppress(OSError):
            for process in task.read_text().split():
                with suppress(OSError):
                    found = re.search(rb"\0RANK=(\d+)\0", b"\0" + Path(f"/proc/{process}/environ").read_bytes())
                    if found and int(process) != os.getpid():
                        yield int(found[1]), int(process)


def _is_stopped(process: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "tT"
    return False
