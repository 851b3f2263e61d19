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
import statistics
import sys
import time
from pathlib import Path
from typing import Any

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
            start = time.perf_counter()
            trainer.step(number)
            stepped = time.perf_counter()
            if kind in (BEHIND, WAITED):
                saver.save(number, wait=kind == WAITED)
            else:
                saver.poll()
            ended = time.perf_counter()
            rows.append(
                {"kind": kind, "step": stepped - start, "boundary": ended - stepped, "busy": bool(saver._pending)}
            )
        saver.finish()
        trainer.loop.close()
        every = trainer.mesh.all_gather_object(rows)
        if trainer.mesh.is_main:
            newest = max(saver.folder.glob("step_*"))
            size = sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())
            Path(out).write_text(json.dumps({"ranks": every, "bytes": size}))


def table(found: dict[str, Any]) -> list[str]:
    """Medians over the rounds after the first, of the slower rank at each place."""
    rows = [max(ranks, key=lambda row: row["step"] + row["boundary"]) for ranks in zip(*found["ranks"], strict=True)][
        4:
    ]

    def median(name: str, *kinds: int) -> float:
        return statistics.median(row[name] for row in rows if row["kind"] in kinds)

    step, quiet = median("step", PLAIN, BEHIND, WAITED), median("boundary", PLAIN)
    behind, waited = (median("boundary", kind) - quiet for kind in (BEHIND, WAITED))
    slower = median("step", BESIDE) - step
    late = sum(row["busy"] for row in rows if row["kind"] == BESIDE)
    rounds = len(rows) // 4
    return [
        f"checkpoint {found['bytes'] / 1e6:.0f} MB, step {step:.2f} s, {rounds} rounds",
        "| save | holds up at the boundary | makes the next step longer | together, of a step |",
        "|---|---|---|---|",
        f"| waited for | {waited:.3f} s | | {waited / step:.1%} |",
        f"| by a thread | {behind:.3f} s | {slower:+.3f} s | {(behind + slower) / step:.1%} |",
        f"not written yet at the end of the next step: {late} of {rounds}",
    ]


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
