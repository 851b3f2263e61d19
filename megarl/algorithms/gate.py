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
    weight: Tensor | None = None  # [n], of a soft gate: what multiplies the unbounded gradient A r


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


def soft(ratio: Ratio, advantages: Tensor, *, tau_pos: float = 1.0, tau_neg: float = 1.05) -> Gated:
    """A (4 / tau) sigmoid(tau (r - 1)), tau by the sign of A: SAPO, arXiv 2511.20347, equation 5.

    The gradient is A r sech^2(tau (r - 1) / 2): that of REINFORCE at r = 1 for every tau, and never exactly 0.
    """
    tau = _by_sign(advantages, tau_pos, tau_neg)
    passed = torch.sigmoid(tau * (ratio.value - 1))
    weight = (4 * passed * (1 - passed)).detach()
    return Gated(advantages * (4 / tau) * passed, {"gate_half_closed_frac": weight < 0.5}, weight)


def stop_gradient_weight(ratio: Ratio, advantages: Tensor, *, low: float, high: float) -> Gated:
    """sg[clip(r, 1 - low, 1 + high)] A log pi: CISPO, MiniMax-M1, arXiv 2506.13585, equation 4.

    `low` >= 1 leaves the weight without a lower bound. A clipped token keeps its gradient, at the bound's weight.
    """
    weight = ratio.detached.clamp(1 - low, 1 + high)
    return Gated(weight * advantages * ratio.log_probs, _outside(ratio.detached, 1 - low, 1 + high))


def log_clip(ratio: Ratio, advantages: Tensor, *, low: float, high: float) -> Gated:
    """A exp(z), z the log ratio with min(z, high) if A > 0 and max(z, -low) if A < 0: GMPO, arXiv 2507.20673.

    At ratio level `geometric-mean-of-clipped` each token's z is clipped and the mean over the sequence taken then, so
    that a clip drops single tokens from the gradient and not the sequence.
    """
    positive, z = advantages > 0, ratio.detached.log()
    beyond = torch.where(positive, z > high, (z < -low) & (advantages < 0))
    bound = _by_sign(advantages, high, -low)
    own_gradient = torch.where(beyond, 1.0, ratio.value / ratio.detached)
    clipped = torch.where(beyond, bound, z)
    if ratio.level == "geometric-mean-of-clipped":
        clipped = ratio.shards.expand(ratio.shards.mean(clipped, ratio.mask.to(z.dtype)))
    return Gated(advantages * clipped.exp() * own_gradient, {"clip_frac": beyond})


def ratio_mask(ratio: Ratio, advantages: Tensor, *, low: float, high: float) -> Gated:
    """PPO's clip as a mask: 0 where r > 1 + high and A > 0 or r < 1 - low and A < 0, else A r; at ratio level `none`
    A log pi (MiniRL, arXiv 2512.01374)."""
    flags = {
        "clip_high_frac": (advantages > 0) & (ratio.detached > 1 + high),
        "clip_low_frac": (advantages < 0) & (ratio.detached < 1 - low),
    }
    flags["clip_frac"] = flags["clip_high_frac"] | flags["clip_low_frac"]
    return Gated(torch.where(flags["clip_frac"], 0.0, advantages * ratio.value), flags)


def _by_sign(advantages: Tensor, positive: float, other: float) -> Tensor:
    """One of two settings per token, in the precision of the advantages."""
    return torch.where(advantages > 0, torch.full_like(advantages, positive), torch.full_like(advantages, other))


def _outside(ratio: Tensor, low: float, high: float) -> dict[str, Tensor]:
    flags = {"clip_high_frac": ratio > high, "clip_low_frac": ratio < low}
    return flags | {"clip_frac": flags["clip_high_frac"] | flags["clip_low_frac"]}


GATES: dict[str, Callable[..., Gated]] = {
    "none": none,
    "clip": clip,
    "soft": soft,
    "stop-gradient-weight": stop_gradient_weight,
    "log-clip": log_clip,
    "ratio-mask": ratio_mask,
}
