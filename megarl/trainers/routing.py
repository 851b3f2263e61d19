"""Routing in RL: what the update replays, and on a few sequences a step how far routing moves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megarl.algorithms import Algorithm
from megarl.algorithms.ratio import compute_ratio
from megarl.data import pack
from megarl.errors import RunFailed
from megarl.learner.policy import Policy
from megarl.metrics import Correlation, Mean, Metric, Std, WithinCorrelation
from megarl.models.moe.drift import Drift, load_metrics
from megarl.models.moe.replay import LIVE, RowRouting
from megarl.parallel import GroupSum, Mesh
from megarl.types import Batch, MicroBatch, SequenceShards


def own_rows(rows: Tensor, mesh: Mesh) -> Tensor:
    """The part of a tensor over a packed row `[n, ...]` that this rank's routers see, under sequence parallelism 1 / tp."""
    size = len(rows) // mesh.tp
    return rows[mesh.tp_rank * size : (mesh.tp_rank + 1) * size]


def replay_rollout(policy: Policy, micro_batches: Sequence[MicroBatch]) -> dict[str, Metric]:
    """R3 (arXiv 2510.11370): every pass over these micro-batches takes the experts that the engine recorded.

    Returns the share of positions that are routed live all the same. Raises RunFailed for a record that does not fit.
    """
    live, total = 0, 0
    for micro in micro_batches:
        micro.experts = policy.routing.local(micro)
        real = own_rows(micro.held >= 0, policy.mesh)
        live += int((micro.experts[:, real, 0] == LIVE).sum())
        total += micro.experts[:, real, 0].numel()
    return {"routing/live_fraction": Mean(float(live), float(total))}


def replay_recorded(micro_batches: Sequence[MicroBatch], routing: Sequence[RowRouting]) -> dict[str, Metric]:
    """R2 (GSPO, arXiv 2507.18071, section 5.3): later passes take the experts of the old pass, `routing`."""
    for micro, row in zip(micro_batches, routing, strict=True):
        micro.experts = row.stacked().cpu()
    return {"routing/live_fraction": Mean(0.0, float(sum(micro.experts[..., 0].numel() for micro in micro_batches)))}


def routed_load(policy: Policy, micro_batches: Sequence[MicroBatch], routing: Sequence[RowRouting]) -> dict[str, Metric]:
    """How evenly the tokens of these micro-batches were spread over the experts of this rank's layers."""
    experts, masks = [], []
    for micro, row in zip(micro_batches, routing, strict=True):
        chosen = row.stacked()
        if row.experts is not None:
            chosen = torch.where(row.experts[..., :1] == LIVE, chosen, row.experts.to(chosen.dtype))
        experts.append(chosen)
        masks.append(own_rows(micro.held >= 0, policy.mesh))
    layers = [layer.number for layer in policy.routing.layers]
    return load_metrics(layers, torch.cat(experts, dim=1).cpu(), torch.cat(masks), policy.spec.num_experts)


def changed_layers(drift: Drift, mesh: Mesh) -> Tensor:
    """[m]: in how many layers of the whole model a row's experts differ. Collective over the pipeline."""
    changed = drift.changed_layers
    if mesh.pp > 1:
        dist.all_reduce(changed, group=mesh.pp_group)
    return changed


@dataclass
class _Reading:
    """The watched sequences as one model saw them: log-probs [N] (empty off the last stage) and what the routers did."""

    log_probs: Tensor | None
    routing: RowRouting

    @property
    def experts(self) -> Tensor:
        return self.routing.stacked().cpu()


@dataclass
class RoutingWatch:
    """Two small passes a step, before and after the update, over at most `tokens` tokens of each data-parallel rank.

    Routing is live in both, whatever is replayed. Three comparisons of response tokens: the engine against the learner
    with the same weights (`routing/engine_*`, when the engine records experts), the learner before against after the
    update (`routing/update_*`), and in a run's first step two passes with the same weights (`routing/noise_*`), the floor
    of both. With `variance` one pass a step more: the log-ratio with the experts of before the update
    (`routing/log_ratio_*`). `most_changed`: the largest share of experts, in any layer, that engine and learner may choose
    differently.
    """

    policy: Policy
    algorithm: Algorithm
    tokens: int
    most_changed: float
    variance: bool = False
    _micro: MicroBatch | None = None
    _before: _Reading | None = None

    def before(self, batch: Batch, noise: bool) -> dict[str, Metric]:
        """Choose sequences of `batch`, the same on every rank, and read them; twice for the noise floor. Collective.

        Raises RunFailed when the engine's record cannot be of these tokens: rows or layers are misaligned.
        """
        self._micro = self._choose(batch)
        self._before = self._read()
        metrics: dict[str, Metric] = {}
        if noise:
            metrics |= self._drift(self._before.experts, self._read().experts).metrics("routing/noise")
        if self._micro.batch.routed_experts is not None:
            drift = self._drift(self.policy.routing.local(self._micro), self._before.experts, self._sampled_now())
            metrics |= self._compare(drift, "routing/engine")
            gap = self._gap(self._before.log_probs, self._micro.batch.rollout_log_probs)
            metrics |= self._correlation(drift, gap, "routing/engine_gap_correlation")
            self._check_alignment(drift)
        return metrics

    def after(self, batch: Batch) -> dict[str, Metric]:
        """Read the same sequences again; `batch` is the whole rollout batch with its advantages. Collective."""
        now, micro = self._read(), self._micro
        first, second = self._before.experts, now.experts
        drift = self._drift(first, second)
        gates = torch.stack(now.routing.gates).cpu() if len(first) else torch.zeros(second.shape)
        metrics = self._compare(drift, "routing/update")
        metrics["routing/update_gate_mass"] = drift.gate_mass(first, second, gates)
        metrics |= self._correlation(drift, self._gap(now.log_probs, self._before.log_probs), "routing/update_ratio_correlation")
        clipped = self._clipped(now, batch.select(micro.batch.sequence_index.tolist()))
        metrics |= self._correlation(drift, clipped, "routing/update_clip_correlation")
        return metrics | self._variance(now) if self.variance else metrics

    def _choose(self, batch: Batch) -> MicroBatch:
        """Sequences in turns for the data-parallel ranks, of each as many as fit; every rank knows all choices."""
        layout, chosen = self.policy.layout, []
        for rank in range(layout.dp):
            mine, used = [], 0
            for index in range(rank, len(batch), layout.dp):
                size = layout.padded(int(batch.lengths[index]))
                if used + size <= self.tokens:
                    mine.append(index)
                    used += size
            chosen.append((used, mine))
        rows = -(-max(used for used, _ in chosen) // layout.multiple) * layout.multiple if layout.equal_rows else 0
        return pack(batch, chosen[layout.dp_rank][1], layout, rows)

    def _read(self) -> _Reading:
        log_probs, routing = self.policy.read([self._micro] * self.policy.layout.count_multiple)
        return _Reading(log_probs[0] if log_probs else None, routing[0])

    def _sampled_now(self) -> Tensor:
        """[n] bool: rows of tokens sampled with the weights of now; groups carried over, or read from files, have others."""
        version = self._micro.batch.policy_version[self._micro.held.clamp(min=0)]
        return self._micro.routed_rows & (version == self.policy.updates)

    def _drift(self, first: Tensor, second: Tensor, rows: Tensor | None = None) -> Drift:
        mask = own_rows(self._micro.routed_rows if rows is None else rows, self.policy.mesh)
        layers = [layer.number for layer in self.policy.routing.layers]
        return Drift.between(layers, first, second, mask)

    def _compare(self, drift: Drift, prefix: str) -> dict[str, Metric]:
        metrics = drift.metrics(prefix)
        changed = changed_layers(drift, self.policy.mesh)
        if self.policy.mesh.is_last_stage:
            metrics[f"{prefix}_token_any"] = Mean.of(changed > 0, drift.mask)
        return metrics

    def _correlation(self, drift: Drift, per_token: Tensor | None, name: str) -> dict[str, Metric]:
        """Of the number of layers a row is routed differently in, and a number [N] of the token that it predicts."""
        changed = changed_layers(drift, self.policy.mesh)
        if per_token is None:
            return {}
        targets = own_rows(self._micro.targets, self.policy.mesh)
        trained = drift.mask & (targets >= 0) & (self._micro.batch.response_mask[targets.clamp(min=0)] > 0)
        return {name: Correlation.of(changed, per_token[targets.clamp(min=0)], trained)}

    def _gap(self, first: Tensor | None, second: Tensor | None) -> Tensor | None:
        return None if first is None or second is None else (first - second).abs()

    def _clipped(self, now: _Reading, batch: Batch) -> Tensor | None:
        """[N]: whether the gate is shut for a token of the watched sequences after the update; None: it never shuts."""
        if now.log_probs is None:
            return None
        owned = self._micro.owned
        own = self._micro.batch.replace(advantages=batch.advantages).take(owned)
        shards = SequenceShards(own.sequence_ids(), len(own), GroupSum(self.policy.mesh.cp_group))
        before, mask = self._before.log_probs[owned], own.response_mask > 0
        ratio = compute_ratio(self.algorithm.ratio, now.log_probs[owned], before, mask, shards)
        flag = self.algorithm.gate(ratio, torch.where(mask, own.advantages, 0.0)).flags.get("clip_frac")
        if flag is None:
            return None
        return torch.zeros(len(self._micro.batch.tokens)).index_copy_(0, owned, flag.float())

    def _variance(self, now: _Reading) -> dict[str, Metric]:
        """The log-ratio of the same tokens after the update, with the experts of now and with those of before.

        By name of its three parts, `live`, `replayed` and `difference` (what the change of experts adds): its spread over
        tokens, over sequences as log s_i (the mean over a sequence, GSPO, arXiv 2507.18071, equation 7), and how far the
        tokens of a sequence go together. `routing/inverse_length`: mean of 1 / n, the square of the factor between the
        first two for independent tokens.
        """
        micro = self._micro
        micro.experts = self._before.experts if self.policy.routing.layers else None
        replayed = self._read()
        micro.experts = None
        if now.log_probs is None:
            return {}
        before, own = self._before.log_probs[micro.owned].double(), micro.local_batch()
        shards = SequenceShards(own.sequence_ids(), len(own), GroupSum(self.policy.mesh.cp_group))
        mask = own.response_mask > 0
        live, still = (torch.where(mask, x.log_probs[micro.owned] - before, 0.0) for x in (now, replayed))
        metrics: dict[str, Metric] = {}
        for name, z in {"live": live, "replayed": still, "difference": live - still}.items():
            totals, squares, counts = shards.sum(z, z.square(), mask.double()).unbind(1)
            metrics[f"routing/log_ratio_std_{name}"] = Std.of(z, mask)
            metrics[f"routing/log_ratio_seq_std_{name}"] = Std.of(totals / counts.clamp(min=1), counts)
            metrics[f"routing/log_ratio_within_{name}"] = WithinCorrelation.of(counts, totals, squares)
        return metrics | {"routing/inverse_length": Mean.of(1 / counts.clamp(min=1), counts)}

    def _check_alignment(self, drift: Drift) -> None:
        mine = [(layer, int(count), int(drift.mask.sum())) for layer, count in zip(drift.layers, drift.changed.sum(1))]
        sums: dict[int, tuple[int, int]] = {}
        for layer, changed, rows in (item for rank in self.policy.mesh.all_gather_object(mine) for item in rank):
            known = sums.get(layer, (0, 0))
            sums[layer] = (known[0] + changed, known[1] + rows)
        shares = {layer: changed / max(rows * drift.top_k, 1) for layer, (changed, rows) in sorted(sums.items())}
        wrong = {layer: share for layer, share in shares.items() if share > self.most_changed}
        if wrong:
            named = ", ".join(f"layer {layer}: {share:.0%}" for layer, share in list(wrong.items())[:6])
            raise RunFailed(
                f"routing: of the experts that the engine recorded the learner, with the same weights, chooses too many "
                f"differently ({named}; rl.max_routing_mismatch = {self.most_changed:.0%}): its rows or layers are not those "
                "of the tokens"
            )
