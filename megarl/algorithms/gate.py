"""Gates: what bounds an update once the ratio has left the trust region.

A gate takes the ratio and the advantages `[n]` and returns the per-token objective, such that
loss = -(token_weights * objective).sum(). A new one is a function here (its keyword-only parameters are its settings),
a line in `GATES` and a test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megarl.algorithms.ratio import Ratio


@dataclass(frozen=True)
class Gated:
    """The objective and what the gate did, each flag reported as `policy/<name>`, its mean over trained tokens."""

    objective: Tensor  # [n], differentiable
    flags: dict[str, Tensor] = field(default_factory=dict)  # [n] each


def none(ratio: Ratio, advantages: Tensor) -> Gated:
    """A r, unbounded; at ratio level `none` REINFORCE's A log pi."""
    return Gated(advantages * ratio.value)


def clip(ratio: Ratio, advantages: Tensor, *, low: float, high: float, dual: float | None = None) -> Gated:
    """min(A r, A clip(r, 1 - low, 1 + high)): PPO, arXiv 1707.06347, equation 7; low != high: DAPO, arXiv 2503.14476.

    With `dual` c > 1 the objective of a negative advantage is bounded below by A c (Dual-clip PPO, arXiv 1912.09729,
    equation 7). On a sequence-level ratio the clip drops whole sequences.
    """
    r = ratio.value
    objective = torch.minimum(advantages * r, advantages * r.clamp(1 - low, 1 + high))
    flags = {
        "clip_high_frac": (advantages > 0) & (ratio.detached > 1 + high),
        "clip_low_frac": (advantages < 0) & (ratio.detached < 1 - low),
    }
    if dual is not None:
        objective = torch.where(advantages < 0, torch.maximum(objective, advantages * dual), objective)
        flags["clip_dual_frac"] = (advantages < 0) & (ratio.detached > dual)
    flags["clip_frac"] = torch.stack(list(flags.values())).any(0)
    return Gated(objective, flags)


GATES: dict[str, Callable[..., Gated]] = {"none": none, "clip": clip}
