"""Policy-optimisation algorithms as pure tensor functions: no process groups, no configuration objects."""

from __future__ import annotations

from megarl.algorithms.advantage import group_relative
from megarl.algorithms.aggregate import Counts, count, token_weights
from megarl.algorithms.loss import LossInputs, policy_loss
from megarl.algorithms.presets import GRPO, GSPO, PRESETS, Algorithm, advantage, check, from_config, gate
from megarl.algorithms.regularize import KL

__all__ = [
    "GRPO",
    "GSPO",
    "KL",
    "PRESETS",
    "Algorithm",
    "Counts",
    "LossInputs",
    "advantage",
    "check",
    "count",
    "from_config",
    "gate",
    "group_relative",
    "policy_loss",
    "token_weights",
]
