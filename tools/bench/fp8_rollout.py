"""Learner and rollout in BF16 and in block-wise FP8, all four combinations: how far their log-probs are apart, and what
truncated importance weights make of it.

    .venv/bin/python tools/bench/fp8_rollout.py

A Qwen3-MoE of hidden size 384 on the quickstart's task has a short SFT warm start. For each rollout precision one process
takes, from that start with the learner in BF16 and then in FP8, the same few RL steps with token weights truncated at 2: in
the first step the two learners see the same samples. Before each update the gradient without the weights is taken too. The
reward counts distinct characters: the warm start solves too little for groups to differ by it.
Prints the table that is in results/fp8_rollout.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "cpu" / "quickstart.yaml"
MODEL = dict(hidden_size=384, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=128, moe_intermediate_size=256)
PRECISIONS = {"BF16": "none", "FP8": "blockwise"}
HIGH = 2.0  # where weights are truncated
COLUMNS = {  # of the table -> (key of a step's numbers, how steps are put together, how it is written)
    "gap, mean": ("gap", statistics.mean, ".1e"),
    "in the first step": ("gap", lambda values: values[0], ".1e"),
    "largest": ("largest", max, ".2f"),
    "ratio, mean": ("ratio", statistics.mean, ".4f"),
    "least": ("least", min, ".3f"),
    "most": ("most", max, ".3f"),
    "tokens' worth": ("worth", statistics.mean, ".2%"),
    "KL, k3": ("kl", statistics.mean, ".1e"),
    "truncated": ("truncated", statistics.mean, ".2%"),
    "gradient changed by": ("changed", statistics.mean, ".2%"),
    "gap of a sync's probes": ("sync", max, ".1e"),
}


def warm_start(folder: Path, steps: int) -> Path:
    run_dir, out = folder / f"sft-{steps}", folder / f"sft-{steps}" / "sft" / "hf"
    if not (out / "model.safetensors").exists():
        shape = [f"model.generate.{key}={value}" for key, value in MODEL.items()]
        shape += [f"model.path={folder / 'model'}", "parallel={nproc: 1}", "checkpoint.every=0", "log.tensorboard=false"]
        settings = [f"run_dir={run_dir}", "resume=auto", f"sft.steps={steps}", "sft.batch_size=48", *shape]
        command = [sys.executable, "-m", "megarl", "sft", str(CONFIG), *settings]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return out


def measure(start: Path, rollout: str, steps: int) -> dict[str, list[dict[str, float]]]:
    """Learner precision -> what every RL step found."""
    from megarl import platform
    from megarl.config import load_config

    platform.setup()
    from megarl.models.layers.fp8_layers import multiplying
    from megarl.parallel import Mesh
    from megarl.rewards import RewardRunner
    from megarl.trainers.rl import RLTrainer

    out = {}
    with tempfile.TemporaryDirectory() as run_dir:
        settings = [
            f"run_dir={run_dir}/run", "rl.init_from=model", f"model.path={start}", "model.generate=none", "sft=none",
            "model.dtype=bfloat16", "model.fp8=blockwise", f"rollout.fp8={PRECISIONS[rollout]}", "eval.data=[]",
            f"rl.algorithm={{preset: grpo, kl: {{coef: 0}}, correction: {{level: token, mode: truncate, high: {HIGH}}}}}",
            "rl.optimizer={type: sgd, lr: 0.05, clip_grad: 0}", "rl.prompts_per_step=8", "rl.optimizer_steps_per_rollout=1",
            "parallel={nproc: 1, distributed_optimizer: false}", "log.routing_tokens=0", "log.tensorboard=false",
            "log.rollouts_every=0", "eval.every=0", "reward.type=turns:distinct_characters",
        ]  # fmt: skip
        cfg = load_config(CONFIG, settings, require="rl")
        with RewardRunner(cfg.reward) as rewards:
            trainer = RLTrainer(cfg, Mesh.build(cfg.parallel), rewards)
            data = trainer.data.state_dict()
            for learner in PRECISIONS:
                trainer.policy.load_hf(start)
                trainer.data.load_state_dict(data)
                plain = multiplying(trainer.policy.modules, lambda experts: None, range(0))
                with plain if learner == "BF16" else contextlib.nullcontext():
                    out[learner] = [step(trainer, number) for number in range(1, steps + 1)]
            trainer.loop.close()
    return out


def step(trainer: Any, number: int) -> dict[str, float]:
    """One RL step: sync, sample, both gradients, update."""
    import torch

    from megarl.trainers import rl_batch

    trainer.sync()
    groups, _ = trainer.rollout(number)
    parts = [rl_batch.assemble(groups, trainer.algorithm)]
    packed = [trainer._pack(parts[0])]
    trainer.recorded_passes(packed)
    batch, _ = trainer._decide(parts[0], parts, packed)
    (micro,) = packed
    on = batch.response_mask > 0
    log_ratio = (batch.old_log_probs - batch.rollout_log_probs)[on].double()
    ratio = log_ratio.exp()

    def gradient() -> Any:
        chunks = trainer.policy.chunks
        return torch.cat([p.main_grad.float().flatten() for chunk in chunks for p in chunk.parameters()])

    weights = [one.batch.mismatch_weights for one in micro]
    for one in micro:
        one.batch.mismatch_weights = torch.ones_like(one.batch.mismatch_weights)
    with mock.patch.object(trainer.policy, "_apply", return_value=(False, 0.0)):  # the gradient alone
        trainer.policy.train_step(micro, trainer.loss)
    without = gradient()
    for one, own in zip(micro, weights, strict=True):
        one.batch.mismatch_weights = own
    trainer.policy.train_step(micro, trainer.loss)
    changed = (gradient() - without).norm() / without.norm()
    return {
        "gap": float(log_ratio.abs().mean()),
        "largest": float(log_ratio.abs().max()),
        "ratio": float(ratio.mean()),
        "least": float(ratio.min()),
        "most": float(ratio.max()),
        "worth": float(ratio.mean() ** 2 / ratio.square().mean()),
        "kl": float((log_ratio.expm1() - log_ratio).mean()),
        "truncated": float((ratio > HIGH).double().mean()),
        "changed": float(changed),
        "sync": trainer.sync_gap.mean,
        "tokens": int(on.sum()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sft-steps", type=int, default=200)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "bench" / "fp8_rollout")
    parser.add_argument("--rollout", choices=PRECISIONS, help="measure this one alone, in this process")
    arguments = parser.parse_args()
    start = warm_start(arguments.folder, arguments.sft_steps)
    files = {rollout: arguments.folder / f"{rollout}-{arguments.sft_steps}-{arguments.steps}.json" for rollout in PRECISIONS}
    if arguments.rollout:
        files[arguments.rollout].write_text(json.dumps(measure(start, arguments.rollout, arguments.steps)))
        return
    for rollout, file in files.items():
        if not file.exists():
            options = ["--folder", str(arguments.folder), "--steps", str(arguments.steps), "--rollout", rollout]
            options += ["--sft-steps", str(arguments.sft_steps)]
            subprocess.run([sys.executable, __file__, *options], check=True, stdout=subprocess.DEVNULL)
    print(f"| learner | rollout | {' | '.join(COLUMNS)} |\n|{'---|' * (2 + len(COLUMNS))}")
    for rollout, file in files.items():
        for learner, rows in json.loads(file.read_text()).items():
            cells = [format(join([row[key] for row in rows]), form) for key, join, form in COLUMNS.values()]
            print(f"| {learner} | {rollout} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
