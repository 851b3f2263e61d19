"""Learner and rollout in BF16 and in block-wise FP8, all four combinations: how far their log-probs are apart, and what
truncated importance weights make of it.

    .venv/bin/python tools/bench/fp8_rollout.py

A Qwen3-MoE of hidden size 384 on the quickstart's task has a short SFT warm start; from it every combination takes the same
few RL steps, without a correction and with token weights truncated at 2. Up to the first update all eight runs have the
same weights, so the first step compares rollouts alone; with the same rollout its samples are the same too. Finished runs
are kept in --folder and not run again. Prints the table that is in results/fp8_rollout.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "cpu" / "quickstart.yaml"
MODEL = dict(hidden_size=384, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=128, moe_intermediate_size=256)
PRECISIONS = {"BF16": "none", "FP8": "blockwise"}
CORRECTIONS = {"none": "none", "truncate at 2": "{level: token, mode: truncate, high: 2.0}"}


def megarl(*arguments: str) -> None:
    command = [sys.executable, "-m", "megarl", *arguments]
    done = subprocess.run(command, cwd=ROOT, check=False, stdout=subprocess.DEVNULL)
    if done.returncode:
        raise SystemExit(f"megarl {' '.join(arguments)}: exit code {done.returncode}")


def warm_start(folder: Path, steps: int) -> Path:
    run_dir, out = folder / f"sft-{steps}", folder / f"sft-{steps}" / "sft" / "hf"
    if not (out / "model.safetensors").exists():
        shape = [f"model.generate.{key}={value}" for key, value in MODEL.items()]
        shape += [f"model.path={folder / 'model'}", "parallel={nproc: 1}", "checkpoint.every=0", "log.tensorboard=false"]
        megarl("sft", str(CONFIG), f"run_dir={run_dir}", "resume=auto", f"sft.steps={steps}", "sft.batch_size=48", *shape)
    return out


def train(folder: Path, start: Path, learner: str, rollout: str, correction: str, steps: int) -> list[dict[str, float]]:
    """The metrics of every RL step."""
    name = f"{learner}-{rollout}-{correction.split()[0]}-{steps}"
    run_dir = folder / name
    if not (run_dir / "summary.json").exists():
        algorithm = f"{{preset: grpo, kl: {{coef: 0}}, correction: {CORRECTIONS[correction]}}}"
        megarl(
            "train", str(CONFIG), f"run_dir={run_dir}", "resume=auto", "rl.init_from=model", f"model.path={start}",
            "model.generate=none", "model.dtype=bfloat16", f"model.fp8={PRECISIONS[learner]}",
            f"rollout.fp8={PRECISIONS[rollout]}", f"rl.algorithm={algorithm}", f"rl.steps={steps}", "eval.data=[]",
            "eval.every=0", "rl.optimizer_steps_per_rollout=2", "rl.prompts_per_step=8", "parallel={nproc: 1}",
            "log.routing_tokens=256", "log.tensorboard=false", "log.rollouts_every=0", "rollout.sync_check=full",
        )  # fmt: skip
    rows = [json.loads(line) for line in (run_dir / "rl" / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["step"]]


def line(learner: str, rollout: str, correction: str, rows: list[dict[str, float]]) -> str:
    """One row of the table: a number of the first step, then of all of them where they differ in kind."""
    mean = {key: statistics.mean(row[key] for row in rows) for key in rows[0]}
    first, low, high = rows[0], min(row["mismatch/rho_min"] for row in rows), max(row["mismatch/rho_max"] for row in rows)
    weights = mean["mismatch/weight_mean"] ** 2 / mean["mismatch/weight_squared"]
    ratios = mean["mismatch/rho_mean"] ** 2 / mean["mismatch/rho_squared"]
    return (
        f"| {learner} | {rollout} | {correction} | {first['gap/logprob_mean']:.1e} | {mean['gap/logprob_mean']:.1e} | "
        f"{max(row['gap/logprob_max'] for row in rows):.2f} | {mean['mismatch/rho_mean']:.3f} | {low:.2f} to {high:.2f} | "
        f"{ratios:.4f} | {weights:.4f} | {mean['mismatch/kl_k3']:.1e} | {first['policy/grad_norm']:.3f} | "
        f"{max(row['sync/gap_mean'] for row in rows):.1e} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sft-steps", type=int, default=40)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "bench" / "fp8_rollout")
    arguments = parser.parse_args()
    start = warm_start(arguments.folder, arguments.sft_steps)
    print(
        "| learner | rollout | correction | gap, first step | gap, all | largest | ratio, mean | ratios | share of tokens by "
        "ratios | by weights | KL | gradient norm | gap of a sync |"
    )
    print("|" + "---|" * 13)
    for rollout in PRECISIONS:
        for learner in PRECISIONS:
            for correction in CORRECTIONS:
                rows = train(arguments.folder, start, learner, rollout, correction, arguments.steps)
                print(line(learner, rollout, correction, rows), flush=True)


if __name__ == "__main__":
    main()
