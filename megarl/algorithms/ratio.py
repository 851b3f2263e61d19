"""Importance ratios between the learner now and before the first update, at the level an algorithm works on.

Sequence levels use the stop-gradient form s_i = sg[s_i] exp(log_prob - sg[log_prob]) (GSPO-token, arXiv 2507.18071,
equation 14): the sum over a sequence needs no gradient, so sharded tokens need one all-reduce and no differentiable
collective, and each token carries the derivative with respect to its own log-prob only. A new level is a function here,
a line in `LEVELS` and a test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megarl.types import SequenceShards

TOKEN_CLAMP = 20.0  # |log ratio| of a token; outside the gradient is 0
SEQUENCE_CLAMP = 10.0  # |log ratio| of a sequence (a mean over its tokens); outside the gradient is 0


@dataclass(frozen=True)
class SequenceStatistics:
    """Per-sequence sums of a micro-batch, after their one all-reduce; S sequences, n local tokens."""

    counts: Tensor  # [S]: trained tokens n_i
    log_ratio: Tensor  # [S]: mean of the token log-ratio, log s_i before clamping; 0 without trained tokens
    variance: Tensor  # [S]: variance of the token log-ratio within the sequence


@dataclass(frozen=True)
class Ratio:
    """What a gate works on: n local tokens, finite everywhere, 0 log-ratio where the mask is 0."""

    level: str
    value: Tensor  # [n], differentiable: the ratio at its level; at level `none` the log-prob itself
    detached: Tensor  # [n]: the ratio at its level; at level `none` the token's
    log_probs: Tensor  # [n], differentiable
    token_log_ratio: Tensor  # [n], detached, not clamped
    clamped: Tensor  # [n] bool: outside a clamp, hence without gradient
    mask: Tensor  # [n] bool: trained tokens
    sequences: SequenceStatistics
    shards: SequenceShards


def compute_ratio(level: str, log_probs: Tensor, old_log_probs: Tensor, mask: Tensor, shards: SequenceShards) -> Ratio:
    """exp(log_probs - old_log_probs) at `level`.

    log_probs, old_log_probs [n] float32 or float64, mask [n] bool. Runs the all-reduce of `shards` once, whatever the
    level and even without a trained token. Raises ValueError for an unknown level.
    """
    if level not in LEVELS:
        raise ValueError(f"ratio level {level} is unknown; choose one of: {', '.join(LEVELS)}")
    log_probs = torch.where(mask, log_probs, 0.0)
    log_ratio = log_probs - torch.where(mask, old_log_probs, 0.0).detach()
    sequences = _sequence_statistics(log_ratio, mask, shards)
    lengths = shards.expand(sequences.counts)
    value, detached, clamped = LEVELS[level](log_probs, log_ratio, shards.expand(sequences.log_ratio), lengths)
    return Ratio(
        level, value, detached.detach(), log_probs, log_ratio.detach(), clamped & mask, mask, sequences, shards
    )


def _sequence_statistics(log_ratio: Tensor, mask: Tensor, shards: SequenceShards) -> SequenceStatistics:
    total, squares, counts = shards.sum(log_ratio, log_ratio.square(), mask.to(log_ratio.dtype)).unbind(1)
    mean = total / counts.clamp(min=1)
    return SequenceStatistics(counts, mean, (squares / counts.clamp(min=1) - mean.square()).clamp(min=0))


def _none(
    log_probs: Tensor, log_ratio: Tensor, sequence_log_ratio: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """REINFORCE: the objective is A log pi, with no importance weight."""
    ratio = log_ratio.detach().clamp(-TOKEN_CLAMP, TOKEN_CLAMP).exp()
    return log_probs, ratio, torch.zeros_like(ratio, dtype=torch.bool)


def _token(
    log_probs: Tensor, log_ratio: Tensor, sequence_log_ratio: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """PPO and GRPO: r_t = pi(t) / pi_old(t)."""
    ratio = log_ratio.clamp(-TOKEN_CLAMP, TOKEN_CLAMP).exp()
    return ratio, ratio, log_ratio.detach().abs() > TOKEN_CLAMP


def _sequence(
    log_probs: Tensor, log_ratio: Tensor, sequence_log_ratio: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """GSPO: s_i = (prod_t r_t)^(1 / n_i), arXiv 2507.18071, equation 7.

    With an advantage that is constant over a sequence this is GSPO; with one that varies it is GSPO-token, and has to
    be called `sequence-token`.
    """
    clamped = sequence_log_ratio.abs() > SEQUENCE_CLAMP
    ratio = sequence_log_ratio.clamp(-SEQUENCE_CLAMP, SEQUENCE_CLAMP).exp()
    own_gradient = (log_probs - log_probs.detach()).exp()
    return ratio * torch.where(clamped, 1.0, own_gradient), ratio, clamped


def _sequence_product(
    log_probs: Tensor, log_ratio: Tensor, sequence_log_ratio: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """prod_t r_t, the ratio of whole responses (RLOO as trained by PPO).

    Its derivative with respect to one token is the ratio itself, where that of a mean is the ratio over n_i; the
    aggregation's weights hold 1 / n_i for each of the n_i tokens, so the own-token derivative is taken n_i times.
    """
    product = sequence_log_ratio * lengths
    clamped = product.abs() > TOKEN_CLAMP
    ratio = product.clamp(-TOKEN_CLAMP, TOKEN_CLAMP).exp()
    own_gradient = (lengths * (log_probs - log_probs.detach())).exp()
    return ratio * torch.where(clamped, 1.0, own_gradient), ratio, clamped


LEVELS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]] = {
    "none": _none,
    "token": _token,
    "sequence": _sequence,
    "sequence-token": _sequence,
    "sequence-product": _sequence_product,
    "geometric-mean-of-clipped": _token,  # the mean is taken by the gate, over what it clipped
}
