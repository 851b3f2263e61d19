"""megarl as one side of vs_trl.py: python megarl_side.py CONFIG_YAML, one process a rank, RANK and WORLD_SIZE set.

What `megarl train` runs, with a turn taken after every step. One turn is one whole iteration of its loop, from the end
of one step to the end of the next: the tail of the loop (metrics file, display, stop check) is in it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

from turns import Turns

from megarl import platform
from megarl.config import load_config
from megarl.config.schema import Config
from megarl.parallel import Mesh
from megarl.rewards import RewardRunner


class OutOfTurns(Exception):
    """The other end has seen enough."""


def main(cfg: Config) -> None:
    platform.setup()
    with RewardRunner(cfg.reward) as rewards:
        from megarl.trainers.rl import RLTrainer

        trainer = RLTrainer(cfg, Mesh.build(cfg.parallel), rewards)
        trainer.prepare()
        turns, start = Turns(), 0.0
        samples = cfg.rl.prompts_per_step * cfg.rl.samples_per_prompt

        def wait() -> None:
            nonlocal start
            if not turns.wait():
                raise OutOfTurns
            start = time.perf_counter()

        def step(number: int) -> Mapping[str, float]:
            metrics = trainer.step(number)
            seconds = time.perf_counter() - start
            phases = {name[5:]: metrics[name] for name in metrics if name.startswith("time/") and name != "time/step"}
            phases["other"] = seconds - sum(phases.values())
            tokens = round(metrics["response/length_mean"] * samples) if trainer.mesh.is_main else 0
            turns.say(step=seconds, phases=phases, tokens=tokens)
            wait()
            return metrics

        turns.say(ready=True)
        try:
            wait()
            trainer.loop.run(step)
        except OutOfTurns:
            trainer.loop.close()


if __name__ == "__main__":
    main(load_config(sys.argv[1], require="train"))
