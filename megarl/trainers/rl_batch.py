"""From scored prompt groups to what the learner trains on: no collective in here."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch

from megarl.algorithms import Algorithm, Counts, count
from megarl.metrics import Max, Mean, Metric, Sum
from megarl.types import Batch, PromptGroup


def assemble(groups: Sequence[PromptGroup], algorithm: Algorithm) -> Batch:
    """Every trajectory as one packed sequence with its advantage; the same on every rank.

    Advantages are computed on full groups, before any split. A trajectory whose reward is None has no say in its
    group's statistics and advantage 0.
    """
    trajectories = [t for group in groups for t in group.trajectories]
    sizes = [len(group.trajectories) for group in groups]
    group_index = torch.repeat_interleave(torch.arange(len(groups)), torch.tensor(sizes))
    rewards = [float("nan") if t.shaped_reward is None else t.shaped_reward for t in trajectories]
    lengths = torch.tensor([t.num_tokens for t in trajectories])
    advantages = algorithm.advantages(torch.tensor(rewards, dtype=torch.float64), group_index).float()
    mask = _per_token(trajectories, lambda t: t.response_mask, np.float32)
    routed = None
    if all(t.routed_experts is not None for t in trajectories):
        routed = torch.from_numpy(np.concatenate([_all_rows(t.routed_experts) for t in trajectories]))
    return Batch(
        tokens=torch.tensor([x for t in trajectories for x in itertools.chain(t.prompt_ids, t.response_ids)]),
        lengths=lengths,
        response_mask=mask,
        group_index=group_index,
        rollout_log_probs=_per_token(trajectories, lambda t: t.rollout_log_probs, np.float32),
        advantages=torch.repeat_interleave(advantages, lengths),
        routed_experts=routed,
        policy_version=_per_token(trajectories, lambda t: t.policy_version, np.int32),
    )


def split(batch: Batch, parts: int, seed: int) -> list[Batch]:
    """The sequences in a random order fixed by `seed`, as one batch for each optimizer step."""
    order = np.random.default_rng(seed).permutation(len(batch))
    return [batch.select(part.tolist()) for part in np.array_split(order, parts)]


def with_token_weights(batch: Batch, algorithm: Algorithm) -> Batch:
    """The optimizer step's batch with mask x aggregation / global denominator for every token."""
    ids = batch.sequence_ids()
    counts = Counts.from_tensor(count(batch.response_mask, ids, len(batch)))
    return batch.replace(token_weights=algorithm.token_weights(batch.response_mask, ids, counts))


def group_metrics(groups: Sequence[PromptGroup]) -> dict[str, Metric]:
    """What the rollout of a step says about itself: rewards, lengths, truncation, groups without signal."""
    trajectories = [t for group in groups for t in group.trajectories]
    scores = [[t.score for t in group.trajectories] for group in groups]
    lengths = [len(t.response_ids) for t in trajectories]
    n = len(trajectories)
    return {
        "reward/mean": Mean(sum(t.shaped_reward or 0.0 for t in trajectories), n),
        "reward/score": Mean(sum(t.score or 0.0 for t in trajectories), n),
        "reward/failed_fraction": Mean(sum(t.reward_failed for t in trajectories), n),
        "response/length_mean": Mean(sum(lengths), n),
        "response/length_max": Max(max(lengths)),
        "response/truncated_fraction": Mean(sum(t.finish_reason == "length" for t in trajectories), n),
        "groups/zero_std_fraction": Mean(sum(len(set(s)) == 1 for s in scores), len(groups)),
        "groups/all_right_fraction": Mean(sum(all(x == 1.0 for x in s) for s in scores), len(groups)),
        "groups/count": Sum(len(groups)),
    }


def _per_token(trajectories: Sequence, field, dtype: type) -> torch.Tensor:
    """A response-only field as one flat tensor over whole sequences, 0 on the prompts."""
    pieces = []
    for t in trajectories:
        pieces += [np.zeros(len(t.prompt_ids), dtype), np.asarray(field(t), dtype)]
    return torch.from_numpy(np.concatenate(pieces))


def _all_rows(routed: np.ndarray) -> np.ndarray:
    """[tokens, L, k]: the engine never routes the last token; its row holds distinct experts."""
    last = np.broadcast_to(np.arange(routed.shape[-1], dtype=routed.dtype), (1, *routed.shape[1:]))
    return np.concatenate([routed, last])
