"""Filters and reward shaping: which groups are trained on, and what is added to a verifier's score.

Both see unshaped scores of whole groups. A new one is a function here, a line in its registry and a test.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megarl.algorithms.advantage import SMALLEST_STD


def dynamic_sampling(scores: Tensor, group_index: Tensor) -> Tensor:
    """Keep a group whose scores differ (DAPO, arXiv 2503.14476, section 3.2): with right and wrong answers only, some
    but not all are right.

    scores [S], unshaped (NaN: not scored, ignored), group_index [S]. Returns the kept groups, ascending. Decided on
    the unshaped score: a length penalty would make an all-wrong group look as if it had a signal.
    """
    kept = [int(g) for g in torch.unique(group_index) if _differ(scores[group_index == g])]
    return torch.tensor(kept, dtype=torch.int64)


def _differ(scores: Tensor) -> bool:
    scored = scores[~torch.isnan(scores)]
    return scored.numel() > 1 and bool(scored.max() - scored.min() > SMALLEST_STD)


def soft_overlong(lengths: Tensor, budget: int, *, max_length: int | None = None, cache: int | None = None) -> Tensor:
    """What is added to the reward of a long response (DAPO, arXiv 2503.14476, equation 13), float64 `[S]` in [-1, 0].

    lengths [S]: response tokens, the end token included. 0 up to max_length - cache, then linearly down to -1 at
    max_length. `budget` (the longest response) stands for `max_length`, and a fifth of it for `cache`, as in the paper.
    Raises ValueError when cache is not in 1 .. max_length.
    """
    longest = max_length or budget
    ramp = cache or max(1, longest // 5)
    if not 0 < ramp <= longest:
        raise ValueError(f"shaping soft-overlong cache {ramp} must be between 1 and max_length {longest}")
    return ((longest - ramp - lengths.double()) / ramp).clamp(-1.0, 0.0)


FILTERS: dict[str, Callable[..., Tensor]] = {"dynamic-sampling": dynamic_sampling}
SHAPINGS: dict[str, Callable[..., Tensor]] = {"soft-overlong": soft_overlong}
