"""What a layout costs on the 20M model of vs_trl.py: seconds and memory of an optimizer step, bytes of a sequence ratio.

    python tools/bench/layouts.py [--rounds N] [--tokens N] [--layouts dp2,cp2+recompute,...] [--out FILE]

All layouts train on the same sequences, in turns, one optimizer step a turn in fresh processes' steady state: every
rank reports the median of its steps and its peak resident memory. On a machine with fewer cores than ranks the seconds
say what a layout costs in work, not what it gains.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import statistics
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

LAYOUTS = (
    "one,one+selective,one+full,dp2,dp2+nodistopt,tp2,pp2,pp2vpp3,ep2,ep2+allgather,ep4,tp2etp2,cp2,cp4,tp2ep2,cp2ep2,pp2cp2,"
    "tp2pp2ep2,tp2cp2pp2"
)
LENGTH = 256  # tokens of the longest sequence
OPTIONS = {
    "selective": {"recompute": "selective"},
    "full": {"recompute": "full"},
    "allgather": {"dispatcher": "allgather"},
    "nodistopt": {"distributed_optimizer": False},
}


def parse(name: str) -> tuple[int, dict[str, Any]]:
    """(ranks, `parallel` section) of a layout's name."""
    degrees, *options = name.split("+")
    parallel: dict[str, Any] = {key: int(n) for key, n in re.findall(r"(vpp|etp|dp|tp|pp|ep|cp)(\d+)", degrees)}
    dp = parallel.pop("dp", 1)
    dense = parallel.get("tp", 1) * parallel.get("pp", 1) * parallel.get("cp", 1) * dp
    experts = parallel.get("ep", 1) * parallel.get("etp", 1) * parallel.get("pp", 1)
    for option in options:
        parallel |= OPTIONS[option]
    return max(dense, experts), parallel


def train(path: str, parallel: dict[str, Any], tokens: int, rounds: int) -> dict[str, float]:
    """One rank: seconds of a step (median), and GiB: peak resident memory, and what it was before the first step."""
    import psutil
    import torch

    from megarl.algorithms import PRESETS, LossInputs, policy_loss
    from megarl.config.schema import Config, Model, Optimizer, Parallel
    from megarl.data import micro_batches
    from megarl.learner.policy import Policy
    from megarl.parallel import Mesh
    from megarl.platform import device_memory
    from megarl.types import Batch

    cfg = Config(model=Model(path=path), parallel=Parallel(**parallel))
    mesh = Mesh.build(cfg.parallel)
    policy = Policy.from_hf(path, cfg, mesh, optimizer=Optimizer(lr=1e-5), total_steps=100)
    generator = torch.Generator().manual_seed(0)
    lengths: list[int] = []
    while sum(lengths) < tokens:
        lengths.append(min(int(torch.randint(LENGTH // 4, LENGTH, (), generator=generator)), tokens - sum(lengths)))
    batch = Batch(
        tokens=torch.randint(2, 120, (tokens,), generator=generator),
        lengths=torch.tensor(lengths),
        response_mask=torch.ones(tokens),
        token_weights=torch.full((tokens,), 1 / tokens),
        advantages=torch.randn(tokens, generator=generator),
        old_log_probs=torch.full((tokens,), -4.0),
    )
    packed = micro_batches(batch, max(tokens, LENGTH), policy.layout)

    def loss(own: Any, log_probs: Any, entropy: Any, shards: Any) -> Any:
        inputs = LossInputs(log_probs, own.advantages, own.token_weights, own.response_mask, own.old_log_probs)
        return policy_loss(PRESETS["gspo"], inputs, shards)

    before, seconds = psutil.Process().memory_info().rss / 2**30, []
    for _ in range(rounds + 1):
        mesh.barrier()
        start = time.perf_counter()
        assert policy.train_step(packed, loss).applied
        mesh.barrier()
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds[1:]), "peak": device_memory()["peak_rss"], "before": before}


def reduced_bytes(tokens: int, length: int) -> dict[str, float]:
    """One of two context-parallel ranks: bytes it sends for the sequence ratios of a packed row, and for all log-probs."""
    import torch

    from megarl.algorithms.ratio import compute_ratio
    from megarl.config.schema import Parallel
    from megarl.data import BatchLayout, pack
    from megarl.parallel import GroupSum, Mesh
    from megarl.types import Batch, SequenceShards

    mesh = Mesh.build(Parallel(cp=2))
    lengths = torch.full((tokens // length,), length)
    batch = Batch(torch.ones(tokens, dtype=torch.int64), lengths, torch.ones(tokens))
    micro = pack(batch, range(len(lengths)), BatchLayout(cp=2, cp_rank=mesh.cp_rank))
    own, reduce = micro.local_batch(), GroupSum(mesh.cp_group)
    log_probs = torch.randn(len(own.tokens))
    start = time.perf_counter()
    shards = SequenceShards(own.sequence_ids(), len(own), reduce)
    compute_ratio("sequence", log_probs, torch.zeros_like(log_probs), own.response_mask > 0, shards)
    ratio_seconds = time.perf_counter() - start
    return {"ratio": reduce.bytes, "gather": log_probs.numel() * log_probs.element_size(), "seconds": ratio_seconds}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--layouts", default=LAYOUTS)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    from make_model import main as make_model

    from tests.dist.harness import run_ranks

    lines = [
        "| layout | ranks | seconds a step | against one process | peak memory, largest rank | all ranks |",
        "|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        make_model("20m", Path(folder))
        first = None
        for name in arguments.layouts.split(","):
            ranks, parallel = parse(name)
            out = run_ranks("tools.bench.layouts:train", ranks, folder, parallel, arguments.tokens, arguments.rounds, timeout=900)
            seconds, peaks = max(rank["seconds"] for rank in out), [rank["peak"] for rank in out]
            first = first or seconds
            lines.append(
                f"| {name} | {ranks} | {seconds:.2f} | {seconds / first:.2f} | {max(peaks):.2f} GiB | {sum(peaks):.2f} GiB |"
            )
            print(lines[-1], flush=True)
    lines += ["", "| tokens | sequences | sequence ratios | all-gather of log-probs | ratio |", "|---|---|---|---|---|"]
    for tokens in (1024, 8192, 65536):
        rank = run_ranks("tools.bench.layouts:reduced_bytes", 2, tokens, 512)[0]
        lines.append(
            f"| {tokens:,} | {tokens // 512} | {rank['ratio']:,} bytes | {rank['gather']:,} bytes | "
            f"{rank['gather'] / rank['ratio']:.0f} |"
        )
        print(lines[-1], flush=True)
    if arguments.out:
        versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "megatron-core"))
        command = " ".join(["python", "tools/bench/layouts.py", *sys.argv[1:]])
        head = [
            "# What a layout costs",
            "",
            f"    {command}",
            "",
            f"{datetime.date.today()}, {len(os.sched_getaffinity(0))} CPU cores, {versions}; 20M parameters (32 experts top-4, "
            f"6 layers), {arguments.tokens} tokens an optimizer step in one micro-batch, float32, GSPO.",
            "",
        ]
        arguments.out.write_text("\n".join(head + lines) + "\n")


if __name__ == "__main__":
    main()
