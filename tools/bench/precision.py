"""Held-out accuracy after RL in emulated FP8 and bfloat16 against float32, on the quickstart's task with a wider model.

    .venv/bin/python tools/bench/precision.py

Two layers of hidden size 384 with experts of 128 and heads of 128, so that blocks of 128 are blocks. All runs start from one
SFT warm start in float32; a seed decides the order of the prompts and the sampling, the same for every precision. In FP8 are
the products of the learner's layers; the engine samples, and evaluates, with the learner's weights in float32 (bfloat16 in
the bfloat16 run). Differences are paired by seed; their intervals are Student's t at 95 % over the seeds. Run it again after
an interruption: finished runs are kept, a begun one continues. `--table` prints the tables of the runs that are there.
"""

from __future__ import annotations

import argparse
import json
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from presets import CONFIG, ROOT, over_seeds, run, wilson

FP8 = ("tensorwise", "delayed", "blockwise", "mxfp8")
SHAPE = dict(hidden_size=384, num_layers=2, num_heads=3, num_kv_heads=1, head_dim=128, moe_intermediate_size=128)
WORLD = ["parallel.ep=1", "parallel.nproc=1", "eval.data.0.size=4500", "log.tensorboard=false", "resume=auto"]
WORLD += ["reward.timeout_seconds=600"]  # the study may be stopped for a while, by hand
SFT = ["sft.optimizer.lr=1e-3", "sft.batch_size=96", "sft.stop_at_loss=0.4"]
RL = ["model.generate=none", "rl.init_from=model", "eval.every=0", "checkpoint.every=10", "checkpoint.keep=1"]
RL += ["log.rollouts_every=0", "log.routing_tokens=0", "rl.optimizer.lr=1e-4"]


def precision(name: str) -> list[str]:
    """The overrides that make a run one of this precision."""
    if name in FP8:
        return [f"model.fp8={name}"]
    return [f"model.dtype={name}"]


def warm_start(folder: Path) -> Path:
    run_dir = folder / "start"
    if not (run_dir / "sft" / "hf" / "model.safetensors").exists():
        model = [f"model.path={folder / 'model'}", *(f"model.generate.{key}={value}" for key, value in SHAPE.items())]
        run("sft", str(CONFIG), f"run_dir={run_dir}", *WORLD, *model, *SFT)
    return run_dir / "sft" / "hf"


def run_dir_of(folder: Path, name: str, seed: int, steps: int) -> Path:
    return folder / f"{name}-{seed}-{steps}"


def train(folder: Path, name: str, seed: int, arguments: argparse.Namespace) -> None:
    """One run, unless it is there."""
    run_dir = run_dir_of(folder, name, seed, arguments.steps)
    if (run_dir / "summary.json").exists():
        return
    print(f"{name}, seed {seed}", flush=True)
    own = [f"seed={seed}", f"run_dir={run_dir}", f"model.path={warm_start(folder)}"]
    own += [f"rl.steps={arguments.steps}", f"rl.prompts_per_step={arguments.prompts}"]
    run("train", str(CONFIG), *WORLD, *RL, *own, *precision(name))


def result(run_dir: Path) -> dict[str, float] | None:
    """What a finished run says of itself."""
    if not (run_dir / "summary.json").exists():
        return None
    rows = [json.loads(line) for line in (run_dir / "rl" / "metrics.jsonl").read_text().splitlines()]
    before, *_, after = [json.loads(line) for line in (run_dir / "rl" / "eval.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["step"]]

    def mean(metric: str, part: list[dict[str, float]] = rows) -> float:
        return statistics.mean(row[metric] for row in part)

    return {
        "before": before["accuracy"],
        "after": after["accuracy"],
        "problems": after["problems"],
        "reward": mean("reward/score", rows[-len(rows) // 4 :]),
        "gap": mean("gap/logprob_mean"),
        "gap_max": max(row["gap/logprob_max"] for row in rows),
        "seconds": statistics.median(row["time/step"] for row in rows),
        "update": statistics.median(row["time/update"] for row in rows),
    }


def tables(found: dict[str, dict[int, dict[str, float]]]) -> list[str]:
    """The runs, then what each precision changes, in Markdown."""
    columns = [
        "precision",
        "seed",
        "before",
        "after",
        "95 % (Wilson, over problems)",
        "reward",
        "gap, mean",
        "gap, max",
        "s/step",
        "s/update",
    ]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, by_seed in found.items():
        for seed, r in sorted(by_seed.items()):
            low, high = wilson(round(r["after"] * r["problems"]), int(r["problems"]))
            lines.append(
                f"| {name} | {seed} | {r['before']:.1%} | {r['after']:.1%} | {low:.1%} to {high:.1%} | {r['reward']:.3f} | "
                f"{r['gap']:.1e} | {r['gap_max']:.1e} | {r['seconds']:.2f} | {r['update']:.2f} |"
            )
    columns = [
        "precision",
        "seeds",
        "after RL",
        "minus float32, points",
        "95 %",
        "reward, minus float32",
        "95 %",
        "gap, mean",
    ]
    lines += ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    exact = found.get("float32", {})
    for name, by_seed in found.items():
        seeds = sorted(by_seed.keys() & exact.keys())
        if not seeds:
            continue
        changes = {key: [by_seed[seed][key] - exact[seed][key] for seed in seeds] for key in ("after", "reward")}
        shown = []
        for key, scale, digits in (("after", 100, 1), ("reward", 1, 3)):
            low, high = (scale * end for end in over_seeds(changes[key]))
            shown += [f"{scale * statistics.mean(changes[key]):+.{digits}f}"]
            shown += [f"{low:+.{digits}f} to {high:+.{digits}f}" if len(seeds) > 1 else ""]
        after, gap = (statistics.mean(by_seed[seed][key] for seed in seeds) for key in ("after", "gap"))
        shown = shown if name != "float32" else [""] * 4
        lines.append(f"| {name} | {len(seeds)} | {after:.1%} | {' | '.join(shown)} | {gap:.1e} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--precisions", nargs="+", default=["float32", *FP8])
    parser.add_argument("--bfloat16-seeds", nargs="*", type=int, default=[1], help="bfloat16 is slow on most CPUs")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "bench" / "precision")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, of one process each")
    parser.add_argument("--table", action="store_true", help="print what is there, run nothing")
    arguments = parser.parse_args()
    wanted = [(name, seed) for seed in arguments.seeds for name in arguments.precisions]
    wanted += [("bfloat16", seed) for seed in arguments.bfloat16_seeds]
    found: dict[str, dict[int, dict[str, float]]] = {}
    if not arguments.table:
        warm_start(arguments.folder)
        with ThreadPoolExecutor(arguments.jobs) as pool:
            for future in [pool.submit(train, arguments.folder, *which, arguments) for which in wanted]:
                future.result()
    for name, seed in wanted:
        done = result(run_dir_of(arguments.folder, name, seed, arguments.steps))
        if done is not None:
            found.setdefault(name, {})[seed] = done
    print("\n".join(["", *tables(found)]))


if __name__ == "__main__":
    main()
