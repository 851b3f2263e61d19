"""Advantage estimators: from rewards (and values) to advantages.

All of them see whole groups and the whole rollout batch, so nothing here needs a collective. A new one is a function
here, a line in `ESTIMATORS` and a test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

SMALLEST_STD = 1e-6  # below it the spread of a group is rounding noise, and dividing by it would amplify that
WHITEN_EPS = 1e-8


@dataclass(frozen=True)
class Outcomes:
    """A rollout batch as an estimator sees it: S sequences in groups, n tokens laid end to end. Worked on in float64.

    NaN rewards (could not be scored) stay out of every statistic, and their sequences get advantage 0.
    """

    rewards: Tensor  # [S], shaped
    group_index: Tensor  # [S] integers: the prompt group of each sequence
    mask: Tensor | None = None  # [n]: 1 on trained tokens; for estimators that look at tokens
    sequence_ids: Tensor | None = None  # [n] in 0 .. S-1, ascending
    penalty: Tensor | None = None  # [n]: subtracted from the reward of each token, coefficient included
    values: Tensor | None = None  # [n]: the critic's value of the state before each token

    @property
    def scored(self) -> Tensor:
        """[S] bool."""
        return ~torch.isnan(self.rewards)

    def penalised(self) -> Tensor:
        """[S]: rewards minus the penalties of a sequence's trained tokens; 0 where not scored."""
        x = torch.where(self.scored, self.rewards.double(), 0.0)
        if self.penalty is None:
            return x
        on_trained = torch.where(self.mask > 0, self.penalty.double(), 0.0)
        return torch.where(self.scored, x.index_add(0, self.sequence_ids, -on_trained), 0.0)


@dataclass(frozen=True)
class Estimate:
    """Advantages `[S]` (the same for all tokens of a sequence) or `[n]`, and the critic's targets `[n]`."""

    advantages: Tensor
    returns: Tensor | None = None


def group(
    outcomes: Outcomes,
    *,
    scale: Literal["std", "none", "batch"] = "std",
    eps: float = 1e-6,
    ddof: int = 1,
    singleton: Literal["zero", "raw"] = "zero",
) -> Estimate:
    """Reward minus the mean of its prompt group, divided by a std or not.

    `scale="std"`: (R - mean) / (std + eps), GRPO (DeepSeekMath, arXiv 2402.03300, section 4.1.2).
    `scale="none"`: R - mean (Dr. GRPO, arXiv 2503.20783).
    `scale="batch"`: divided by the std of all rewards of the batch.

    Every member of a group with a std of at most 1e-6 gets 0. `singleton`: what a group with one scored member gets,
    `zero`, or `raw`: the reward itself (over 1 + eps when scaled by its own std).
    """
    scored, x = outcomes.scored, outcomes.penalised()
    mean, std, alone = _group_statistics(x, outcomes, ddof)
    centred = torch.where(scored, x - mean, 0.0)
    informative = std > SMALLEST_STD
    if scale == "std":
        centred = centred / (std + eps)
    elif scale == "batch":
        centred = centred / (x[scored].std(correction=ddof) + eps if int(scored.sum()) > 1 else 1.0)
    raw = x / (1 + eps) if scale == "std" else x
    return Estimate(_with_singletons(torch.where(informative, centred, 0.0), raw, alone, singleton))


def leave_one_out(outcomes: Outcomes, *, singleton: Literal["zero", "raw"] = "zero") -> Estimate:
    """Reward minus the mean of the other members of its group (RLOO, arXiv 2402.14740): K / (K - 1) (R - mean).

    `singleton`: what a group with one scored member gets, `zero` or `raw` (its reward).
    """
    scored, x = outcomes.scored, outcomes.penalised()
    members = _group_sum(scored.double(), outcomes.group_index)
    others = (_group_sum(x, outcomes.group_index) - x) / (members - 1).clamp(min=1)
    alone = scored & (members < 2)
    return Estimate(_with_singletons(torch.where(scored & ~alone, x - others, 0.0), x, alone, singleton))


def group_mean_then_whiten(outcomes: Outcomes) -> Estimate:
    """R - mean of the group, whitened over all trained tokens of the batch (REINFORCE++-baseline, arXiv 2501.03262)."""
    centred = group(outcomes, scale="none").advantages
    weight = outcomes.mask.new_zeros(len(centred), dtype=torch.float64)
    weight.index_add_(0, outcomes.sequence_ids, (outcomes.mask > 0).double())
    return Estimate(_whiten(centred, torch.where(outcomes.scored, weight, 0.0)))


def token_rewards(outcomes: Outcomes) -> Tensor:
    """[n]: minus the penalty on each trained token, plus the sequence's reward on its last one."""
    out = torch.zeros(len(outcomes.mask), dtype=torch.float64)
    if outcomes.penalty is not None:
        out = torch.where(outcomes.mask > 0, -outcomes.penalty.double(), 0.0)
    index, rows, _ = _columns(outcomes)
    is_last = torch.ones_like(rows, dtype=torch.bool)
    is_last[:-1] = rows[1:] != rows[:-1]
    rewarded = is_last & outcomes.scored[rows]
    out[index[rewarded]] += outcomes.rewards.double()[rows[rewarded]]
    return out


def token_reward(outcomes: Outcomes) -> Estimate:
    """The token rewards themselves: no baseline, no return."""
    return Estimate(_masked(token_rewards(outcomes), outcomes))


def return_to_go(outcomes: Outcomes, *, gamma: float = 1.0, whiten: bool = True) -> Estimate:
    """Discounted sum of the rewards from a token on, whitened over the batch (REINFORCE++, arXiv 2501.03262)."""
    returns = _scan(token_rewards(outcomes), outcomes, gamma)
    return Estimate(_masked(_whiten(returns, _trained(outcomes)) if whiten else returns, outcomes))


def gae(outcomes: Outcomes, *, gamma: float = 1.0, lam: float = 0.95, whiten: bool = True) -> Estimate:
    """Generalised advantage estimation (arXiv 1506.02438) over trained tokens only; returns = advantages + values.

    The state after a trained token is the one before the next trained token: tokens of a tool or environment in
    between are no steps. The value after the last one is 0. Sequences that were not scored have their own values as
    returns, so that they do not move the critic. Raises ValueError without values.
    """
    if outcomes.values is None:
        raise ValueError("advantage gae needs values: the algorithm needs a value model")
    values = torch.where(outcomes.mask > 0, outcomes.values.double(), 0.0)
    deltas = token_rewards(outcomes) + gamma * _next(values, outcomes) - values
    advantages = _masked(_scan(deltas, outcomes, gamma * lam), outcomes)
    returns = torch.where(outcomes.mask > 0, advantages + values, 0.0)
    return Estimate(_masked(_whiten(advantages, _trained(outcomes)) if whiten else advantages, outcomes), returns)


ESTIMATORS: dict[str, Callable[..., Estimate]] = {
    "group": group,
    "leave-one-out": leave_one_out,
    "group-mean-then-whiten": group_mean_then_whiten,
    "token-reward": token_reward,
    "return-to-go": return_to_go,
    "gae": gae,
}
NEED_VALUES = ("gae",)


def _group_sum(x: Tensor, group_index: Tensor) -> Tensor:
    """[S]: the sum of `x [S]` over the group of each sequence."""
    _, index = torch.unique(group_index, return_inverse=True)
    size = int(index.max()) + 1 if index.numel() else 0
    return x.new_zeros(size).index_add_(0, index, x)[index]


def _group_statistics(x: Tensor, outcomes: Outcomes, ddof: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and std [S] of each sequence's group, and whether it is the only scored member."""
    scored = outcomes.scored
    members = _group_sum(scored.double(), outcomes.group_index)
    mean = _group_sum(x, outcomes.group_index) / members.clamp(min=1)
    squares = torch.where(scored, x - mean, 0.0).square()
    std = (_group_sum(squares, outcomes.group_index) / (members - ddof).clamp(min=1)).sqrt()
    return mean, std, scored & (members < 2)


def _with_singletons(advantages: Tensor, raw: Tensor, alone: Tensor, singleton: str) -> Tensor:
    return torch.where(alone, raw if singleton == "raw" else torch.zeros_like(raw), advantages)


def _trained(outcomes: Outcomes) -> Tensor:
    """[n] float64: 1 on the trained tokens of scored sequences."""
    return ((outcomes.mask > 0) & outcomes.scored[outcomes.sequence_ids]).double()


def _masked(x: Tensor, outcomes: Outcomes) -> Tensor:
    return torch.where(_trained(outcomes) > 0, x, 0.0)


def _whiten(x: Tensor, weight: Tensor) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8), each entry counted `weight` times; the unbiased variance, in two passes."""
    count = weight.sum()
    mean = (x * weight).sum() / count.clamp(min=1)
    variance = ((x - mean).square() * weight).sum() / (count - 1).clamp(min=1)
    return torch.where(weight > 0, (x - mean) / (variance + WHITEN_EPS).sqrt(), 0.0)


def _columns(outcomes: Outcomes) -> tuple[Tensor, Tensor, Tensor]:
    """The trained tokens as cells of a table, one row a sequence: their indices in the batch, rows and columns."""
    index = torch.arange(len(outcomes.mask))[outcomes.mask > 0]
    rows = outcomes.sequence_ids[index]
    lengths = torch.bincount(rows, minlength=len(outcomes.rewards))
    starts = lengths.cumsum(0) - lengths
    return index, rows, torch.arange(len(index)) - starts[rows]


def _scan(x: Tensor, outcomes: Outcomes, factor: float) -> Tensor:
    """y[t] = x[t] + factor * y[next trained token of the sequence]; 0 off the trained tokens."""
    index, rows, columns = _columns(outcomes)
    table = x.new_zeros(len(outcomes.rewards), int(columns.max()) + 1 if columns.numel() else 0)
    table[rows, columns] = x[index]
    for column in range(table.shape[1] - 2, -1, -1):
        table[:, column] += factor * table[:, column + 1]
    out = torch.zeros_like(x)
    out[index] = table[rows, columns]
    return out


def _next(values: Tensor, outcomes: Outcomes) -> Tensor:
    """The value before the next trained token of the sequence; 0 after the last one."""
    index, rows, _columns_ = _columns(outcomes)
    out = torch.zeros_like(values)
    follows = rows[1:] == rows[:-1]
    out[index[:-1][follows]] = values[index[1:][follows]]
    return out
