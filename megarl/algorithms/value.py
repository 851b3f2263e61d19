"""The critic's loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megarl.metrics import Mean, Metric, Std, Sum


@dataclass(frozen=True)
class ValueLoss:
    """1/2 max((V - Ret)^2, (V_old + clip(V - V_old, -clip, clip) - Ret)^2) under the token weights (PPO)."""

    clip: float | None = 0.2

    def __post_init__(self) -> None:
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"value clip {self.clip} must be above 0; unset it to leave the value unclipped")


def value_loss(
    settings: ValueLoss, values: Tensor, old_values: Tensor, returns: Tensor, token_weights: Tensor, mask: Tensor
) -> tuple[Tensor, dict[str, Metric]]:
    """This micro-batch's share of the critic's loss, and its metrics; every tensor `[n]`, entries off the mask unused.

    Shares of all micro-batches and ranks add up. Metrics: the loss, the clipped share, and what
    `explained_variance` needs.
    """
    on = mask > 0
    values, old, returns = (torch.where(on, x, 0.0) for x in (values, old_values, returns))
    error = (values - returns).square()
    clipped = torch.zeros_like(on)
    if settings.clip is not None:
        other = (old + (values - old).clamp(-settings.clip, settings.clip) - returns).square()
        # within the clip both are the same but for rounding, which must not count
        clipped = ((values - old).abs() > settings.clip) & (other.detach() > error.detach())
        error = torch.maximum(error, other)
    loss = 0.5 * torch.where(on, token_weights * error, 0.0).sum()
    metrics: dict[str, Metric] = {
        "critic/loss": Sum(loss.detach()),
        "critic/clip_frac": Mean.of(clipped, mask),
        "critic/value_mean": Mean.of(values, mask),
        "critic/return_mean": Mean.of(returns, mask),
        "critic/return_std": Std.of(returns, mask),
        "critic/error_std": Std.of(returns - values, mask),
    }
    return loss, metrics


def explained_variance(return_std: float, error_std: float) -> float:
    """1 - Var(Ret - V) / Var(Ret); 0 when all returns are the same."""
    return 1.0 - (error_std / return_std) ** 2 if return_std > 0 else 0.0
