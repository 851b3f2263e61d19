"""Scores responses whose verifier misbehaves, each among good ones, and prints what happened as JSON."""

from __future__ import annotations

import json
import os
import sys
import time

from megarl.config.schema import Reward
from megarl.rewards import RewardRunner
from megarl.rewards.sandbox import descendants
from megarl.types import Prompt

TIMEOUT = 1.5


def main() -> None:
    limits = {"memory_gib": 0.3, "max_processes": 40, "cpu_seconds": 1, "max_failed_fraction": 1.0}
    reward = Reward(type="bad_verifier:score", timeout_seconds=TIMEOUT, failed_score=-1, **limits)
    with RewardRunner(reward) as runner:
        out = {"missing": runner.missing, "cases": {}}
        ask(runner, ["good"] * 20)
        for case in sys.argv[1:]:
            texts = ["good"] * 6 + [case] + ["good"] * 6
            before = time.monotonic()
            results = ask(runner, texts)
            seconds = time.monotonic() - before
            out["cases"][case] = {
                "seconds": seconds,
                "bad": results[6],
                "good": results[:6] + results[7:],
                "left": left_over(),
            }
        out["workers"] = len(runner._workers)
    out["at the end"] = len(descendants(os.getpid())) + len(left_over())
    print(json.dumps(out))


def ask(runner: RewardRunner, texts: list[str]) -> list[tuple]:
    found = runner.score([(Prompt("p", (1,), "4"), text) for text in texts])
    return [(str(result.score), result.failed, result.reason) for result in found]


def left_over() -> list[str]:
    """Processes a verifier has started and that are still there: they sleep under a name of their own."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                if b"left-over-of-a-verifier" in file.read():
                    found.append(pid)
        except OSError:
            continue
    return found


if __name__ == "__main__":
    main()
