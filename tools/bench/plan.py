"""Is the planner right? Bytes by owner and communication by group of real optimizer steps, beside `megarl plan`'s.

    python tools/bench/plan.py [--layouts tp2,pp2,...] [--rounds N] [--out FILE]

The layouts of `megarl verify layouts`, its small model and its uneven batch four times as long, over gloo; see
plan_side.py for what is counted. Of activations and tokens sent to experts, which depend on where routers send them, the
mean over the ranks of a stage is compared, of everything else the fullest rank.
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools" / "bench")]

LAYOUTS = (
    "one,one+recompute,one+selective,dp2,dp2+distopt,tp2,pp2,pp2+recompute,pp2vpp2,ep2,ep2+allgather,ep2+distopt,ep2+selective,"
    "tp2etp2,cp2,tp2ep2+distopt,cp2ep2+recompute,pp2cp2+selective,tp2pp2ep2"
)
TIMES = 4  # the oracle's lengths
LIMIT = 0.10


def config_of(name: str, folder: Path, family: str = "qwen3_moe") -> tuple[dict[str, Any], int]:
    """(configuration, ranks) of a layout, as JSON; the model's config.json is in `folder`."""
    from megarl.verify.layouts.names import BUDGET, parse

    layout = parse(name)
    parallel = layout.parallel(nproc=layout.world).model_dump(mode="json")
    rl = {"data": [], "algorithm": {"preset": "gspo"}, "micro_batch_tokens": BUDGET * TIMES, "optimizer_steps_per_rollout": 1}
    return {"model": {"path": str(folder), "layers": "torch"}, "parallel": parallel, "rl": rl}, layout.world


def predict(config: dict[str, Any], world: int, ranks: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Stage -> what the planner says of the same sequences in the same rows."""
    from megarl.config.schema import Config
    from megarl.plan.activations import Activations, Row, most_kept
    from megarl.plan.held import held, stage_ranks
    from megarl.plan.memory import models_of, spec_of_config
    from megarl.plan.shape import ModelShape, Rows
    from megarl.plan.volume import layout_of, update_volumes

    cfg = Config(**config)
    spec, p = spec_of_config(cfg), cfg.parallel
    out = {}
    for rank in stage_ranks(cfg, world):
        stage = rank * p.pp // world
        found = held(cfg, world, rank, models_of(cfg, spec))["policy"]
        mine = [one for one in ranks if one["stage"] == stage]
        kept = []
        for one in mine:
            rows = [Row.of(row["lengths"], p, row["masked"], spec.windows, row["tokens"] * p.cp) for row in one["rows"]]
            acting = [Activations(spec, p, row, 4, "torch", True) for row in rows]
            runs = [acting] if p.pp > 1 else [[one] for one in acting]  # without a pipeline a row is alone
            kept.append(max(most_kept(together, found.layers, stage) for together in runs))
        rows = mine[0]["rows"]
        tokens = statistics.mean(row["tokens"] for one in mine for row in one["rows"]) * p.cp
        sequences = statistics.mean(len(row["lengths"]) for row in rows)
        layout = layout_of(cfg, ModelShape.of(spec), world, Rows(len(rows), tokens, sequences, 0.0))
        sent: dict[str, float] = {}
        for volume in update_volumes(layout, stage):
            sent[volume.group] = sent.get(volume.group, 0.0) + volume.wire
        out[stage] = {
            "weights": found.weights, "gradients": found.gradients, "optimizer": found.optimizer,
            "activations": statistics.mean(kept), "sent": sent,
        }  # fmt: skip
    return out


def compare(name: str, folder: Path) -> list[tuple[str, str, float, float]]:
    """(layout, what, measured, predicted) of every owner and group, stage by stage."""
    from megarl.verify.layouts import step
    from tests.dist.harness import run_ranks

    config, world = config_of(name, folder)
    lengths, prompts = ([n * TIMES for n in found] for found in (step.LENGTHS, step.PROMPTS))
    ranks = run_ranks("tools.bench.plan_side:measure", world, config, lengths, prompts, timeout=200)
    predicted = predict(config, world, ranks)
    rows = []
    for stage, wanted in predicted.items():
        mine = [one for one in ranks if one["stage"] == stage]
        where = f", stage {stage}" if len(predicted) > 1 else ""
        for owner in ("weights", "gradients", "optimizer"):
            rows.append((name, owner + where, max(one[owner] for one in mine), wanted[owner]))
        rows.append((name, "activations" + where, statistics.mean(one["activations"] for one in mine), wanted["activations"]))
        groups = {*wanted["sent"], *(group for one in mine for group in one["sent"])}
        for group in sorted(groups):
            measured = statistics.mean(sum(one["sent"].get(group, {}).values()) for one in mine)
            rows.append((name, f"sent over {group}" + where, measured, wanted["sent"].get(group, 0.0)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layouts", default=LAYOUTS)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    import tempfile

    from megarl.convert import family
    from megarl.convert.hf_io import write_json
    from megarl.models.generate import Generate, spec_of
    from megarl.verify.layouts.model import shrink

    rows: list[tuple[str, str, float, float]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spec = replace(shrink(spec_of(Generate(num_heads=8, num_kv_heads=2))), max_position_embeddings=1024)
        write_json(folder / "config.json", family(spec.family).write_config(spec))
        for layout in arguments.layouts.split(","):
            found = compare(layout, folder)
            rows += found
            for row in found:
                print(line(row), flush=True)
    worst = max(rows, key=error)
    print(f"{len(rows)} figures, worst: {worst[0]}, {worst[1]}: {error(worst):.1%}")
    if arguments.out:
        write(arguments.out, rows)
    if error(worst) > LIMIT:
        sys.exit(1)


def error(row: tuple[str, str, float, float]) -> float:
    _, _, measured, predicted = row
    return abs(predicted - measured) / max(measured, 1.0)


def line(row: tuple[str, str, float, float]) -> str:
    name, what, measured, predicted = row
    return f"| {name} | {what} | {measured:,.0f} | {predicted:,.0f} | {(predicted - measured) / max(measured, 1.0):+.1%} |"


def write(path: Path, rows: list[tuple[str, str, float, float]]) -> None:
    worst = max(rows, key=error)
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "megatron-core"))
    head = [
        "## Bytes and communication, measured and predicted", "",
        f"    {' '.join(['python', 'tools/bench/plan.py', *sys.argv[1:]])}", "",
        f"{datetime.date.today()}, {len(os.sched_getaffinity(0))} CPU cores, {versions}. "
        f"{len({row[0] for row in rows})} layouts, {len(rows)} figures, in bytes a rank. Worst error {error(worst):.1%}: "
        f"{worst[1]} in layout {worst[0]}.", "",
        "| layout | what | measured | predicted | error |", "|---|---|---|---|---|",
    ]  # fmt: skip
    path.write_text("\n".join([*head, *map(line, rows)]) + "\n")


if __name__ == "__main__":
    main()
