"""Corrections for the gap between rollout engine and learner: rho = exp(old_log_probs - rollout_log_probs).

Weights multiply the policy term of a token and carry no gradient. They are computed once per rollout batch, before it
is split; only the level that looks at the current policy is computed with the loss. A new level or mode is a function
here, a line in its registry and a test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megarl.metrics import Max, Mean, Metric, Min
from megarl.types import SequenceShards

CLAMP = 20.0  # |log rho| of a token or a sequence
CURRENT = "token-current-over-rollout"


@dataclass(frozen=True)
class Correction:
    """One row of the field's names: TIS is `truncate`, MIS and IcePop are `mask`, at a level.

    low, high: bounds on rho at `level`. `renormalise`: tokens with weight 0 leave the denominators too; else the
    counts from before any rejection stay, so that rejecting data shrinks the step.
    Raises ValueError for an unknown level or mode and for bounds that keep nothing.
    """

    level: str = "token"
    mode: str = "truncate"
    low: float = 0.0
    high: float = 2.0
    renormalise: bool = False

    def __post_init__(self) -> None:
        if self.level not in (*LEVELS, CURRENT):
            raise ValueError(
                f"correction level {self.level} is unknown; choose one of: {', '.join((*LEVELS, CURRENT))}"
            )
        if self.mode not in MODES:
            raise ValueError(f"correction mode {self.mode} is unknown; choose one of: {', '.join(MODES)}")
        if not 0 <= self.low < self.high:
            raise ValueError(f"correction low {self.low}, high {self.high} keep nothing; set 0 <= low < high")
        if self.level == CURRENT and self.renormalise:
            raise ValueError(
                f"correction level {CURRENT} changes with every update and cannot renormalise; set it false"
            )


@dataclass(frozen=True)
class Mismatch:
    """What a correction says about the tokens of a batch, before any of it is applied."""

    weights: Tensor  # [n]: 0 on rejected tokens
    vetoed: Tensor  # [n] bool: tokens of sequences dropped by the veto
    metrics: dict[str, Metric]


def mismatch_weights(
    correction: Correction | None,
    veto: float | None,
    old_log_probs: Tensor,
    rollout_log_probs: Tensor,
    mask: Tensor,
    shards: SequenceShards,
) -> Mismatch:
    """Weights `[n]` for the policy term of each token, and the size of the gap before any rejection.

    old_log_probs (the learner's), rollout_log_probs (the engine's) and mask `[n]`. `veto`: drop every sequence with a
    token of rho below it. Without correction and veto all weights are 1, and only the metrics are of interest.
    """
    on = mask > 0
    d = torch.where(on, old_log_probs - rollout_log_probs, 0.0).clamp(-CLAMP, CLAMP)
    weights = torch.ones_like(d)
    if correction is not None and correction.level != CURRENT:
        level = LEVELS[correction.level](d, mask, shards)
        weights = MODES[correction.mode](level, d.exp(), correction.low, correction.high)
    vetoed = torch.zeros_like(on)
    if veto is not None:
        catastrophic = (d.exp() < veto) & on
        vetoed = shards.expand(shards.sum(catastrophic.to(d.dtype))[:, 0] > 0)
    metrics = _metrics(d, torch.where(vetoed, 0.0, weights), mask, shards)
    return Mismatch(torch.where(vetoed, 0.0, weights), vetoed, metrics)


def current_weights(correction: Correction, log_probs: Tensor, rollout_log_probs: Tensor, mask: Tensor) -> Tensor:
    """[n]: the same for exp(log_probs - rollout_log_probs) of the policy now (MiniRL, arXiv 2512.01374)."""
    d = torch.where(mask > 0, log_probs.detach() - rollout_log_probs, 0.0).clamp(-CLAMP, CLAMP)
    return MODES[correction.mode](d.exp(), d.exp(), correction.low, correction.high)


def _token(d: Tensor, mask: Tensor, shards: SequenceShards) -> Tensor:
    return d.exp()


def _sequence_product(d: Tensor, mask: Tensor, shards: SequenceShards) -> Tensor:
    """exp(sum of a sequence's log rho)."""
    return shards.expand(shards.sum(d)[:, 0].clamp(-CLAMP, CLAMP).exp())


def _sequence_mean(d: Tensor, mask: Tensor, shards: SequenceShards) -> Tensor:
    """The geometric mean of a sequence's rho."""
    return shards.expand(shards.mean(d, mask.to(d.dtype)).exp())


def _truncate(rho: Tensor, token: Tensor, low: float, high: float) -> Tensor:
    """min(rho, high): truncated importance sampling."""
    return rho.clamp(max=high)


def _clip(rho: Tensor, token: Tensor, low: float, high: float) -> Tensor:
    return rho.clamp(low, high)


def _mask(rho: Tensor, token: Tensor, low: float, high: float) -> Tensor:
    """rho inside the bounds, 0 outside: masked importance sampling, IcePop."""
    return torch.where((rho >= low) & (rho <= high), rho, 0.0)


def _filter_then_token_weight(rho: Tensor, token: Tensor, low: float, high: float) -> Tensor:
    """The token's own rho where the level is inside the bounds, 0 outside: the geometric filter."""
    return torch.where((rho >= low) & (rho <= high), token, 0.0)


LEVELS: dict[str, Callable[[Tensor, Tensor, SequenceShards], Tensor]] = {
    "token": _token,
    "sequence-product": _sequence_product,
    "sequence-mean": _sequence_mean,
}
MODES: dict[str, Callable[[Tensor, Tensor, float, float], Tensor]] = {
    "truncate": _truncate,
    "clip": _clip,
    "mask": _mask,
    "filter-then-token-weight": _filter_then_token_weight,
}


def _metrics(d: Tensor, weights: Tensor, mask: Tensor, shards: SequenceShards) -> dict[str, Metric]:
    rho = d.exp()
    totals, counts = shards.sum(d, (mask > 0).to(d.dtype)).unbind(1)
    trained = counts > 0
    mean = totals / counts.clamp(min=1)
    return {
        "mismatch/rho_mean": Mean.of(rho, mask),
        "mismatch/rho_min": Min.of(rho, mask),
        "mismatch/rho_max": Max.of(rho, mask),
        "mismatch/rho_seq_mean": Mean.of(mean.exp(), trained),
        "mismatch/rho_seq_min": Min.of(mean.exp(), trained),
        "mismatch/rho_seq_max": Max.of(mean.exp(), trained),
        "mismatch/rho_product_mean": Mean.of(totals.clamp(-CLAMP, CLAMP).exp(), trained),
        "mismatch/rho_squared": Mean.of(rho.square(), mask),
        "mismatch/kl_k1": Mean.of(-d, mask),
        "mismatch/kl_k3": Mean.of(d.expm1() - d, mask),
        "mismatch/logprob_gap": Mean.of(d.abs(), mask),
        "mismatch/log_ppl_difference": Mean.of(-mean, trained),
        "mismatch/weight_mean": Mean.of(weights, mask),
        "mismatch/weight_squared": Mean.of(weights.square(), mask),
        "mismatch/kept_frac": Mean.of(weights > 0, mask),
    }


def effective_sample_size(weight_mean: float, weight_squared: float) -> float:
    """(mean w)^2 / mean w^2: the share of the tokens that equally weighted ones would be worth."""
    return weight_mean**2 / weight_squared if weight_squared > 0 else 0.0
