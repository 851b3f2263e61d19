"""How fast a weight sync moves a model into vLLM, against a plain copy of the same bytes on the same ranks.

    OMP_NUM_THREADS=1 .venv/bin/python tools/bench/weight_sync.py --model 691m --learner ep2 dp2

Starts two ranks for each learner layout; every rank is a vLLM engine of its own. Prints for each the bytes a rank was
given, over the least it could be given from others, and three speeds: of the sync; of the same sync with vLLM's packing
(and what else its layers do with new weights) replaced by a plain copy; of the plain copy alone. All ranks at once.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import torch

from megarl import platform
from megarl.config.schema import Config, Generate, Model, Parallel, Rollout, Tokenizer

WORK = Path(os.environ.get("MEGARL_BENCH_DIR", "/tmp/megarl-bench"))
COMMON = dict(context=512, tokenizer=Tokenizer(vocab_size=512))
MODELS = {
    "20m": ("float32", dict(hidden_size=256, num_layers=6, num_heads=8, num_kv_heads=2, head_dim=32)
            | dict(num_experts=32, top_k=4, moe_intermediate_size=128)),
    "691m": ("bfloat16", dict(hidden_size=1024, num_layers=8, num_heads=16, num_kv_heads=4, head_dim=64)
             | dict(num_experts=64, top_k=4, moe_intermediate_size=416)),
}  # fmt: skip
LEARNERS = {"dp2": {}, "ep2": dict(ep=2), "tp2": dict(tp=2), "pp2": dict(pp=2)}


def on_rank(model: str, learner: str, rounds: int) -> None:
    platform.setup()
    from megarl.learner.policy import Policy
    from megarl.models.generate import ensure_checkpoint
    from megarl.parallel import Mesh
    from megarl.rollout.vllm_engine import VLLMEngine
    from megarl.rollout.weight_sync import WeightSync

    dtype, shape = MODELS[model]
    settings = Model(path=str(WORK / f"sync-{model}"), dtype=dtype, generate=Generate(**COMMON, **shape))
    parallel, rollout = Parallel(**LEARNERS[learner]), Rollout(max_context=256, kv_cache_gib=0.05, max_concurrent=8)
    mesh = Mesh.build(parallel)
    if mesh.is_main:
        ensure_checkpoint(settings)
    mesh.barrier()
    policy = Policy.from_hf(settings.path, Config(model=settings, parallel=parallel), mesh)
    engine = VLLMEngine(settings.path, rollout, dtype, 0, mesh, load=False)
    sync = WeightSync(policy.spec, parallel, mesh, engine)

    def seconds(count: int) -> tuple[float, float]:
        """Medians of the slowest rank: of a sync, and of a plain copy of its bytes."""
        times = []
        for _ in range(count):
            mesh.barrier()
            seconds = sync.run(policy.modules, 0).seconds
            mesh.barrier()
            times.append([max(column) for column in zip(*mesh.all_gather_object((seconds, plain_copy(engine.model))))])
        return tuple(statistics.median(column) for column in zip(*times))

    first = time.perf_counter()
    sync.run(policy.modules, 0)
    first = time.perf_counter() - first
    synced, copied = seconds(rounds)
    peak = platform.device_memory()["peak_rss"]
    with patch.multiple("megarl.platform.vllm_direct", pack=lambda new, out, isa: out.copy_(new)), patch.multiple(
        "megarl.platform.vllm_direct.PackedLinear", finish=lambda layer: None
    ):
        unpacked, _ = seconds(rounds)
    if mesh.is_main:
        traffic = sync.plan.traffic(0)
        speeds = [traffic.written / s / 1e9 for s in (synced, unpacked, copied)]
        print(
            f"{model} {dtype} {learner} -> 2 engines, {rounds} syncs: {traffic.written / 1e6:.0f} MB a rank, "
            f"{traffic.received / 1e6:.0f} from others (least {traffic.bound / 1e6:.0f}); first {first:.3f} s, then "
            f"{synced:.3f} s = {speeds[0]:.2f} GB/s; without vLLM's packing {unpacked:.3f} s = {speeds[1]:.2f} GB/s; "
            f"plain copy {copied:.3f} s = {speeds[2]:.2f} GB/s; ratios {speeds[0] / speeds[2]:.2f} and "
            f"{speeds[1] / speeds[2]:.2f}; reload {engine.reload_reason}; peak {peak:.2f} GiB",
            flush=True,
        )


def plain_copy(model: torch.nn.Module) -> float:
    """Seconds that copying the engine's own large weights out takes, in the place of all its bytes."""
    weights = [p.data for p in model.parameters() if p.nbytes >= 1 << 20]
    out = torch.empty(max(p.nbytes for p in weights), dtype=torch.uint8).fill_(0)
    start = time.perf_counter()
    for weight in weights:
        out[: weight.nbytes].view(weight.dtype).view(weight.shape).copy_(weight)
    seconds = time.perf_counter() - start
    return seconds * sum(p.nbytes for p in model.parameters()) / sum(w.nbytes for w in weights)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="691m")
    parser.add_argument("--learner", choices=LEARNERS, nargs="+", default=["ep2", "dp2"])
    parser.add_argument("--rounds", type=int, default=7, help="measured syncs of each layout (default 7)")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        on_rank(arguments.model, arguments.learner[0], arguments.rounds)
        return 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29731"]
    for learner in arguments.learner:
        own = [__file__, "--model", arguments.model, "--learner", learner, "--rounds", str(arguments.rounds)]
        code = subprocess.run([*torchrun, *own]).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    code = main()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    sys.exit(code)
