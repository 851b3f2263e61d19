"""What watchdog and alarms cost a step: `python tools/bench/checks.py`, beside the quickstart's shortest step.

Phases are entered with and without a watchdog, in turns, and alarms take in a row of real metrics; `--step` is the
median time of a step that the cost is compared with.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

from megarl.config.schema import Alarms as AlarmSettings
from megarl.config.schema import Watchdog as Limits
from megarl.trainers.alarms import WATCHED, Alarms
from megarl.trainers.display import Phases
from megarl.trainers.watchdog import Watchdog

PHASES = 20  # entered in an RL step, at most
ROUNDS, REPEATS = 41, 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--step", type=float, default=0.63, help="seconds of a step (README: megarl against TRL, 1.15M)"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        watchdog = Watchdog("rl", Path(folder), Limits())
        watched, plain = Phases(on_enter=watchdog.enter), Phases()
        with_it, without = [], []
        for _ in range(ROUNDS):
            with_it.append(_step_of(watched))
            without.append(_step_of(plain))
        alarms, seconds = Alarms(AlarmSettings()), []
        row = (
            {names[0]: 1.0 for names, _ in WATCHED.values()}
            | {f"other/{n}": 1.0 for n in range(100)}
            | {"reward/mean": 0.5}
        )
        for number in range(ROUNDS * REPEATS):
            start = time.perf_counter()
            alarms.most("", "policy/grad_norm_max")
            alarms.observe(number + 1, row)
            seconds.append(time.perf_counter() - start)
        watchdog.close()
    phases, checks = median(with_it) - median(without), median(seconds)
    print(f"watchdog, {PHASES} phases   {phases * 1e6:8.1f} us a step")
    print(f"alarms                {checks * 1e6:8.1f} us a step")
    print(f"both, of a {args.step:g} s step {(phases + checks) / args.step:.4%}")


def _step_of(phases: Phases) -> float:
    start = time.perf_counter()
    for _ in range(REPEATS * PHASES):
        with phases("update"):
            pass
    return (time.perf_counter() - start) / REPEATS


if __name__ == "__main__":
    main()
