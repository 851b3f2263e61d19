"""Verifiers `(prompt, response, answer) -> score` and the runner that isolates them in processes.

Nothing in this package imports torch: its workers are plain interpreters that start in a tenth of a second.
"""

from megarl.rewards.registry import MODEL, WEIGHTED, all_rewards, check_reward, parts, required_field, verifiers
from megarl.rewards.runner import RewardRunner, ScoreResult, check_failures

__all__ = [
    "MODEL",
    "WEIGHTED",
    "RewardRunner",
    "ScoreResult",
    "all_rewards",
    "check_failures",
    "check_reward",
    "parts",
    "required_field",
    "verifiers",
]
