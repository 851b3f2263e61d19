"""Reward models: a scalar head trained on preferences, for `reward: {type: model}` in RL."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from megarl import launcher
from megarl.config.schema import Config
from megarl.convert import pad_token_id
from megarl.data import PairData, load_tokenizer, pair_micro_batches
from megarl.errors import BadInput
from megarl.learner.policy import Policy
from megarl.metrics import Mean, Metric, merge, reduce_metrics
from megarl.parallel import Mesh
from megarl.trainers.common import Loop, finish_export, learner_tokens, memory_metrics, start_path
from megarl.trainers.display import task
from megarl.types import Batch, MicroBatch, SequenceShards

# the learner's names -> the names of a reward model's run
RENAMED = {f"reward/{name}": f"reward_model/{name}" for name in ("grad_norm", "grad_norm_max", "lr")}


def run(cfg: Config) -> None:
    """Train `cfg.reward_model` and export the result to RUN_DIR/reward_model/hf."""
    mesh = Mesh.build(cfg.parallel)
    trainer = RewardModelTrainer(cfg, mesh)
    try:
        if trainer.loop.run(trainer.step):
            with trainer.loop.exporting():
                finish_export(trainer.policy, trainer.loop.folder / "hf", cfg, trainer.start_path)
    finally:
        trainer.loop.close()


def preference_loss(batch: Batch, scores: Tensor, shards: SequenceShards, pairs: int) -> Any:
    """-log sigmoid(score of chosen - score of rejected), summed here and divided by the `pairs` of the whole step.

    The likelihood of the preferences under Bradley and Terry's model, as in InstructGPT (arXiv 2203.02155, equation 1).
    scores `[2 p]`: chosen and rejected in turns, as in `pair_batch`.
    """
    chosen, rejected = scores.view(-1, 2).unbind(1)
    margin = chosen - rejected
    losses = -F.logsigmoid(margin)
    seen = {
        "loss": losses,
        "accuracy": margin > 0,
        "margin": margin,
        "score_mean": (chosen + rejected) / 2,
    }
    return losses.sum() / pairs, {
        f"reward_model/{name}": Mean(x.detach().double().sum(), float(x.numel())) for name, x in seen.items()
    }


class RewardModelTrainer:
    """Data, model and step of one reward model's training on this rank."""

    def __init__(self, cfg: Config, mesh: Mesh) -> None:
        self.cfg, self.mesh, own = cfg, mesh, cfg.reward_model
        self.start_path = start_path(cfg, mesh, "reward_model", own.init_from)
        with task("load data and model", is_main=mesh.is_main, stream=launcher.terminal()):
            tokenizer = load_tokenizer(self.start_path, cfg.model.chat_template)
            self.policy = Policy.from_hf(
                self.start_path, cfg, mesh, role="reward", optimizer=own.optimizer, total_steps=own.steps
            )
            longest = own.max_tokens or self.policy.spec.max_position_embeddings
            self.data = PairData(own.data, tokenizer, longest, cfg.seed)
            self.validation = PairData(own.validation, tokenizer, longest, cfg.seed) if own.validation else None
        for data in filter(None, (self.data, self.validation)):
            self._check_data(data)
        self.loop = Loop.open(cfg, mesh, "reward_model", own.steps, {"reward": self.policy, "data": self.data})
        self.loop.display.note(
            f"reward_model: {mesh.describe()}; {len(self.data)} pairs, dropped {dict(self.data.dropped)}"
        )

    def step(self, number: int) -> Mapping[str, float]:
        """One optimizer step; returns its reduced metrics."""
        own, phases = self.cfg.reward_model, self.loop.phases
        with phases("data"):
            packed = self._pack(self.data.next(own.batch_size))
        with phases("update"):
            most = self.loop.alarms.most("reward_model/loss", "reward_model/grad_norm_max")
            result = self.policy.train_step(packed, partial(preference_loss, pairs=own.batch_size), most)
            self.loop.check_applied(result, packed, number, "reward")
        metrics: dict[str, Metric] = {RENAMED.get(name, name): value for name, value in result.metrics.items()}
        if self.validation and (number == own.steps or (own.validate_every and number % own.validate_every == 0)):
            with phases("validation"):
                metrics |= self._validate()
        seconds = phases.seconds("update")
        metrics |= phases.metrics() | memory_metrics()
        reduced = reduce_metrics(metrics, self.mesh.all_gather_object)
        reduced["throughput/learner_tokens_per_second"] = learner_tokens(packed, self.mesh) / max(seconds, 1e-9)
        return reduced

    def _pack(self, batch: Batch) -> list[MicroBatch]:
        return pair_micro_batches(batch, self.cfg.reward_model.micro_batch_tokens, self.policy.layout)

    def _validate(self) -> dict[str, Metric]:
        """Loss and accuracy over all validation pairs."""
        total: dict[str, Metric] = {f"reward_model/{name}": Mean(0.0, 0.0) for name in ("loss", "accuracy")}
        loss: Callable = partial(preference_loss, pairs=1)
        for batch in self.validation.batches(self.cfg.reward_model.batch_size):
            found = self.policy.validate(self._pack(batch), loss)
            merge(total, {name: found[name] for name in total if name in found})
        return {name.replace("/", "/validation_"): metric for name, metric in total.items()}

    def _check_data(self, data: PairData) -> None:
        """Every pair fits a micro-batch, and transformers will read the scores at the tokens they are trained at."""
        own, layout = self.cfg.reward_model, self.policy.layout
        # both sides are padded on their own
        needed = -(-(data.longest + 2 * (layout.document_multiple - 1)) // layout.multiple) * layout.multiple
        if needed > own.micro_batch_tokens:
            raise BadInput(
                f"reward_model.micro_batch_tokens = {own.micro_batch_tokens}: both sides of a pair have up to "
                f"{data.longest} tokens; set at least {needed}, or a smaller reward_model.max_tokens"
            )
        pad = pad_token_id(self.start_path)
        if pad is None or pad in data.ends:
            problem = "no pad_token" if pad is None else f"pad_token (id {pad}) also ends conversations"
            raise BadInput(
                f"{self.start_path}: {problem}, so that transformers would not read a score at the last token; "
                "set pad_token_id in its config.json to another special token"
            )
