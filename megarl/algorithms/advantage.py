"""Advantage estimators: from one reward per trajectory to one advantage per trajectory.

A new one is a function here, a line in `ESTIMATORS` and a test.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SMALLEST_STD = 1e-6  # below it the spread of a group is rounding noise, and dividing by it would amplify that


def group_relative(
    rewards: Tensor, group_index: Tensor, *, scale: str = "std", eps: float = 1e-6, ddof: int = 1
) -> Tensor:
    """Reward minus the mean of its prompt group, divided by the group's std or not.

    `scale="std"`: (R - mean) / (std + eps), GRPO (DeepSeekMath, arXiv 2402.03300, section 4.1.2).
    `scale="none"`: R - mean (Dr. GRPO, arXiv 2503.20783).

    rewards [S] (NaN: could not be scored), group_index [S] integers. Returns [S] in the dtype of `rewards`, computed
    in float64. A NaN reward stays out of its group's statistics and gets 0; so does every member of a group with
    fewer than two scored members or a std of at most 1e-6.
    Raises ValueError for an unknown `scale`.
    """
    if scale not in ("std", "none"):
        raise ValueError(f"advantage scale {scale} is unknown; choose one of: std, none")
    scored = ~torch.isnan(rewards)
    x = torch.where(scored, rewards.double(), 0.0)
    _, group = torch.unique(group_index, return_inverse=True)
    num_groups = int(group.max()) + 1 if group.numel() else 0

    def group_sum(values: Tensor) -> Tensor:
        return values.new_zeros(num_groups).index_add_(0, group, values)

    count = group_sum(scored.double())
    centred = torch.where(scored, x - (group_sum(x) / count.clamp(min=1))[group], 0.0)
    std = (group_sum(centred.square()) / (count - ddof).clamp(min=1)).sqrt()
    informative = (std > SMALLEST_STD)[group]  # false for a group of one: its deviation is exactly 0
    scaled = centred / (std + eps)[group] if scale == "std" else centred
    return torch.where(scored & informative, scaled, 0.0).to(rewards.dtype)


ESTIMATORS: dict[str, Callable[..., Tensor]] = {"group": group_relative}
