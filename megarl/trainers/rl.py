"""Reinforcement learning: sample, score, update, sync; one step reads from top to bottom."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megarl import algorithms, launcher
from megarl.algorithms import effective_sample_size, explained_variance
from megarl.config.schema import Config
from megarl.data import PromptSource, load_tokenizer, micro_batches
from megarl.errors import BadInput, RunFailed
from megarl.learner.host_parked import HostParked
from megarl.learner.policy import Policy
from megarl.learner.probes import probe_log_probs
from megarl.metrics import Mean, Metric, cut_jsonl, merge, reduce_metrics
from megarl.parallel import GroupSum, Mesh
from megarl.report import describe_machine, render_summary, write_report, write_summary
from megarl.rewards import RewardRunner, check_failures, required_field
from megarl.rollout.engine import Sampling
from megarl.rollout.fp8_weights import Fp8Weights
from megarl.rollout.vllm_engine import VLLMEngine
from megarl.rollout.weight_sync import (
    SyncGap,
    SyncReport,
    WeightSync,
    check_checksums,
    check_sync,
    default_threshold,
    make_probes,
)
from megarl.trainers import rl_batch
from megarl.trainers.common import (
    Loop,
    finish_export,
    memory_metrics,
    start_path,
)
from megarl.trainers.display import task
from megarl.trainers.evaluate import eval_prompts, evaluate, write_results
from megarl.trainers.group_pool import GroupPool
from megarl.trainers.losses import critic_loss, engine_gap, rl_loss
from megarl.trainers.rollout_files import check_experts, check_files, read_groups, rollout_file, write_groups
from megarl.trainers.routing import RoutingWatch, replay_recorded, replay_rollout, routed_load
from megarl.trainers.scoring import Scorer, part_metrics
from megarl.trainers.sync_metrics import sync_metrics
from megarl.trainers.turns import MemoryLedger, Turns
from megarl.types import Batch, MicroBatch, PromptGroup, SequenceShards


def run(cfg: Config, from_rollouts: Path | None = None) -> None:
    """Train `cfg.rl`, evaluate before and after, and export the result to RUN_DIR/rl/hf."""
    reason = algorithms.check(cfg.rl.algorithm)
    if reason:
        raise BadInput(f"rl.algorithm: {reason}")
    reason = algorithms.refusal(algorithms.from_config(cfg.rl.algorithm), cfg.rl.samples_per_prompt)
    if reason:
        raise BadInput(reason)
    if from_rollouts is not None:
        check_files(from_rollouts, cfg.rl.steps)
    with RewardRunner(cfg.reward) as rewards:  # its processes start before vLLM's and gloo's threads exist
        trainer = RLTrainer(cfg, Mesh.build(cfg.parallel), rewards, from_rollouts)
        try:
            trainer.prepare()
            if trainer.loop.run(trainer.step):
                with trainer.loop.exporting(), trainer.turns.learner_alone():
                    finish_export(trainer.policy, trainer.loop.folder / "hf", cfg, trainer.start_path)
                trainer.report()
        finally:
            trainer.loop.close()


class RLTrainer:
    """Policy, engine and data of one RL run on this rank, and its step."""

    def __init__(self, cfg: Config, mesh: Mesh, rewards: RewardRunner, from_rollouts: Path | None = None) -> None:
        self.cfg, self.mesh, self.rewards, self.from_rollouts = cfg, mesh, rewards, from_rollouts
        rl = cfg.rl
        self.algorithm = algorithms.from_config(rl.algorithm, cfg.rollout.max_response_tokens)
        if rl.routing_replay == "rollout":
            cfg = self.cfg = cfg.model_copy(update={"rollout": cfg.rollout.model_copy(update={"routed_experts": True})})
        self.start_path = start_path(cfg, mesh, "rl", rl.init_from)
        with task("load data and model", is_main=mesh.is_main, stream=launcher.terminal()):
            self.policy = Policy.from_hf(
                self.start_path,
                cfg,
                mesh,
                optimizer=rl.optimizer,
                total_steps=max(1, rl.steps - self._warmup_steps()) * rl.optimizer_steps_per_rollout,
                temperature=cfg.rollout.temperature,
                routing=rl.routing_replay != "none" or cfg.log.routing_tokens > 0,
                freeze_router=rl.freeze_router,
                aux_loss_coef=rl.router_aux_loss_coef,
            )
            if from_rollouts is not None and rl.routing_replay == "rollout":
                check_experts(from_rollouts, len(self.policy.spec.moe_layers), self.policy.spec.top_k)
            self.watch = self._routing_watch()
            self.reference = self._reference()
            self.critic = self._critic()
            self.scorer = Scorer(cfg, mesh, rewards, self.start_path)
            tokenizer = load_tokenizer(self.start_path, cfg.model.chat_template)
            context = min(cfg.rollout.max_context or 1 << 30, self.policy.spec.max_position_embeddings)
            self.eval_prompts = eval_prompts(cfg, tokenizer, context) if cfg.eval.data else []
            self.data = PromptSource(
                rl.data,
                tokenizer,
                cfg.seed,
                rl.max_prompt_tokens or context - cfg.rollout.max_response_tokens,
                exclude={prompt.text for prompt in self.eval_prompts},
                required_field=lambda reward: required_field(cfg.reward, reward),
            )
        spec = self.policy.spec
        self.fp8 = Fp8Weights.of(spec, cfg.model, cfg.rollout)
        self.turns = Turns(cfg.memory, [self.policy, *([self.critic] if self.critic else [])])
        self.turns.make_room()
        how = dict(load=False, fp8=self.fp8, head_dtype=cfg.model.head_dtype)
        with task("start vLLM", is_main=mesh.is_main, stream=launcher.terminal()):
            self.engine = VLLMEngine(self.start_path, cfg.rollout, cfg.rollout_dtype, cfg.seed, mesh, **how)
        self.turns.start(self.engine)
        self.weight_sync = WeightSync(spec, cfg.parallel, self.mesh, self.engine, self.policy.parked["weights"])
        self.ledger = self._ledger()
        self.probes = make_probes(spec.vocab_size, cfg.rollout.probe_sequences, self.engine.probe_length)
        self.sync_report: SyncReport | None = None
        self.sync_gap: SyncGap | None = None
        self.pool = GroupPool(self.algorithm)
        owners = {"policy": self.policy, "data": self.data, "groups": self.pool}
        self.loop = Loop.open(cfg, mesh, "rl", rl.steps, owners | ({"critic": self.critic} if self.critic else {}))
        self.loop.around_checkpoint = self.turns.learner_alone
        self.loop.display.note(
            f"rl: {mesh.describe()}; {len(self.data)} prompts, dropped {dict(self.data.dropped)}; "
            f"{rl.prompts_per_step} prompts x {rl.samples_per_prompt} samples a step in "
            f"{rl.optimizer_steps_per_rollout} optimizer steps"
        )
        if rewards.missing:
            self.loop.display.note(f"warning: reward workers go without {', '.join(rewards.missing)}: not allowed here")
        budget = cfg.rollout.max_response_tokens
        for line in algorithms.warnings(self.algorithm, rl.optimizer_steps_per_rollout, budget):
            self.loop.display.note(f"warning: {line}")
        if cfg.model.fp8 == "blockwise" and self.weight_sync.plan.regrouped(mesh.rank):
            self.loop.display.note(
                f"warning: rollout.fp8: with {spec.head_dim} as the width of a head, q, k and v are rounded in other blocks "
                "than the learner's; both sides round alike with multiples of 128"
            )
        self._told = False  # that the gate closes for most sequences

    def prepare(self) -> None:
        """First sync, and the evaluation before the first step."""
        self.sync()
        self.loop.display.note(self.sync_report.describe(self.engine.reload_reason))
        evaluated = self.loop.folder / "eval.jsonl"
        if self.mesh.is_main and evaluated.exists():
            cut_jsonl(evaluated, self.loop.done if self.loop.done else -1)
        if self.loop.done == 0 and self.eval_prompts:
            self.loop.writer.write(0, self.evaluate(0))
            self.loop.phases.metrics()  # the first step's clock starts here

    def step(self, number: int) -> Mapping[str, float]:
        """One rollout and its optimizer steps; returns the step's reduced metrics."""
        phases, rl = self.loop.phases, self.cfg.rl
        groups, metrics = self.rollout(number)
        self.ledger.record("rollout")
        with phases("offload"):
            self.turns.learn()
        with phases("prepare"):
            batch = rl_batch.assemble(groups, self.algorithm)
            parts = rl_batch.split(batch, rl.optimizer_steps_per_rollout, seed=self.cfg.seed * 1_000_003 + number)
            packed = [self._pack(part) for part in parts]
            if rl.routing_replay == "rollout":
                merge(metrics, replay_rollout(self.policy, [micro for part in packed for micro in part]))
        if self.watch is not None:
            with phases("routing"):
                merge(metrics, self.watch.before(parts[0], noise=number == 1))
        with phases("old_log_probs"):
            merge(metrics, self.recorded_passes(packed))
        with phases("prepare"):
            batch, decided = self._decide(batch, parts, packed)
            merge(metrics, decided)
        self.ledger.record("log_probs")
        with phases("offload"):
            self.turns.update()
        with phases("update"):
            for micro in packed if not self._leaves_out(number, metrics) else ():
                merge(metrics, self._update(micro, number))
        self.ledger.record("update")
        with phases("offload"):
            self.turns.updated()
        if self.watch is not None:
            with phases("routing"):
                merge(metrics, self.watch.after(batch))
        with phases("sync"):
            self.sync()
        if self.mesh.is_main:
            merge(metrics, {"groups/trained_without_signal_fraction": rl_batch.without_signal(groups)})
        return self._finish_step(number, batch, metrics)

    def rollout(self, number: int) -> tuple[list[PromptGroup], dict[str, Metric]]:
        """The step's scored groups, in the order they were sampled, on every rank, and metrics of what was sampled.

        With a filter, rounds of fresh prompts until enough groups are kept or `rl.max_sampling_rounds` are over; the
        step then trains on what there is. Raises RunFailed when not one group was kept.
        """
        if self.from_rollouts is not None:
            self.pool.add(read_groups(rollout_file(self.from_rollouts, number)))
            groups, metrics = self.pool.take(self.cfg.rl.prompts_per_step)
            metrics |= rl_batch.group_metrics(groups) | part_metrics(groups)
            return groups, metrics if self.mesh.is_main else {}
        cfg, rl, sampled = self.cfg, self.cfg.rl, []
        for round_ in range(rl.max_sampling_rounds):
            missing = self.pool.missing(rl.prompts_per_step)
            if not missing:
                break
            groups = self._sample(missing, round_id=number + round_ * 1_000_000_007)
            self.pool.add(groups)
            sampled += groups
        groups, metrics = self.pool.take(rl.prompts_per_step)
        if not groups:
            raise RunFailed(
                f"rl step {number}: filter {self.algorithm.filter.type} kept none of {len(sampled)} groups in "
                f"{rl.max_sampling_rounds} rounds; warm the model up first, take easier prompts, or set "
                "rl.algorithm.filter.type=none"
            )
        trajectories = [t for group in groups for t in group.trajectories]
        if self.algorithm.shaping is not None:
            lengths = torch.tensor([len(t.response_ids) for t in trajectories])
            added = self.algorithm.shaping(lengths, cfg.rollout.max_response_tokens).tolist()
            for trajectory, extra in zip(trajectories, added, strict=True):
                trajectory.shaped_reward = None if trajectory.score is None else trajectory.score + extra
        every = cfg.log.rollouts_every
        if self.mesh.is_main and every and (number % every == 0 or number in (1, rl.steps)):
            write_groups(rollout_file(self.loop.folder / "rollouts", number), groups)
        if not self.mesh.is_main:
            return groups, {}
        return groups, metrics | rl_batch.group_metrics(sampled or groups) | part_metrics(sampled or groups)

    def _sample(self, count: int, round_id: int) -> list[PromptGroup]:
        """Scored groups of the next `count` prompts, in the prompts' order, on every rank. Collective."""
        cfg, phases, layout = self.cfg, self.loop.phases, self.engine.layout
        prompts = self.data.next(count)
        sampling = Sampling(cfg.rl.samples_per_prompt, cfg.rollout.max_response_tokens, cfg.rollout.temperature)
        with phases("generate"):
            own = self.engine.generate(prompts[layout.index :: layout.count], sampling, round_id)
        own = own if self.mesh.rank % layout.tensor_parallel == 0 else []
        with phases("reward"):
            self.scorer.score(own)
        with phases("gather"):
            ranks = [groups for groups in self.mesh.all_gather_object(own) if groups]
        order = {prompt.prompt_id: place for place, prompt in enumerate(prompts)}
        groups = sorted((g for groups in ranks for g in groups), key=lambda g: order[g.prompt.prompt_id])
        trajectories = [t for group in groups for t in group.trajectories]
        check_failures(cfg.reward, sum(t.reward_failed for t in trajectories), len(trajectories))
        return groups

    def recorded_passes(self, packed: list[list[MicroBatch]]) -> dict[str, Metric]:
        """Fill in old log-probs, those of the reference and values, with the packing of the update.

        The old pass is skipped when the ratio is taken to the engine, and when there is exactly one optimizer step and
        nothing else reads it: the old policy is then the one being trained, its ratio is 1 by definition, and the loss
        compares the two engines instead.
        """
        metrics: dict[str, Metric] = {}
        several = len(packed) > 1 and self.algorithm.ratio_base == "old"
        replays_old = self.cfg.rl.routing_replay == "old"
        if several or replays_old or self.algorithm.needs_old_log_probs:
            for micro in packed:
                found, routing = self.policy.read(micro)
                if replays_old:
                    merge(metrics, replay_recorded(micro, routing))
                for one, log_probs in zip(micro, found, strict=False):
                    one.batch.old_log_probs = log_probs
                    if self.mesh.reports:
                        merge(metrics, engine_gap(one.local_batch(), log_probs[one.owned]))
        if self.reference is not None:
            model, parked = self.reference
            with parked.on_device():
                for micro in packed:
                    for one, log_probs in zip(micro, model.log_probs(micro)[0], strict=False):
                        one.batch.ref_log_probs = log_probs
                self.ledger.record("reference")
        if self.critic is not None:
            for micro in packed:
                for one, values in zip(micro, self.critic.values(micro), strict=False):
                    one.batch.values = values
        return metrics

    def _decide(
        self, batch: Batch, parts: list[Batch], packed: list[list[MicroBatch]]
    ) -> tuple[Batch, dict[str, Metric]]:
        """Advantages and weights of the whole batch, and each micro-batch's slice of them.

        What the passes found is gathered first when it has a say: each rank knows it for its own micro-batches only.
        """
        mine = [micro for part in packed for micro in part]
        if self.algorithm.needs_old_log_probs or self.critic is not None:
            ranks = self.mesh.all_gather_object(rl_batch.recorded(mine) if self.mesh.reports else [])
            batch = rl_batch.with_recorded(batch, (item for rank in ranks for item in rank))
        batch, metrics = rl_batch.with_decisions(batch, parts, self.algorithm)
        rl_batch.decide(mine, batch)
        gap = rl_batch.mismatch_metrics(mine, self.algorithm, GroupSum(self.mesh.cp_group)) if self.mesh.reports else {}
        return batch, (metrics if self.mesh.is_main else {}) | gap

    def _update(self, micro: list[MicroBatch], number: int) -> dict[str, Metric]:
        """One optimizer step of the critic, if there is one, and of the policy, unless the critic is warming up."""
        metrics: dict[str, Metric] = {}
        if self.critic is not None:
            most = self.loop.alarms.most("critic/loss", "")
            result = self.critic.train_step(micro, self.critic_loss, most)
            self.loop.check_applied(result, micro, number, "critic")
            metrics |= result.metrics
        if number > self._warmup_steps():
            most = self.loop.alarms.most("", "policy/grad_norm_max")
            result = self.policy.train_step(micro, self.loss, most)
            self.loop.check_applied(result, micro, number)
            metrics |= result.metrics
            if self.watch is not None:
                metrics |= routed_load(self.policy, micro, result.routing)
        return metrics

    def _leaves_out(self, number: int, metrics: Mapping[str, Metric]) -> bool:
        """Whether an alarm has the step's updates left out. Collective where one may."""
        alarms = self.loop.alarms
        if not alarms.asks_before_update:
            return False
        known = {name: metrics[name] for name in ("response/length_mean", "gap/logprob_mean") if name in metrics}
        return alarms.skips_update(number, reduce_metrics(known, self.mesh.all_gather_object))

    def loss(self, batch: Batch, log_probs: Tensor, entropy: Tensor, shards: SequenceShards) -> Any:
        """This micro-batch's share of the step's loss, and its metrics."""
        return rl_loss(self.algorithm, batch, log_probs, entropy, shards)

    def critic_loss(self, batch: Batch, values: Tensor, shards: SequenceShards) -> Any:
        """This micro-batch's share of the critic's loss, and its metrics."""
        return critic_loss(self.algorithm, batch, values, shards)

    def sync(self) -> None:
        """Learner -> engine, and the check that both then give the same log-probs. Raises RunFailed when they do not."""
        policy, cfg, chunks, fp8 = self.policy, self.cfg, self.policy.modules, self.fp8
        learner = probe_log_probs(policy, self.probes, fp8) if cfg.rollout.sync_check != "none" else []
        self.turns.sync()
        self.sync_report = self.weight_sync.run(chunks, policy.updates)
        self.ledger.record("sync", sync_buffers=self.weight_sync.buffer_bytes)
        self.turns.sample()
        if cfg.rollout.sync_check == "none":
            return
        if cfg.rollout.sync_check == "full":
            check_checksums(self.weight_sync, chunks)
        threshold = cfg.rollout.sync_threshold or default_threshold(cfg.model.dtype, cfg.rollout_dtype, fp8=fp8 is not None)
        self.sync_gap = check_sync(self.weight_sync, chunks, self.probes, learner, threshold)

    def evaluate(self, number: int) -> dict[str, float]:
        """Held-out accuracy now; appended to rl/eval.jsonl."""
        with self.loop.phases("eval"):
            rows = evaluate(self.cfg, self.mesh, self.engine, self.rewards, self.eval_prompts)
        if self.mesh.is_main:
            write_results(self.loop.folder / "eval.jsonl", rows, step=number)
        figures = {f"eval/{k}": v for k, v in rows[0].items() if isinstance(v, float)}
        self.loop.display.note(f"held-out accuracy after step {number}: {figures['eval/accuracy']:.1%}")
        return figures

    def report(self) -> None:
        """summary.json and report.html of the whole project, and where they are."""
        if not self.mesh.is_main:
            return
        run_dir = Path(self.cfg.run_dir)
        write_summary(run_dir, self.mesh.world_size, describe_machine())
        self.loop.display.note(render_summary(run_dir))
        self.loop.display.note(f"report: {write_report(run_dir)}")

    def _finish_step(self, number: int, batch: Batch, metrics: dict[str, Metric]) -> dict[str, float]:
        cfg, phases = self.cfg, self.loop.phases
        evaluated: dict[str, float] = {}
        if self.eval_prompts and (number == cfg.rl.steps or (cfg.eval.every and number % cfg.eval.every == 0)):
            evaluated = self.evaluate(number)
        if cfg.export.every and number % cfg.export.every == 0:
            with phases("export"), self.turns.learner_alone():
                finish_export(self.policy, self.loop.folder / f"hf_step_{number:06d}", cfg, self.start_path)
        for name in ("policy/loss", "critic/loss"):
            if name in metrics:
                metrics[name] = metrics[name].scaled(1 / cfg.rl.optimizer_steps_per_rollout)
        generated = float(batch.response_mask.sum())
        seconds = {name: max(phases.seconds(name), 1e-9) for name in ("generate", "old_log_probs", "update", "sync")}
        metrics |= {
            "sync/seconds": Mean(seconds["sync"]),
            **sync_metrics(self.sync_report, self.sync_gap),
        }
        metrics |= phases.metrics() | memory_metrics() | self.ledger.metrics()
        reduced = reduce_metrics(metrics, self.mesh.all_gather_object) | evaluated
        if "critic/error_std" in reduced:
            error = reduced.pop("critic/error_std")
            reduced["critic/explained_variance"] = explained_variance(reduced["critic/return_std"], error)
        if "mismatch/weight_squared" in reduced:
            squared = reduced.pop("mismatch/weight_squared")
            reduced["mismatch/ess"] = effective_sample_size(reduced["mismatch/weight_mean"], squared)
            reduced["mismatch/chi2"] = reduced.pop("mismatch/rho_squared") - 1
        if reduced.get("routing/log_ratio_std_live"):
            kept = reduced["routing/log_ratio_std_replayed"] / reduced["routing/log_ratio_std_live"]
            reduced["routing/variance_share"] = 1 - kept**2
        if not self._told and (line := algorithms.measured(self.algorithm, reduced)):
            self.loop.display.note(f"warning: {line}")
            self._told = True
        if self.from_rollouts is None:
            reduced["throughput/rollout_tokens_per_second"] = generated / seconds["generate"]
        reduced["throughput/learner_tokens_per_second"] = batch.tokens.numel() / (
            seconds["old_log_probs"] + seconds["update"]
        )
        return reduced

    def _pack(self, batch: Batch) -> list[MicroBatch]:
        return micro_batches(batch, self.cfg.rl.micro_batch_tokens, self.policy.layout)

    def _warmup_steps(self) -> int:
        """Rollout steps in which only the critic is trained."""
        return self.cfg.rl.critic.warmup_steps if self.algorithm.value is not None else 0

    def _critic(self) -> Policy | None:
        if self.algorithm.value is None:
            return None
        critic, rl = self.cfg.rl.critic, self.cfg.rl
        return Policy.from_hf(
            critic.init_from or self.start_path,
            self.cfg,
            self.mesh,
            role="critic",
            optimizer=critic.optimizer,
            total_steps=rl.steps * rl.optimizer_steps_per_rollout,
        )

    def _ledger(self) -> MemoryLedger:
        ledger = MemoryLedger()
        for owner, parked in self.policy.parked.items():
            ledger.own(f"policy_{owner}", lambda parked=parked: parked.storages)
        if self.reference is not None:
            ledger.own("reference", lambda: self.reference[1].storages)
        if self.critic is not None:
            ledger.own("critic", lambda: [storage for one in self.critic.parked.values() for storage in one.storages])
        ledger.own("reward_model", lambda: self.scorer.storages)
        for part in ("weights", "kv_cache"):
            ledger.own(f"engine_{part}", lambda part=part: self.engine.memory()[part])
        ledger.own("sync_buffers", lambda: self.weight_sync.window_bytes)
        return ledger

    def _routing_watch(self) -> RoutingWatch | None:
        if self.policy.routing is None or not self.cfg.log.routing_tokens:
            return None
        log, most = self.cfg.log, self.cfg.rl.max_routing_mismatch
        return RoutingWatch(self.policy, self.algorithm, log.routing_tokens, most, log.routing_variance)

    def _reference(self) -> tuple[Policy, HostParked] | None:
        if not self.algorithm.needs_reference:
            return None
        path, cfg = self.cfg.rl.reference or self.start_path, self.cfg
        model = Policy.from_hf(path, cfg, self.mesh, role="reference", temperature=cfg.rollout.temperature)
        return model, HostParked.modules(model.modules)
