"""How long a save holds a run up, of one step: .venv/bin/python tools/bench/checkpoint_stall.py [--rounds 6] [--layout ep=2]

GRPO-sized steps of the 20M model of vs_trl.py on two ranks, as `megarl train` takes them. A round is four steps: one with
nothing after it, one with a save that a thread writes (`checkpoint.async_save`) after it, the one during which that is
written, one with a save that is waited for after it. What the thread costs is what the boundary takes longer, and what
the step beside it takes longer than the median of the plain ones of the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from vs_trl import HERE, ROOT, WORK, ensure_model, megarl_config

PLAIN, BEHIND, BESIDE, WAITED = range(4)


def rank(config: str, rounds: int, out: str) -> None:
    from megarl import platform
    from megarl.config import load_config
    from megarl.parallel import Mesh
    from megarl.rewards import RewardRunner

    platform.setup()
    cfg = load_config(config, require="rl")
    with RewardRunner(cfg.reward) as rewards:
        from megarl.trainers.rl import RLTrainer

        trainer = RLTrainer(cfg, Mesh.build(cfg.parallel), rewards)
        trainer.prepare()
        saver, rows = trainer.loop.checkpointer, []
        for number in range(1, 4 * (rounds + 1) + 1):
            kind = number % 4
            trainer.mesh.barrier()
            start = clocks()
            trainer.step(number)
            stepped = clocks()
            if kind in (BEHIND, WAITED):
                saver.save(number, wait=kind == WAITED)
            else:
                saver.poll()
            step, boundary = stepped - start, clocks() - stepped
            rows.append(
                {"kind": kind, "step": step.tolist(), "boundary": boundary.tolist(), "busy": bool(saver._pending)}
            )
        saver.finish()
        trainer.loop.close()
        every = trainer.mesh.all_gather_object(rows)
        if trainer.mesh.is_main:
            newest = max(saver.folder.glob("step_*"))
            size = sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())
            Path(out).write_text(json.dumps({"ranks": every, "bytes": size}))


def clocks() -> np.ndarray:
    """Seconds on the wall, and of CPU time of all threads of this rank."""
    return np.array([time.perf_counter(), time.process_time()])


def table(found: dict[str, Any]) -> list[str]:
    """Medians over the rounds after the first, of the slower rank at each place."""
    rows = [
        max(ranks, key=lambda row: row["step"][0] + row["boundary"][0]) for ranks in zip(*found["ranks"], strict=True)
    ]
    rows = rows[4:]

    def median(name: str, *kinds: int) -> np.ndarray:
        return np.median([row[name] for row in rows if row["kind"] in kinds], axis=0)

    step, quiet = median("step", PLAIN, BEHIND, WAITED), median("boundary", PLAIN)
    behind, waited = (median("boundary", kind) - quiet for kind in (BEHIND, WAITED))
    slower = median("step", BESIDE) - step
    late, rounds = sum(row["busy"] for row in rows if row["kind"] == BESIDE), len(rows) // 4
    lines = [
        f"checkpoint {found['bytes'] / 1e6:.0f} MB, step {step[0]:.2f} s, {step[1]:.2f} s of CPU a rank, {rounds} rounds",
        "| save | seconds | holds up at the boundary | makes the next step longer | boundary, of a step | together, of a step |",
        "|---|---|---|---|---|---|",
    ]
    for place, kind in enumerate(("wall", "CPU")):
        a, b, c, d = (x[place] for x in (waited, behind, slower, step))
        lines.append(f"| waited for | {kind} | {a:.3f} | | {a / d:.1%} | {a / d:.1%} |")
        lines.append(f"| by a thread | {kind} | {b:.3f} | {c:+.3f} | {b / d:.1%} | {(b + c) / d:.1%} |")
    return [*lines, f"not written yet at the end of the next step: {late} of {rounds}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="20m", choices=["1m", "20m"])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--layout", default="", help="a=b of the parallel section, separated by commas")
    args = parser.parse_args()
    from megarl import launcher

    model = ensure_model(args.model, Path(sys.executable))
    out = WORK / "out-checkpoint-stall"
    shutil.rmtree(out, ignore_errors=True)
    config = megarl_config(model, out, ep=1)
    config["parallel"] |= {k: json.loads(v) for k, v in (item.split("=") for item in args.layout.split(",") if item)}
    file, result = WORK / "checkpoint-stall.yaml", WORK / "checkpoint-stall.json"
    file.write_text(json.dumps(config))
    os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{HERE}"
    command = [sys.executable, __file__, "rank", str(file), str(args.rounds), str(result)]
    code = launcher.launch(command, config["parallel"]["nproc"], out / "logs", 5)
    if code:
        raise SystemExit(code)
    print("\n".join(table(json.loads(result.read_text()))))
    shutil.rmtree(out)


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        rank(sys.argv[2], int(sys.argv[3]), sys.argv[4])
        os._exit(0)
    main()
