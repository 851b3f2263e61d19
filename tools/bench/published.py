"""Published step times and utilisations of other systems, beside what the planner's time model says for the same setting.

    .venv/bin/python tools/bench/published.py

Nothing here is fitted: chips, shares of peaks and latencies are the defaults of `megarl.plan.hardware`. Sources of the
published figures: NeMo-RL, docs/about/performance-summary.md (v0.6, H100, BF16) and the recipes it names; verl,
docs/perf/dpsk.md and examples/grpo_trainer/run_*_megatron_96gb.sh (read in versions of 2026-08-22 and 2026-01-29).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from megarl import platform
from megarl.config import load_config
from megarl.plan.hardware import CHIPS, Hardware
from megarl.plan.seconds import PHASES, PhaseTime, phase_seconds, step_seconds
from megarl.plan.shape import ModelShape, Workload

ROOT = Path(__file__).parents[2]
H100 = CHIPS["h100"]
# NVIDIA H20 as sold in China, 96 GB: 148 TFLOPS in BF16 and 4.0 TB/s, links and network of the H100; from its resellers'
# sheets, NVIDIA has none in public
H20 = replace(
    H100, name="h20", memory_bytes=96e9, memory_bandwidth=4.0e12, flops={"float32": 44e12, "bfloat16": 148e12, "float8": 296e12}
)
RECIPE = "configs/recipes/{}-gspo.yaml"


@dataclass(frozen=True)
class Case:
    """A published setting. `settings` are overrides of the model's recipe."""

    source: str
    model: str
    gpus: int
    hardware: Hardware
    work: Workload
    settings: str
    seconds: float | None = None  # of a step
    rollout: float | None = None
    mfu: float | None = None


def case(source: str, model: str, gpus: int, hardware: Hardware, work: Workload, parallel: str, engine: str, **found) -> Case:
    longest = int(work.longest + 4 * work.prompt)
    settings = (
        f"rl.prompts_per_step={work.prompts} rl.samples_per_prompt={work.samples} "
        f"rl.optimizer_steps_per_rollout={work.optimizer_steps} rl.max_prompt_tokens={int(4 * work.prompt)} "
        f"rollout.max_response_tokens={work.longest} rollout.max_context={longest} "
        f"rl.micro_batch_tokens={max(longest, work.micro_batch_tokens) + 64} parallel.nproc={gpus} {parallel} {engine}"
    )
    return Case(source, model, gpus, hardware, work, settings, **found)


ALONE = "rollout.data_parallel=1 rollout.expert_parallel=false rollout.tensor_parallel={}"
NEMO_30B = Workload(64, 32, 150, 3053, 3946, 4, 4096)
NEMO_235B = Workload(16, 32, 150, 5548, 8042, 1, 8192)
NEMO_671B = Workload(32, 16, 150, 551, 1386, 1, 1536)
VERL_30B = Workload(512, 16, 300, 3000, 8192, 4, 10240)
VERL_671B = Workload(96, 8, 300, 1960, 9632, 3, 11680)
OFF = "rl.optimizer.cpu_offload=false"
HOST = "rl.optimizer.cpu_offload=true"
STAGES_16 = "parallel.tp=1 parallel.pp=16 parallel.ep=16 parallel.first_stage_layers=3 parallel.last_stage_layers=2"
CASES = [
    case("NeMo-RL", "qwen3-30b-a3b", 32, H100, NEMO_30B, f"parallel.recompute=none {OFF}", ALONE.format(2), seconds=192),
    case(
        "NeMo-RL", "qwen3-235b-a22b", 128, H100, NEMO_235B,
        "parallel.cp=2 parallel.embedding_in_split=false parallel.loss_in_split=false parallel.first_stage_layers=11 "
        "parallel.last_stage_layers=11", ALONE.format(16), seconds=395,
    ),
    case("NeMo-RL", "deepseek-v3", 256, H100, NEMO_671B, STAGES_16, ALONE.format(32), seconds=134),
    case(
        "verl", "deepseek-v3", 96, H20, VERL_671B,
        f"parallel.tp=8 parallel.pp=12 parallel.ep=8 parallel.first_stage_layers=none parallel.last_stage_layers=6 {HOST}",
        ALONE.format(32), seconds=1700, rollout=1050, mfu=0.19,
    ),
    *(
        case("verl", "qwen3-30b-a3b", gpus, H20, VERL_30B, f"parallel.recompute=none {HOST}", ALONE.format(4), mfu=mfu)
        for gpus, mfu in ((8, 0.40), (16, 0.37), (32, 0.31))
    ),
    case("verl, on H100", "qwen3-30b-a3b", 8, H100, VERL_30B, f"parallel.recompute=none {HOST}", ALONE.format(4)),
]  # fmt: skip


def utilisation(shape: ModelShape, work: Workload, update: PhaseTime, hardware: Hardware, gpus: int) -> float:
    """Model FLOP/s of the update over the BF16 peak: three forward passes' worth, whatever is computed again."""
    flops = 3 * (work.tokens * shape.forward_flops + work.sequence_pairs(shape) * shape.pair_flops)
    return flops / (update.seconds * gpus * hardware.peak("bfloat16"))


def predicted(one: Case) -> tuple[dict[str, PhaseTime], float]:
    """(times, utilisation of the update)."""
    cfg = load_config(RECIPE.format(one.model), one.settings.split())
    shape = ModelShape.from_folder(cfg.model.path)
    times = phase_seconds(cfg, shape, one.hardware, one.gpus, one.work)
    return times, utilisation(shape, one.work, times["update"], one.hardware, one.gpus)


def row(one: Case) -> str:
    times, mfu = predicted(one)
    total = step_seconds(times)
    shares = ", ".join(f"{name.replace('_', ' ')} {times[name].seconds:,.0f}" for name in PHASES[:-1])
    said = [f"{one.seconds:,.0f} s" if one.seconds else "", f"rollout {one.rollout:,.0f} s" if one.rollout else ""]
    said += [f"MFU {one.mfu:.2f}" if one.mfu else ""]
    ratio = f"{one.seconds / total:.1f}" if one.seconds else f"{mfu / one.mfu:.2f} (MFU)" if one.mfu else ""
    return (
        f"| {one.source} | {one.model} | {one.gpus} {one.hardware.name.upper()} | {one.work.sequences:,} x "
        f"{one.work.prompt + one.work.response:,.0f} | {', '.join(filter(None, said)) or 'none'} | {total:,.0f} s "
        f"({shares}), MFU {mfu:.2f} | {ratio} |"
    )


def main() -> None:
    platform.setup()
    os.chdir(ROOT)
    print("| source | model | GPUs | sequences x tokens | published | the model | published / model |")
    print("|---|---|---|---|---|---|---|")
    for one in CASES:
        print(row(one), flush=True)


if __name__ == "__main__":
    main()
