"""Supervised fine-tuning: the warm start before RL, or continued pre-training."""

from __future__ import annotations

from collections.abc import Mapping

from megarl import launcher
from megarl.config.schema import Config
from megarl.data import SFTData, load_eval_prompts, load_tokenizer, micro_batches
from megarl.learner.policy import Policy
from megarl.metrics import Mean, Metric, reduce_metrics
from megarl.parallel import Mesh
from megarl.trainers.common import (
    Loop,
    finish_export,
    learner_tokens,
    memory_metrics,
    starting_checkpoint,
)
from megarl.trainers.display import task
from megarl.trainers.losses import token_mean_loss
from megarl.types import Batch, MicroBatch

# the learner's names -> the names of an SFT run
RENAMED = {"policy/grad_norm": "sft/grad_norm", "policy/lr": "sft/lr", "policy/grad_norm_max": "sft/grad_norm_max"}


def run(cfg: Config) -> None:
    """Train `cfg.sft` and export the result to RUN_DIR/sft/hf."""
    mesh = Mesh.build(cfg.parallel)
    trainer = SFTTrainer(cfg, mesh)
    try:
        if trainer.loop.run(trainer.step):
            with trainer.loop.exporting():
                finish_export(trainer.policy, trainer.loop.folder / "hf", cfg, cfg.model.path)
    finally:
        trainer.loop.close()


class LossTarget:
    """Whether the mean training loss of the last `WINDOW` steps is below `goal` (None: never); kept in checkpoints."""

    WINDOW = 10

    def __init__(self, goal: float | None) -> None:
        self.goal, self.recent = goal, []

    @property
    def reached(self) -> bool:
        full = self.goal is not None and len(self.recent) == self.WINDOW
        return full and sum(self.recent) / self.WINDOW < self.goal

    def observe(self, loss: float) -> bool:
        """Take in one step's loss, the same on every rank; whether the goal is reached now."""
        self.recent = [*self.recent, loss][-self.WINDOW :]
        return self.reached

    def state_dict(self) -> dict[str, list[float]]:
        return {"recent": self.recent}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        self.recent = state["recent"]


class SFTTrainer:
    """Data, policy and step of one supervised run on this rank."""

    def __init__(self, cfg: Config, mesh: Mesh) -> None:
        self.cfg, self.mesh, sft = cfg, mesh, cfg.sft
        path = starting_checkpoint(cfg, mesh)
        with task("load data and model", is_main=mesh.is_main, stream=launcher.terminal()):
            self.policy = Policy.from_hf(
                path,
                cfg,
                mesh,
                optimizer=sft.optimizer,
                total_steps=sft.steps,
                aux_loss_coef=sft.router_aux_loss_coef,
            )
            tokenizer = load_tokenizer(path, cfg.model.chat_template)
            longest = sft.max_tokens or self.policy.spec.max_position_embeddings
            held_out = {p.text for p in load_eval_prompts(cfg.eval.data, tokenizer, longest)}
            self.data = SFTData(sft.data, tokenizer, longest, cfg.seed, exclude=held_out)
            self.validation = SFTData(sft.validation, tokenizer, longest, cfg.seed) if sft.validation else None
        self.target = LossTarget(sft.stop_at_loss)
        owners = {"policy": self.policy, "data": self.data, "target": self.target}
        self.loop = Loop.open(cfg, mesh, "sft", sft.steps, owners)
        if self.target.reached:
            self.loop.end_at(self.loop.done, "the loss was below sft.stop_at_loss before")
        self.loop.display.note(f"sft: {mesh.describe()}; {len(self.data)} rows, dropped {dict(self.data.dropped)}")

    def step(self, number: int) -> Mapping[str, float]:
        """One optimizer step; returns its reduced metrics."""
        sft, phases = self.cfg.sft, self.loop.phases
        with phases("data"):
            packed = self._pack(self.data.next(sft.batch_size))
        with phases("update"):
            most = self.loop.alarms.most("sft/loss", "sft/grad_norm_max")
            result = self.policy.train_step(packed, token_mean_loss, most)
            self.loop.check_applied(result, packed, number)
        metrics: dict[str, Metric] = {RENAMED.get(name, name): value for name, value in result.metrics.items()}
        own_loss = {"sft/loss": metrics["sft/loss"]} if "sft/loss" in metrics else {}
        loss = reduce_metrics(own_loss, self.mesh.all_gather_object)["sft/loss"]
        if self.target.observe(loss) and number < self.loop.total:
            self.loop.end_at(
                number, f"mean loss of {LossTarget.WINDOW} steps below sft.stop_at_loss={sft.stop_at_loss}"
            )
        if self.validation and (number == self.loop.total or (sft.validate_every and number % sft.validate_every == 0)):
            with phases("validation"):
                metrics |= self._validate()
        seconds = phases.seconds("update")
        metrics |= phases.metrics() | memory_metrics()
        reduced = reduce_metrics(metrics, self.mesh.all_gather_object)
        reduced["throughput/learner_tokens_per_second"] = learner_tokens(packed, self.mesh) / max(seconds, 1e-9)
        return reduced

    def _pack(self, batch: Batch) -> list[MicroBatch]:
        batch = batch.replace(token_weights=batch.response_mask / batch.response_mask.sum().clamp(min=1))
        return micro_batches(batch, self.cfg.sft.micro_batch_tokens, self.policy.layout)

    def _validate(self) -> dict[str, Metric]:
        total: Metric | None = None
        for batch in self.validation.batches(self.cfg.sft.batch_size):
            metrics = self.policy.validate(self._pack(batch), token_mean_loss)
            mine = metrics.get("sft/loss", Mean(0.0, 0.0))
            total = mine if total is None else total.merge(mine)
        return {"sft/validation_loss": total}
