"""Verifiers `(prompt, response, answer) -> score` and the runner that isolates them in processes.

Nothing in this package imports torch: its workers are plain interpreters that start in a tenth of a second.
"""

from megarl.rewards.registry import check_reward, required_field
from megarl.rewards.runner import RewardRunner, ScoreResult, check_failures

__all__ = ["RewardRunner", "ScoreResult", "check_failures", "check_reward", "required_field"]
