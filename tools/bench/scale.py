"""Where the time of an RL step goes from 8 to 4,096 GPUs, and what a weight sync of 1,024 ranks moves: all on paper.

    .venv/bin/python tools/bench/scale.py --svg tools/bench/results/scale.svg

Prints the tables of results/scale.md. The times are those of `megarl.plan.seconds` on H100s for the recipes of
configs/recipes. The syncs are simulated with the plan that a run executes (`megarl.rollout.sync_plan`), rank by rank; no rank
may hold a whole model at any time.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import os
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from megarl import platform
from megarl.config import load_config
from megarl.config.schema import Config, Parallel
from megarl.convert import read_spec
from megarl.convert.rules import Shard
from megarl.models.spec import ModelSpec
from megarl.plan.engine import cache_of, weight_bytes
from megarl.plan.hardware import named
from megarl.plan.seconds import phase_seconds, step_seconds
from megarl.plan.shape import ModelShape, Workload
from megarl.plan.volume import is_reloaded, sync_plan
from megarl.rollout.engine_shards import EngineDegrees
from megarl.rollout.learner_shards import LearnerLayout
from megarl.rollout.sync_plan import SyncPlan

ROOT = Path(__file__).parents[2]
NODE, GPU = 8, "h100"
PROMPTS = 1024  # of 16 responses each: enough for a sequence on each of 4,096 ranks in each of four optimizer steps
SIZES = {
    "qwen3-30b-a3b": (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096),
    "qwen3-235b-a22b": (128, 256, 512, 1024, 2048, 4096),
    "deepseek-v3": (256, 512, 1024, 2048, 4096),
}
REMEDIES = {
    "decode": "larger batches a replica (fewer, wider engines), FP8 rollout (`rollout.fp8`)",
    "tail": "prompts enough that slots stay filled; partial rollouts, for which tokens have a `policy_version`, are not built",
    "decode sends": "engines inside a node (`rollout.tensor_parallel` at most 8), experts over replicas",
    "engine steps": "more sequences a step",
    "sync": "slices straight to the ranks that host them, not full tensors; latent attention is still reloaded whole",
    "all-to-all": "ep inside a node where memory allows it; fewer, fuller rows (`rl.micro_batch_tokens`)",
    "bubble": "rows of like cost (`plan_micro_batches`), virtual stages (`parallel.vpp`), fewer stages",
    "other sends": "tp inside a node, `overlap_grad_reduce`, `overlap_param_gather`",
    "checkpoint": "`checkpoint.async_save`",
    "compute": "FP8 (`model.fp8`), `recompute: selective` where activations fit",
    "memory": "fuller rows; `optimizer.cpu_offload: false`",
}


def parts(cfg: Config, shape: ModelShape, world: int, work: Workload, cache_tokens: float) -> dict[str, float]:
    """Seconds of one step by what they go to; they add up to the step."""
    times = phase_seconds(cfg, shape, named(GPU), world, work, cache_tokens)
    rollout, passes = times["rollout"], times["old_log_probs"] + times["update"]
    tail = rollout.detail["tail"] / rollout.seconds  # of each part, its share
    steady = 1 - tail
    sends = passes.communication - passes.detail.get("ep", 0.0)
    found = {
        "decode": steady * (rollout.memory + rollout.compute),
        "decode sends": steady * rollout.communication,
        "engine steps": steady * rollout.idle,
        "tail": rollout.detail["tail"],
        "sync": times["sync"].seconds,
        "compute": passes.compute,
        "memory": passes.memory,
        "all-to-all": passes.detail.get("ep", 0.0),
        "other sends": sends,
        "bubble": passes.idle,
        "checkpoint": times["checkpoint"].seconds / cfg.checkpoint.every,
    }
    total = step_seconds(times, cfg.checkpoint.every)
    assert abs(sum(found.values()) - total) < 1e-6 * total, (sum(found.values()), total)
    return found


@dataclass(frozen=True)
class Curve:
    """One model over numbers of GPUs, on the same work."""

    model: str
    rows: dict[int, dict[str, float]]


def curve(model: str) -> Curve:
    cfg = load_config(ROOT / f"configs/recipes/{model}-gspo.yaml")
    shape, rows = ModelShape.from_folder(cfg.model.path), {}
    work = replace(Workload.of(cfg), prompts=PROMPTS)
    optimizer = cfg.rl.optimizer.model_copy(update={"cpu_offload": False})
    rl = cfg.rl.model_copy(update={"optimizer": optimizer})
    weights = weight_bytes(sync_plan(cfg, shape.spec, cfg.parallel.nproc), 0, is_cpu=False)
    cache = cache_of(cfg, shape.spec, weights, named(GPU).memory_bytes)
    for world in SIZES[model]:
        here = cfg if world == cfg.parallel.nproc else cfg.model_copy(update={"rl": rl})  # Adam then fits on the device
        rows[world] = parts(here, shape, world, work, cache.tokens)
    return Curve(model, rows)


def curve_table(found: Curve) -> list[str]:
    names = list(next(iter(found.rows.values())))
    lines = ["| GPUs | step | " + " | ".join(names) + " | most beside computing |", "|---" * (len(names) + 3) + "|"]
    for world, row in found.rows.items():
        total = sum(row.values())
        first = max((name for name in names if name != "compute"), key=row.get)
        shares = " | ".join(f"{100 * row[name] / total:.1f} %" for name in names)
        lines.append(f"| {world:,} | {total:,.0f} s | {shares} | {first} |")
    least, most = (found.rows[size] for size in (min(found.rows), max(found.rows)))
    share = {name: (least[name] / sum(least.values()), most[name] / sum(most.values())) for name in names}
    grown = sorted(names, key=lambda name: share[name][0] - share[name][1])[:3]
    text = "; ".join(f"{name} ({100 * share[name][0]:.1f} to {100 * share[name][1]:.1f} %): {REMEDIES[name]}" for name in grown)
    return [*lines, "", f"What grows most with the size: {text}."]


def draw(curves: list[Curve], file: Path) -> None:
    """Stacked shares of the step over the number of GPUs."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "scale"
    figure, axes = plt.subplots(1, len(curves), figsize=(4.2 * len(curves), 3.6), sharey=True, squeeze=False)
    for axis, found in zip(axes[0], curves):
        sizes, names = list(found.rows), list(next(iter(found.rows.values())))
        shares = [[100 * row[name] / sum(row.values()) for row in found.rows.values()] for name in names]
        axis.stackplot(sizes, shares, labels=names, colors=plt.get_cmap("tab20").colors)
        axis.set(xscale="log", xlabel="GPUs", title=found.model, ylim=(0, 100))
        axis.set_xticks(sizes[:: max(1, len(sizes) // 5)], [f"{n}" for n in sizes[:: max(1, len(sizes) // 5)]], minor=False)
        axis.minorticks_off()
    axes[0][0].set_ylabel("% of a step")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=6, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.14, 1, 1))
    figure.savefig(file, metadata={"Date": None})


# -- weight sync ---------------------------------------------------------------------------------------------------

RANKS = 1024
PORTION = 256 << 20  # bytes that the experts of a block are taken in portions of, as on CUDA
LEARNERS = {
    "qwen3-235b-a22b": {
        "tp 2 pp 8 ep 16": dict(tp=2, pp=8, ep=16, embedding_in_split=True, loss_in_split=True),
        "tp 4 pp 4 ep 32": dict(tp=4, pp=4, ep=32, embedding_in_split=True, loss_in_split=True),
        "pp 2 ep 64": dict(pp=2, ep=64),
    },
    "deepseek-v3": {
        "tp 4 pp 8 ep 32": dict(tp=4, pp=8, ep=32, first_stage_layers=8, last_stage_layers=5),
        "pp 16 ep 16": dict(pp=16, ep=16, first_stage_layers=3, last_stage_layers=2),
    },
    "glm-4.5": {"tp 2 pp 4 ep 16": dict(tp=2, pp=4, ep=16)},
    "qwen3-30b-a3b": {"ep 32": dict(ep=32), "ep 8": dict(ep=8)},
}
ENGINES = {
    "tensor 8": EngineDegrees(8),
    "tensor 8, experts": EngineDegrees(8, 1, True),
    "tensor 8 x data 4, experts": EngineDegrees(8, 4, True),
    "tensor 32": EngineDegrees(32),
}
SMALL = {"tensor 2": EngineDegrees(2), "tensor 8": EngineDegrees(8)}  # engines of a model that fits a GPU or two


@dataclass(frozen=True)
class Simulated:
    """One sync of all ranks. Bytes; `bound` and `node_bound` are the least that all ranks, or nodes, could receive."""

    model: int
    hosted: int  # by the rank with most
    received: int
    bound: int
    network: int
    node_bound: int
    most_received: int
    most_sent: int
    mean_sent: float
    in_flight: int  # of two blocks, on the rank with most
    seconds: float


def simulate(
    spec: ModelSpec, parallel: Parallel, engine: EngineDegrees, whole: bool = False, world: int = RANKS
) -> Simulated:
    """Every rank's part of the plan. Raises AssertionError where a rank would hold the whole model.

    `whole`: the engine is given full tensors, of which it keeps what it hosts before the next ones come.
    """
    start = time.perf_counter()
    portion = 0 if whole else PORTION
    plan = SyncPlan(spec, "bfloat16", LearnerLayout.of(parallel, world, spec.num_layers), engine, whole, portion)
    parts = replace(plan, whole=False)
    hosted = [sum(bytes_of(parts, index).values()) for index in range(engine.ranks)]
    in_flight = max(two_blocks(plan, 0 if whole else index) for index in range(1 if whole else engine.ranks))
    assert in_flight < plan.bytes / 10, f"a rank is sent {in_flight} bytes of {plan.bytes} at once"
    sent, received, network, bound = Counter(), [], 0, 0
    for rank in range(world):
        senders, needed = plan.received(rank), hosted[rank % engine.ranks]
        own = senders.pop(rank, 0)
        received.append(sum(senders.values()))
        assert own + received[-1] == (plan.bytes if whole else needed), "what arrives is what the rank is to be given"
        assert needed + shard_bytes(plan, rank) + in_flight < plan.bytes, f"rank {rank} holds as much as the whole model"
        for sender, size in senders.items():
            sent[sender] += size
            network += size * (sender // NODE != rank // NODE)
        bound += plan.traffic(rank).bound if whole else needed - own
    return Simulated(
        plan.bytes, max(hosted), sum(received), bound, network, node_bound(parts, world), max(received), max(sent.values()),
        sum(sent.values()) / len(sent), in_flight, time.perf_counter() - start,
    )  # fmt: skip


def bytes_of(plan: SyncPlan, index: int) -> dict[str, int]:
    """Tensor -> bytes of it that an engine's rank hosts, from the engine's side alone."""
    shapes = {entry.hf_name: entry.item_bytes for entry in plan.entries}
    out = {}
    for name, box in plan.hosted(index).items():
        size = shapes[name]
        for part in box:
            size *= part.stop - part.start
        out[name] = size
    return out


def two_blocks(plan: SyncPlan, index: int) -> int:
    """Bytes of the two neighbouring blocks with most that a rank of an engine is given, which are held at once."""
    return max(a + b for a, b in itertools.pairwise(sum(shares.values()) for shares in plan.shares(index)))


def shard_bytes(plan: SyncPlan, rank: int) -> int:
    """Of the parameters that a rank of the learner has, in the precision of the sync."""
    learner = plan.learner
    return _shard_bytes(plan, rank // (learner.world // learner.pp), learner.shard(rank))


@functools.cache
def _shard_bytes(plan: SyncPlan, stage: int, shard: Shard) -> int:
    rules = (rule for block in plan.blocks for rule, _ in block if plan.learner.stage(rule.megatron) == stage)
    return sum(2 * math.prod(shape) for shape in {r.megatron: r.local_shape(plan.spec, shard) for r in rules}.values())


def node_bound(plan: SyncPlan, world: int) -> int:
    """Bytes that must reach the nodes: what some rank of a node hosts and no rank of it has, each part once a node.

    Of what all ranks of an engine host alike, such as norms, the largest part counts.
    """
    total, learner = 0, plan.learner
    for node in range(0, world, NODE):
        parts = [plan._totals(index) for index in {rank % plan.engine.ranks for rank in range(node, node + NODE)}]
        for key in set().union(*parts):
            if not has(learner.holders(*key), node):
                sizes = [part[key] for part in parts]
                total += max(sizes) if key[1] == "" else sum(sizes)
    return total


def has(holders: range, node: int) -> bool:
    """Whether a rank of the node is among them."""
    return any(rank in holders for rank in range(node, node + NODE))


def sync_lines() -> list[str]:
    lines = [
        "| model, GB in BF16 | learner | engine | hosted by a rank | received by a rank, mean | over the bound | "
        "from other nodes | over the nodes' bound | most sent / mean | in flight | plan, all ranks |",
        "|---" * 11 + "|",
    ]
    for model, learners in LEARNERS.items():
        spec = read_spec(ROOT / "configs" / "models" / model)
        ways = [False, True] if is_reloaded(spec) else [False]
        engines = SMALL if model == "qwen3-30b-a3b" else ENGINES
        for (where, degrees), (name, engine), whole in itertools.product(learners.items(), engines.items(), ways):
            if is_reloaded(spec) and engine.ranks < 32:  # a part of it would be more than a GPU has
                continue
            found = simulate(spec, Parallel(**degrees), engine, whole)
            name += ", reloaded" if whole else ""
            gb, each = 1e9, 1e9 * RANKS
            lines.append(
                f"| {model}, {found.model / gb:,.0f} | {where} | {name} | {found.hosted / gb:.1f} GB | "
                f"{found.received / each:.1f} GB | {found.received / found.bound:.3f} | {found.network / each:.1f} GB | "
                f"{found.network / max(1, found.node_bound):.2f} | {found.most_sent / found.mean_sent:.2f} | "
                f"{found.in_flight / gb:.2f} GB | {found.seconds:.1f} s |"
            )
            print(lines[-1], file=sys.stderr, flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--svg", type=Path, help="Where the curves are drawn.")
    parser.add_argument("--part", choices=["curves", "sync", "all"], default="all")
    args = parser.parse_args()
    args.svg = args.svg and args.svg.resolve()
    platform.setup()
    os.chdir(ROOT)
    lines: list[str] = []
    if args.part != "sync":
        found = [curve(model) for model in SIZES]
        for one in found:
            lines += ["", f"### {one.model}", "", *curve_table(one)]
        if args.svg:
            draw(found, args.svg)
    if args.part != "curves":
        lines += ["", *sync_lines()]
    print("\n".join(lines))


if __name__ == "__main__":
    main()
