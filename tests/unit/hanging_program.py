"""What the watchdog's tests start as a rank: `hanging_program.py HOW LOGS`; it stays in a phase of step 7, or fails in it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

from megarl import cli
from megarl.config.schema import Watchdog as Limits
from megarl.trainers import watchdog
from megarl.trainers.display import Phases

how, logs, rank = sys.argv[1], Path(sys.argv[2]), os.environ["RANK"]


def hang() -> None:
    time.sleep(60)


def hang_with_the_lock() -> None:
    ctypes.PyDLL(None).sleep(60)  # no other thread runs Python meanwhile


def stop_itself() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(60)  # whoever lets it go on to see its stack finds it here


def fail() -> None:
    raise ValueError("the engine is gone")


def lose_a_peer() -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    if rank == "1":
        os._exit(0)  # as a machine does: without a word
    dist.barrier()


WAYS = {
    "stopped": {"0": ("update", hang), "1": ("reward", stop_itself)},
    "elsewhere": {"0": ("update", hang), "1": ("reward", hang)},
    "locked": {"0": ("update", hang_with_the_lock), "1": ("update", hang)},
    "failed": {"0": ("update", hang), "1": ("generate", fail)},
    "lost": {"0": ("gather", lose_a_peer), "1": ("gather", lose_a_peer)},
}


def work(**_: object) -> None:
    phase, act = WAYS[how][rank]
    # the rank that is to be the one that speaks has the shorter limit
    limit = 0.0 if how in ("failed", "lost") or (how, rank) == ("locked", "1") else 1.0 if rank == "0" else 30.0
    watchdog.MARGIN = 1.0
    found = watchdog.Watchdog("rl", logs, Limits(seconds=0.0, phases={phase: limit} if limit else {}))
    phases = Phases(on_enter=found.enter)
    found.at_step(7)
    with phases("prepare"):
        pass
    with phases(phase):
        act()


cli.app = work
cli.main()
