"""TRL's GRPOTrainer as one side of vs_trl.py: python trl_side.py SETTINGS_JSON, with RANK and WORLD_SIZE set.

One turn is one whole iteration of the trainer's loop, from the end of one optimizer step to the end of the next.
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict

import torch
from datasets import Dataset
from transformers import AutoTokenizer, Qwen3MoeForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.extras.profiling import ProfilingContext
from turns import Turns, distinct_characters

SECONDS: dict[str, float] = defaultdict(float)


def record_phase(context: ProfilingContext, duration: float) -> None:
    """TRL times its phases itself but gives them to trackers only; this takes its place."""
    SECONDS[context.name.rsplit(".", 1)[-1]] += duration


ProfilingContext._log_metrics = record_phase


def reward(prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: object) -> list[float]:
    SECONDS["tokens"] += sum(map(len, completion_ids))
    return [distinct_characters(prompt, response) for prompt, response in zip(prompts, completions, strict=True)]


class TakeTurns(TrainerCallback):
    def __init__(self) -> None:
        self.turns = Turns()
        self.start = 0.0

    def on_train_begin(self, args, state, control, **_):
        self.turns.say(ready=True)
        self._wait(control)

    def on_step_end(self, args, state, control, **_):
        step = time.perf_counter() - self.start
        generate = SECONDS["generate"] + SECONDS["generate_batch"]
        prepare = SECONDS["_prepare_inputs"]
        phases = {
            "generate": generate,
            "reward": SECONDS["_calculate_rewards"],
            "prepare": prepare - generate - SECONDS["_calculate_rewards"],
            "update": step - prepare,
        }
        self.turns.say(step=step, phases=phases, tokens=int(SECONDS["tokens"]))
        self._wait(control)

    def _wait(self, control) -> None:
        control.should_training_stop = not self.turns.wait()
        SECONDS.clear()
        self.start = time.perf_counter()


def main(settings: dict) -> None:
    torch.set_num_threads(settings["threads"])
    micro_batch, world = settings["micro_batch"], settings["processes"]
    model = Qwen3MoeForCausalLM.from_pretrained(
        settings["model"], dtype=torch.float32, attn_implementation="sdpa", experts_implementation=settings["experts"]
    )
    args = GRPOConfig(
        output_dir=settings["out"],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        max_steps=1_000_000,
        seed=settings["seed"],
        # 128 samples, groups of 8, one optimizer step per rollout
        num_generations=settings["group"],
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=settings["samples"] // (micro_batch * world),
        num_iterations=1,
        # sampling
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        max_completion_length=settings["max_tokens"],
        cache_implementation=settings["cache"],
        use_transformers_continuous_batching=bool(settings["continuous"]),
        transformers_continuous_batching_config=settings["continuous"],
        # GSPO, as on the other side; no reference model, no auxiliary loss
        importance_sampling_level="sequence",
        loss_type="grpo",
        epsilon=settings["clip"][0],
        epsilon_high=settings["clip"][1],
        beta=0.0,
        router_aux_loss_coef=0.0,
        # optimizer
        learning_rate=settings["lr"],
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        adam_beta2=settings["beta2"],
        max_grad_norm=settings["clip_grad"],
        # what DistributedDataParallel would otherwise do for nothing
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        ddp_backend="gloo" if world > 1 else None,
        torch_compile=settings["compile"],
    )
    with open(settings["prompts"]) as file:
        rows = [{"prompt": json.loads(line)["prompt"]} for line in file]
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(settings["model"], padding_side="left"),
        callbacks=[TakeTurns()],
    )
    trainer.train()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
