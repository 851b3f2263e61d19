"""From scored prompt groups to what the learner trains on: no collective in here."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch

from megarl.algorithms import Algorithm, Counts, Outcomes, count, mismatch_weights
from megarl.errors import RunFailed
from megarl.metrics import Max, Mean, Metric, Sum, merge
from megarl.types import Batch, MicroBatch, PromptGroup, SequenceShards, Trajectory

# what a pass of the learner leaves on a rank's own micro-batches, and what the loss reads
RECORDED = ("old_log_probs", "ref_log_probs", "values")
DECIDED = ("response_mask", "advantages", "returns", "mismatch_weights", "token_weights")


def assemble(groups: Sequence[PromptGroup], algorithm: Algorithm) -> Batch:
    """Every trajectory as one packed sequence; the same on every rank.

    With overlong filtering, truncated responses are not trained on; they stay in the statistics of their group.
    """
    trajectories = [t for group in groups for t in group.trajectories]
    sizes = [len(group.trajectories) for group in groups]
    mask = _per_token(trajectories, lambda t: t.response_mask, np.float32)
    lengths = torch.tensor([t.num_tokens for t in trajectories])
    if algorithm.drop_truncated:
        kept = torch.tensor([t.finish_reason != "length" for t in trajectories])
        mask = mask * torch.repeat_interleave(kept, lengths)
    routed = None
    if all(t.routed_experts is not None for t in trajectories):
        routed = torch.from_numpy(np.concatenate([_all_rows(t) for t in trajectories]))
    return Batch(
        tokens=torch.tensor([x for t in trajectories for x in itertools.chain(t.prompt_ids, t.response_ids)]),
        lengths=lengths,
        response_mask=mask,
        group_index=torch.repeat_interleave(torch.arange(len(groups)), torch.tensor(sizes)),
        sequence_index=torch.arange(len(trajectories)),
        rewards=torch.tensor([_reward(t.shaped_reward) for t in trajectories], dtype=torch.float64),
        rollout_log_probs=_per_token(trajectories, lambda t: t.rollout_log_probs, np.float32),
        routed_experts=routed,
        policy_version=_per_token(trajectories, lambda t: t.policy_version, np.int32),
    )


def split(batch: Batch, parts: int, seed: int) -> list[Batch]:
    """The sequences in a random order fixed by `seed`, as one batch for each optimizer step; none of them empty."""
    order = np.random.default_rng(seed).permutation(len(batch))
    return [batch.select(part.tolist()) for part in np.array_split(order, min(parts, len(batch)))]


Record = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]


def recorded(micro_batches: Iterable[MicroBatch]) -> list[Record]:
    """What this rank's passes found out, per micro-batch: (sequence_index, owned tokens, the fields of `RECORDED`)."""
    out = []
    for micro in micro_batches:
        fields = {name: getattr(micro.batch, name) for name in RECORDED}
        found = {name: x[micro.owned] for name, x in fields.items() if x is not None}
        out.append((micro.batch.sequence_index, micro.owned, found))
    return out


def with_recorded(batch: Batch, found: Iterable[Record]) -> Batch:
    """The whole batch with the records of every rank at their tokens."""
    offsets = batch.offsets()
    fields: dict[str, torch.Tensor] = {}
    for sequences, owned, records in found:
        pieces = [torch.arange(offsets[s], offsets[s + 1]) for s in sequences.tolist()]
        for name, values in records.items():
            whole = fields.setdefault(name, torch.zeros(len(batch.tokens), dtype=values.dtype))
            if pieces:
                whole[torch.cat(pieces)[owned]] = values
    return batch.replace(**fields)


def with_decisions(batch: Batch, parts: Sequence[Batch], algorithm: Algorithm) -> tuple[Batch, dict[str, Metric]]:
    """Advantages, returns, mismatch weights and token weights of a whole rollout batch, and metrics about them.

    Advantages are computed on full groups, before any split; a sequence without a reward has no say in its group's
    statistics and advantage 0. `parts`: the batch of each optimizer step, whose denominators its weights hold.
    """
    ids, mask = batch.sequence_ids(), batch.response_mask
    metrics: dict[str, Metric] = {"reward/unscored": Sum(batch.rewards.isnan().sum())}
    penalty = None
    if algorithm.kl is not None and algorithm.kl.placement == "reward":
        finite = torch.isfinite(batch.old_log_probs) & torch.isfinite(batch.ref_log_probs) & (mask > 0)
        old, ref = (torch.where(finite, x, 0.0).double() for x in (batch.old_log_probs, batch.ref_log_probs))
        estimate = algorithm.kl(old, ref, torch.ones_like(old))
        penalty = algorithm.kl.coef * estimate
        metrics["policy/kl_ref"] = Mean.of(estimate, mask)
    outcomes = Outcomes(batch.rewards, batch.group_index, mask, ids, penalty, batch.values)
    estimate = algorithm.advantages(outcomes)
    advantages = estimate.advantages if estimate.advantages.shape == ids.shape else estimate.advantages[ids]
    changes = {"advantages": advantages.float()}
    if estimate.returns is not None:
        changes["returns"] = estimate.returns.float()
    counted = mask
    if batch.old_log_probs is not None and algorithm.needs_old_log_probs:
        shards = SequenceShards(ids, len(batch))
        mismatch = mismatch_weights(
            algorithm.correction, algorithm.veto, batch.old_log_probs, batch.rollout_log_probs, mask, shards
        )
        changes["mismatch_weights"] = mismatch.weights
        if algorithm.correction is not None and algorithm.correction.renormalise:
            counted = mask * (mismatch.weights > 0)
    weights = torch.zeros_like(mask)
    offsets = batch.offsets()
    for part in parts:
        index = torch.cat([torch.arange(offsets[s], offsets[s + 1]) for s in part.sequence_index.tolist()])
        own, own_ids = counted[index], part.sequence_ids()
        weights[index] = algorithm.token_weights(own, own_ids, Counts.from_tensor(count(own, own_ids, len(part))))
    return batch.replace(token_weights=weights, **changes), metrics


def mismatch_metrics(
    micro_batches: Iterable[MicroBatch], algorithm: Algorithm, reduce: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> dict[str, Metric]:
    """The gap between engine and learner on a rank's own tokens that have old log-probs, before any rejection.

    `reduce` sums over the ranks that share the sequences (see `SequenceShards`).
    """
    metrics: dict[str, Metric] = {}
    for own in (micro.local_batch() for micro in micro_batches if micro.batch.old_log_probs is not None):
        shards = SequenceShards(own.sequence_ids(), len(own), reduce)
        found = mismatch_weights(
            algorithm.correction, algorithm.veto, own.old_log_probs, own.rollout_log_probs, own.response_mask, shards
        )
        merge(metrics, found.metrics)
    return metrics


def decide(micro_batches: Iterable[MicroBatch], batch: Batch) -> None:
    """Give each micro-batch its slice of what was decided on the whole batch."""
    for micro in micro_batches:
        own = batch.select(micro.batch.sequence_index.tolist())
        micro.batch = micro.batch.replace(**{name: getattr(own, name) for name in DECIDED})


def group_metrics(groups: Sequence[PromptGroup]) -> dict[str, Metric]:
    """What the rollout of a step says about itself: rewards, lengths, truncation, groups without signal."""
    trajectories = [t for group in groups for t in group.trajectories]
    scores = [[t.score for t in group.trajectories if t.score is not None] for group in groups]
    lengths = [len(t.response_ids) for t in trajectories]
    n = len(trajectories)
    scored = [t for t in trajectories if t.score is not None]
    return {
        "reward/mean": Mean(sum(t.shaped_reward for t in scored), len(scored)),
        "reward/score": Mean(sum(t.score for t in scored), len(scored)),
        "reward/failed_fraction": Mean(sum(t.reward_failed for t in trajectories), n),
        "response/length_mean": Mean(sum(lengths), n),
        "response/length_max": Max(max(lengths)),
        "response/truncated_fraction": Mean(sum(t.finish_reason == "length" for t in trajectories), n),
        "groups/zero_std_fraction": Mean(sum(len(set(s)) <= 1 for s in scores), len(groups)),
        "groups/all_right_fraction": Mean(sum(bool(s) and all(x == 1.0 for x in s) for s in scores), len(groups)),
        "groups/all_wrong_fraction": Mean(sum(bool(s) and all(x == 0.0 for x in s) for s in scores), len(groups)),
        "groups/count": Sum(len(groups)),
    }


def without_signal(groups: Sequence[PromptGroup]) -> Mean:
    """Share of the trained groups whose scores are all the same."""
    flat = [len({t.score for t in group.trajectories if t.score is not None}) <= 1 for group in groups]
    return Mean(sum(flat), len(flat))


def _reward(value: float | None) -> float:
    return math.nan if value is None else value


def _per_token(trajectories: Sequence, field, dtype: type) -> torch.Tensor:
    """A response-only field as one flat tensor over whole sequences, 0 on the prompts."""
    pieces = []
    for t in trajectories:
        pieces += [np.zeros(len(t.prompt_ids), dtype), np.asarray(field(t), dtype)]
    return torch.from_numpy(np.concatenate(pieces))


def _all_rows(trajectory: Trajectory) -> np.ndarray:
    """[tokens, L, k]: the engine never routes the last token; its row holds distinct experts, and is never replayed."""
    routed = trajectory.routed_experts
    if len(routed) != trajectory.num_tokens - 1:
        raise RunFailed(
            f"routing: the engine recorded experts of {len(routed)} tokens of a sequence of {trajectory.num_tokens} (group "
            f"{trajectory.group_id}); it must be all but the last"
        )
    if routed.dtype == np.uint16:  # more than 256 experts; torch computes with signed ones
        routed = routed.astype(np.int16)
    last = np.broadcast_to(np.arange(routed.shape[-1], dtype=routed.dtype), (1, *routed.shape[1:]))
    return np.concatenate([routed, last])
