"""Penalties towards the reference policy, per token, under the same weights as the policy term.

With kappa = log pi - log pi_ref (Schulman, "Approximating KL divergence", 2020): k1 = kappa, k2 = kappa^2 / 2,
k3 = exp(-kappa) - 1 + kappa >= 0. A new estimator is a function here, a line in `ESTIMATORS` and a test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class KL:
    """A penalty in the loss, `coef * sum(token_weights * estimator)`, or in the reward of each token, minus
    `coef * estimator` of the policy before the first update."""

    estimator: str = "k3"
    coef: float = 0.001
    placement: str = "loss"
    input_clamp: float | None = 20.0  # |kappa| before the estimator; clamped tokens lose their gradient
    output_clamp: float | None = 10.0  # |estimate|; clamped tokens lose their gradient

    def __post_init__(self) -> None:
        if self.estimator not in ESTIMATORS:
            raise ValueError(f"kl estimator {self.estimator} is unknown; choose one of: {', '.join(ESTIMATORS)}")
        if self.placement not in PLACEMENTS:
            raise ValueError(f"kl placement {self.placement} is unknown; choose one of: {', '.join(PLACEMENTS)}")

    def __call__(self, log_probs: Tensor, ref_log_probs: Tensor, ratio: Tensor) -> Tensor:
        """Per-token penalty [n] from log-probs [n] and the token ratio [n] to the old policy, both differentiable."""
        kappa = _clamped(log_probs - ref_log_probs, self.input_clamp)
        return _clamped(ESTIMATORS[self.estimator](kappa, ratio), self.output_clamp)


PLACEMENTS = ("loss", "reward")


def k1(kappa: Tensor, ratio: Tensor) -> Tensor:
    """Unbiased in value; its gradient is 0 in expectation, so in a loss it only adds noise."""
    return kappa


def k2(kappa: Tensor, ratio: Tensor) -> Tensor:
    """Biased in value; its gradient is the gradient of the KL on policy."""
    return kappa.square() / 2


def k3(kappa: Tensor, ratio: Tensor) -> Tensor:
    """Unbiased and non-negative; gradient 1 - exp(-kappa) (GRPO, arXiv 2402.03300, equation 4)."""
    return kappa.neg().expm1() + kappa


def k3_plus(kappa: Tensor, ratio: Tensor) -> Tensor:
    """The value of k3 with the gradient of k2."""
    gradient = k2(kappa, ratio)
    return k3(kappa, ratio).detach() + (gradient - gradient.detach())


def k3_importance(kappa: Tensor, ratio: Tensor) -> Tensor:
    """r k3 with a differentiable ratio: unbiased off policy too (DeepSeek-V3.2, arXiv 2512.02556)."""
    return ratio * k3(kappa, ratio)


ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "k1": k1,
    "k2": k2,
    "k3": k3,
    "k3+": k3_plus,
    "k3-is": k3_importance,
}


def _clamped(x: Tensor, bound: float | None) -> Tensor:
    return x if bound is None else x.clamp(-bound, bound)
