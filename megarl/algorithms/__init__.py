"""Policy-optimisation algorithms as pure tensor functions: no process groups, no configuration objects."""

from __future__ import annotations

from megarl.algorithms.advantage import Estimate, Outcomes
from megarl.algorithms.aggregate import Counts, count, token_weights
from megarl.algorithms.correction import Correction, effective_sample_size, mismatch_weights
from megarl.algorithms.guards import describe_algorithm, measured, refusal, warnings
from megarl.algorithms.loss import LossInputs, policy_loss
from megarl.algorithms.presets import (
    PRESETS,
    Algorithm,
    advantage,
    check,
    from_config,
    gate,
    group_filter,
    shaping,
)
from megarl.algorithms.regularize import KL
from megarl.algorithms.value import ValueLoss, explained_variance, value_loss

__all__ = [
    "KL",
    "PRESETS",
    "Algorithm",
    "Correction",
    "Counts",
    "Estimate",
    "LossInputs",
    "Outcomes",
    "ValueLoss",
    "advantage",
    "check",
    "count",
    "describe_algorithm",
    "effective_sample_size",
    "explained_variance",
    "from_config",
    "gate",
    "group_filter",
    "measured",
    "mismatch_weights",
    "policy_loss",
    "refusal",
    "shaping",
    "token_weights",
    "value_loss",
    "warnings",
]
