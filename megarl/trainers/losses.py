"""The losses of the trainers: what an optimizer step hands to `Policy.train_step`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megarl.algorithms import Algorithm, LossInputs, policy_loss, value_loss
from megarl.metrics import Max, Mean, Metric
from megarl.types import Batch, SequenceShards


def rl_loss(algorithm: Algorithm, batch: Batch, log_probs: Tensor, entropy: Tensor, shards: SequenceShards) -> Any:
    """This micro-batch's share of the step's policy loss, and its metrics."""
    inputs = LossInputs(
        log_probs=log_probs,
        advantages=batch.advantages,
        token_weights=batch.token_weights,
        mask=batch.response_mask,
        old_log_probs=batch.old_log_probs,
        ref_log_probs=batch.ref_log_probs,
        rollout_log_probs=batch.rollout_log_probs,
        mismatch_weights=batch.mismatch_weights,
        entropy=entropy,
    )
    loss, metrics = policy_loss(algorithm, inputs, shards)
    if batch.old_log_probs is None:
        metrics |= engine_gap(batch, log_probs.detach())
    return loss, metrics


def critic_loss(algorithm: Algorithm, batch: Batch, values: Tensor, shards: SequenceShards) -> Any:
    """This micro-batch's share of the critic's loss, and its metrics."""
    return value_loss(algorithm.value, values, batch.values, batch.returns, batch.token_weights, batch.response_mask)


def token_mean_loss(batch: Batch, log_probs: Tensor, entropy: Tensor, shards: SequenceShards) -> Any:
    """Cross-entropy with the batch's global token weights."""
    chosen = torch.where(batch.response_mask > 0, log_probs, 0.0)
    loss = -(batch.token_weights * chosen).sum()
    return loss, {"sft/loss": Mean(-chosen.detach().double().sum(), batch.response_mask.double().sum())}


def engine_gap(batch: Batch, log_probs: Tensor) -> dict[str, Metric]:
    """|learner - engine| log-prob of the sampled tokens, in nats: the mismatch the update works with."""
    gap = (log_probs - batch.rollout_log_probs).abs()
    return {
        "gap/logprob_mean": Mean.of(gap, batch.response_mask),
        "gap/logprob_max": Max.of(gap, batch.response_mask),
    }
