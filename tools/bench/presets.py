"""Held-out accuracy of several presets after RL on the quickstart's task, from the same warm starts on the same budget.

    .venv/bin/python tools/bench/presets.py --steps 60

Every seed has one SFT warm start; every preset trains from it for the same number of rollout steps, prompts, samples and
optimizer steps, at the same learning rate. Accuracies are greedy, on the quickstart's held-out problems. The interval of
one run is Wilson's at 95 % over the problems; that of a preset adds the spread over the seeds (Student's t). Prints the
tables that are in results/presets.md.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "cpu" / "quickstart.yaml"
MEGARL = Path(sys.executable).with_name("megarl")
Z = 1.959964
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}  # two-sided 95 % points of Student's t
OWN = {
    "gspo": ["rl.algorithm.gate.low=0.012", "rl.algorithm.gate.high=0.016"],  # as the quickstart, for short responses
    "ppo": ["rl.critic.optimizer.lr=3e-4"],
}


def wilson(right: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    p, z2 = right / n, Z * Z
    centre, half = (p + z2 / (2 * n)) / (1 + z2 / n), Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return centre - half, centre + half


def over_seeds(values: list[float]) -> tuple[float, float]:
    """95 % interval of the mean over seeds."""
    mean = statistics.mean(values)
    if len(values) == 1:
        return mean, mean
    half = T95[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


def run(*arguments: str) -> None:
    done = subprocess.run([MEGARL, *arguments], cwd=ROOT, check=False, stdout=subprocess.DEVNULL)
    if done.returncode:
        raise SystemExit(f"megarl {' '.join(arguments)}: exit code {done.returncode}")


def warm_start(folder: Path, seed: int) -> Path:
    run_dir = folder / f"sft-{seed}"
    if not (run_dir / "sft" / "hf" / "model.safetensors").exists():
        run("sft", str(CONFIG), f"seed={seed}", f"run_dir={run_dir}", "resume=auto")
    return run_dir / "sft" / "hf"


def train(folder: Path, preset: str, seed: int, start: Path, steps: int) -> dict[str, float]:
    """Accuracy before and after RL, and what it cost."""
    run_dir = folder / f"{preset}-{seed}-{steps}"
    if not (run_dir / "summary.json").exists():
        own = [f"rl.algorithm={{preset: {preset}}}", f"rl.steps={steps}", "eval.every=0", *OWN.get(preset, [])]
        own += [f"seed={seed}", f"run_dir={run_dir}", "rl.init_from=model", f"model.path={start}"]
        run("train", str(CONFIG), "resume=auto", "model.generate=none", "log.rollouts_every=0", *own)
    rows = [json.loads(line) for line in (run_dir / "rl" / "metrics.jsonl").read_text().splitlines()]
    evaluated = [json.loads(line) for line in (run_dir / "rl" / "eval.jsonl").read_text().splitlines()]
    steps_done = [row for row in rows if row["step"]]
    return {
        "before": evaluated[0]["accuracy"],
        "after": evaluated[-1]["accuracy"],
        "problems": evaluated[-1]["problems"],
        "groups": sum(row["groups/sampled"] for row in steps_done),
        "seconds": statistics.median(row["time/step"] for row in steps_done),
        "memory": max(row["memory/peak_rss_gib"] for row in steps_done),
        "zero": statistics.mean(row["policy/zero_grad_frac"] for row in steps_done if "policy/zero_grad_frac" in row),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["grpo", "dapo", "gspo", "sapo", "ppo"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "bench" / "presets")
    arguments = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {preset: [] for preset in arguments.presets}
    for seed in arguments.seeds:
        start = warm_start(arguments.folder, seed)
        for preset in arguments.presets:
            result = train(arguments.folder, preset, seed, start, arguments.steps)
            found[preset].append(result)
            low, high = wilson(round(result["after"] * result["problems"]), int(result["problems"]))
            print(
                f"| {preset} | {seed} | {result['before']:.1%} | {result['after']:.1%} | {low:.1%} to {high:.1%} |",
                flush=True,
            )
    print(
        "\n| preset | before | after | 95 % over seeds | gain | groups sampled | seconds a step | memory | no gradient |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for preset, results in found.items():
        mean = {key: statistics.mean(r[key] for r in results) for key in results[0]}
        low, high = over_seeds([r["after"] for r in results])
        gains = over_seeds([r["after"] - r["before"] for r in results])
        print(
            f"| {preset} | {mean['before']:.1%} | {mean['after']:.1%} | {low:.1%} to {high:.1%} | "
            f"{100 * gains[0]:+.1f} to {100 * gains[1]:+.1f} | {mean['groups']:.0f} | {mean['seconds']:.2f} | "
            f"{mean['memory']:.1f} GiB | {mean['zero']:.0%} |"
        )


if __name__ == "__main__":
    main()
