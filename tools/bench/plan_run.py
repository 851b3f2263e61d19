"""Is the planner right about a whole run? The memory ledger of `megarl train` and a sync's messages, beside the plan's.

    python tools/bench/plan_run.py [--cases NAME,...] [--out FILE]

Trains a small model for two RL steps in each case (at the first one's start moments do not exist) and compares what the
ledger has of every owner the plan knows, all ranks together, in the phases that both have. A CPU's ranks read each
other's weights in place, so messages, which cannot be seen there, are those of an exchange that is told that it can map
nothing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from tools.bench.plan import LIMIT, error, line  # noqa: E402

MODEL = dict(num_layers=4, hidden_size=256, num_heads=8, num_kv_heads=4, head_dim=32, num_experts=16, top_k=2)
MODEL |= dict(moe_intermediate_size=128, context=128)
TASK = dict(type="reasoning_gym", task="basic_arithmetic", size=200, params=dict(min_terms=2, max_terms=2, max_digits=2))
EP2 = dict(ep=2, nproc=2)
LOCK_STEP = dict(data_parallel=2, expert_parallel=True)
# name -> sections that replace the common ones
CASES: dict[str, dict[str, Any]] = {
    "ep2 -> 2 engines": {"parallel": EP2},
    "dp2 -> tp2": {"parallel": dict(nproc=2), "rollout": dict(tensor_parallel=2)},
    "tp2 -> tp2+experts": {"parallel": dict(tp=2), "rollout": dict(tensor_parallel=2, expert_parallel=True)},
    "pp2 -> dp2+experts": {"parallel": dict(pp=2), "rollout": LOCK_STEP},
    "ep2 -> 2 engines, bfloat16": {"parallel": EP2, "model": dict(dtype="bfloat16"), "rollout": dict(dtype="bfloat16")},
    "ep2 -> 2 engines, fp8": {
        "parallel": EP2, "model": dict(dtype="bfloat16"), "rollout": dict(dtype="bfloat16", fp8="blockwise"),
    },
    "dp2, ppo with reference": {"parallel": dict(nproc=2), "rl": dict(algorithm=dict(preset="ppo"))},
}  # fmt: skip
EXCHANGES = {  # name -> (learner, rollout)
    "ep2 -> 2 engines, sent": (dict(ep=2), {}),
    "tp2 -> dp2+experts, sent": (dict(tp=2), LOCK_STEP),
    "pp2 -> tp2, sent": (dict(pp=2), dict(tensor_parallel=2)),
    "pp2ep2 -> 2 x dp2+experts, sent": (dict(pp=2, ep=2), LOCK_STEP),
}
PHASES = {"rollout": "rollout", "sync": "sync", "log_probs": "old_log_probs", "update": "update"}


def config_of(case: str, folder: Path) -> dict[str, Any]:
    sections = CASES[case]
    out: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "model": {"path": str(folder / "model"), "generate": MODEL | {"tokenizer": {"vocab_size": 512, "train_on": [TASK]}}},
        "rl": {"data": [TASK], "algorithm": {"preset": "gspo"}, "steps": 2, "prompts_per_step": 4, "samples_per_prompt": 4},
        "rollout": {"max_response_tokens": 8, "kv_cache_gib": 0.25},
        "reward": {"type": "reasoning_gym"},
        "log": {"tensorboard": False},
    }
    for name, section in sections.items():
        out[name] = out.get(name, {}) | section
    return out


def of_run(case: str, folder: Path) -> list[tuple[str, str, float, float]]:
    """(case, what, measured, predicted) bytes of every owner, all ranks together: the phase that is farthest off."""
    from megarl.config import load_config, smallest_world
    from megarl.metrics import read_jsonl
    from megarl.plan.hardware import GIB, named
    from megarl.plan.memory import plan_memory

    file = folder / "config.yaml"
    file.write_text(json.dumps(config_of(case, folder)))
    done = subprocess.run([sys.executable, "-m", "megarl", "train", str(file)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{case}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    row = read_jsonl(folder / "run" / "rl" / "metrics.jsonl")[-1]
    cfg = load_config(file)
    world = cfg.parallel.nproc or smallest_world(cfg)
    plan = plan_memory(cfg, world, named("cpu"))
    worst: dict[str, tuple[str, str, float, float]] = {}
    for phase, planned in PHASES.items():
        owners = {name for rank in plan.ranks for name in rank.phases[planned]}
        ours = {key.rpartition("/")[2] for key in row if key.startswith(f"memory/host/{phase}/")}
        for owner in sorted(owners & ours | ({"sync_buffers"} if phase == "sync" else set())):
            predicted = sum(rank.phases[planned].get(owner, (0, 0))[1] for rank in plan.ranks) * world / len(plan.ranks)
            found = (case, f"{owner} ({phase})", row.get(f"memory/host/{phase}/{owner}", 0.0) * GIB, predicted)
            if owner not in worst or error(found) > error(worst[owner]):
                worst[owner] = found
    return list(worst.values())


def of_exchange(case: str, folder: Path) -> list[tuple[str, str, float, float]]:
    """Most bytes of messages of a rank, of a sync that cannot read in place."""
    from tests.dist.harness import run_ranks

    parallel, rollout = EXCHANGES[case]
    world = 2 ** len(parallel)
    config = config_of("ep2 -> 2 engines", folder) | {"parallel": parallel | {"nproc": world}}
    config["rollout"] |= rollout
    ranks = run_ranks("tools.bench.plan_run:exchanged", world, config, timeout=200)
    return [(case, f"messages of rank {n}", *found) for n, found in enumerate(ranks)]


def exchanged(config: dict[str, Any]) -> tuple[int, int]:
    """One rank of `of_exchange`: (measured, predicted)."""
    from dataclasses import replace

    from megarl import platform
    from megarl.config.schema import Config
    from megarl.convert.load import matched
    from megarl.learner.policy import Policy
    from megarl.parallel import Mesh
    from megarl.plan.engine import buffer_bytes, portion_bytes
    from megarl.plan.memory import spec_of_config
    from megarl.plan.volume import sync_plan
    from megarl.platform.shared_memory import SharedWindows
    from megarl.rollout import exchange

    cfg = Config(**config)
    mesh, spec = Mesh.build(cfg.parallel), spec_of_config(cfg)
    chunks = Policy(spec, cfg, mesh, optimizer=None).modules
    plan = replace(sync_plan(cfg, spec, mesh.world_size), portion=portion_bytes(is_cpu=False))
    exchange.platform.map_tensors = lambda *_: None
    exchange.platform.shared_windows = lambda *_: SharedWindows({}, {}, 1.0)
    real = exchange.Exchange(plan, mesh)
    for _ in real.blocks({name: tensor.detach() for name, (_, tensor) in matched(chunks, spec).items()}):
        pass
    platform.synchronize()
    return real.window_bytes + real.message_bytes, buffer_bytes(plan, mesh.rank, is_cpu=False)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", default=";".join([*CASES, *EXCHANGES]), help="split by ;")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = []
    for case in arguments.cases.split(";"):
        with tempfile.TemporaryDirectory() as name:
            found = (of_run if case in CASES else of_exchange)(case, Path(name))
        rows += found
        print("\n".join(map(line, found)), flush=True)
    worst = max(rows, key=error)
    summary = f"{len(rows)} figures. Worst error {error(worst):.1%}: {worst[1]} of {worst[0]}."
    print(summary)
    if arguments.out:
        versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "megatron-core"))
        head = [
            "## A run's ledger and a sync's messages, measured and predicted", "",
            f"    {' '.join(['python', 'tools/bench/plan_run.py', *sys.argv[1:]])}", "",
            f"{datetime.date.today()}, {len(os.sched_getaffinity(0))} CPU cores, {versions}. {summary}", "",
            "| case | what | measured | predicted | error |", "|---|---|---|---|---|",
        ]  # fmt: skip
        arguments.out.write_text("\n".join([*head, *map(line, rows)]) + "\n")
    if error(worst) > LIMIT:
        sys.exit(1)


if __name__ == "__main__":
    main()
