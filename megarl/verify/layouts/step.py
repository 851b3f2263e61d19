"""The step that every layout runs: an uneven batch, what was recorded about it, and losses whose gates act.

On a first step every ratio is 1 and no gate acts, so a wrong ratio, mask or clip would go unseen. Here the log-probs
before the update are those of the single process plus noise, of a token and of its sequence: fixed numbers, the same in
every layout. The noise lies on a grid that keeps every token clear of a clip's edge, where rounding would decide.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megarl.algorithms import PRESETS, gate
from megarl.metrics import Metric, Sum
from megarl.trainers import rl_batch
from megarl.trainers.losses import critic_loss, rl_loss, token_mean_loss
from megarl.types import Batch, SequenceShards

# a dozen sequences, the longest over 20 times the shortest; the last group has one
LENGTHS = (3, 5, 70, 17, 64, 9, 41, 4, 28, 55, 12, 33)
PROMPTS = (1, 2, 6, 3, 8, 4, 5, 1, 2, 7, 6, 3)
GROUPS = (0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 3)
REWARDS = (1.0, 0.0, 0.5, 0.2, 0.0, 1.0, 0.3, 0.9, 1.0, 0.1, 0.0, 0.7)
# a sequence's mean log-ratio, in nats: with the sign of its advantage in about half of them, where a gate can act
SHIFTS = (0.2, 0.1, 0.25, 0.15, -0.3, 0.2, 0.12, 0.1, 0.25, -0.3, 0.2, -0.2)
UNTRAINED = 7  # this sequence has no trained token
HOLE = (4, 20, 31)  # of this sequence these tokens, as of a tool's answer
SEED = 11
TOKEN_NOISE, GRID = 0.4, 0.02  # of log-ratios, in nats
VALUE_NOISE, VALUE_GRID = 0.4, 0.06
ACTING = (0.2, 0.6)  # shares of the gates of a loss that must act
SEQUENCE_SPREAD = 0.02  # standard deviation of the sequences' mean log-ratios, at least
SOFT_TAU = 6.0  # of SAPO: its gate is then half closed at ratios of 0.7 and 1.3
RECORDED = ("old_log_probs", "rollout_log_probs", "ref_log_probs", "values", "returns")


@dataclass(frozen=True)
class Loss:
    """One loss on the whole batch, as `Policy.train_step` takes it, and the metric that says how many of its gates act."""

    name: str
    role: str  # of the model it trains
    batch: Batch
    function: Callable[..., Any]
    acting: str | None = None  # the metric: a share of tokens, or of sequences

    def __call__(self, *inputs: Any) -> tuple[Tensor, dict[str, Metric]]:
        """The loss, and among its metrics the share itself as `total`."""
        share, metrics = self.function(*inputs)
        return share, metrics | {"total": Sum(share.detach())}


def make_batch(vocab: int, dtype: torch.dtype) -> Batch:
    """The sequences, without anything a model says about them."""
    tokens = torch.randint(0, vocab, (sum(LENGTHS),), generator=_generator("tokens"))
    mask = torch.ones(sum(LENGTHS), dtype=dtype)
    batch = Batch(
        tokens=tokens,
        lengths=torch.tensor(LENGTHS),
        response_mask=mask,
        group_index=torch.tensor(GROUPS),
        sequence_index=torch.arange(len(LENGTHS)),
        rewards=torch.tensor(REWARDS, dtype=torch.float64),
    )
    offsets = batch.offsets().tolist()
    for start, prompt in zip(offsets, PROMPTS):
        mask[start : start + prompt] = 0
    mask[offsets[UNTRAINED] : offsets[UNTRAINED + 1]] = 0
    sequence, first, last = HOLE
    mask[offsets[sequence] + first : offsets[sequence] + last] = 0
    return batch


def record(batch: Batch, log_probs: Tensor, values: Tensor) -> Batch:
    """The batch with fixed numbers around what the single process says: log-probs and values `[N]`."""
    dtype = log_probs.dtype
    old = log_probs - log_ratios(batch).to(dtype)
    return batch.replace(
        old_log_probs=old,
        rollout_log_probs=old,
        ref_log_probs=log_probs - 0.5 * _normal("reference", len(batch.tokens)).to(dtype),
        values=values - value_moves(batch).to(dtype),
        returns=values + (0.5 * _normal("returns", len(batch.tokens))).round(decimals=1).add(0.013).to(dtype),
    )


def log_ratios(batch: Batch) -> Tensor:
    """[N] float64: log_probs - old_log_probs of every token."""
    noise = TOKEN_NOISE * _normal("ratios", len(batch.tokens))
    return _on_grid(noise + torch.tensor(SHIFTS, dtype=torch.float64)[batch.sequence_ids()], GRID)


def value_moves(batch: Batch) -> Tensor:
    """[N] float64: values - old values of every token."""
    return _on_grid(VALUE_NOISE * _normal("values", len(batch.tokens)), VALUE_GRID)


def losses(batch: Batch) -> list[Loss]:
    """Every loss on a recorded batch, with its advantages and its weights."""
    grpo, dapo, gspo, sapo, ppo = (PRESETS[name] for name in ("grpo", "dapo", "gspo", "sapo", "ppo"))
    low, high = sequence_band(batch)
    gspo = replace(gspo, gate=gate("clip", low=low, high=high))
    sapo = replace(sapo, gate=gate("soft", tau_pos=SOFT_TAU, tau_neg=SOFT_TAU * 1.05))
    out = []
    clipped, closed = "policy/clip_frac", "policy/gate_half_closed_frac"
    for name, algorithm, acting in (
        ("grpo", grpo, clipped),
        ("dapo", dapo, clipped),
        ("gspo", gspo, "policy/clip_seq_frac"),
        ("sapo", sapo, closed),
    ):
        decided = rl_batch.with_decisions(batch, [batch], algorithm)[0]
        out.append(Loss(name, "policy", decided, partial(rl_loss, algorithm), acting))
    decided = rl_batch.with_decisions(batch, [batch], ppo)[0].replace(returns=batch.returns)
    varying = decided.replace(advantages=_normal("advantages", len(batch.tokens)).float())
    out.append(Loss("ppo", "policy", varying, partial(rl_loss, ppo), clipped))
    out.append(Loss("critic", "critic", decided, partial(critic_loss, ppo), "critic/clip_frac"))
    mean = batch.response_mask / batch.response_mask.sum()
    out.append(Loss("sft", "policy", batch.replace(token_weights=mean), token_mean_loss))
    return out


def sequence_band(batch: Batch) -> tuple[float, float]:
    """GSPO's clip band for which about 40 % of the trained sequences leave it on the side that clips."""
    shards = SequenceShards(batch.sequence_ids(), len(batch))
    moved = shards.mean(log_ratios(batch), batch.response_mask)
    advantages = rl_batch.with_decisions(batch, [batch], PRESETS["gspo"])[0].advantages
    signs = shards.mean(advantages.double(), batch.response_mask).sign()
    trained = shards.sum(batch.response_mask)[:, 0] > 0
    sizes = (moved * signs)[trained & (moved * signs > 0)].sort(descending=True).values
    count = min(max(1, round(0.4 * int(trained.sum()))), len(sizes) - 1)
    edge = float(sizes[count - 1] + sizes[count]) / 2
    return 1 - math.exp(-edge), math.exp(edge) - 1


def problems(loss: Loss, metrics: dict[str, float]) -> list[str]:
    """Why a run of the loss would prove little: gates that stay shut or always act, ratios that agree."""
    if loss.acting is None:
        return []
    out = []
    share = metrics[loss.acting]
    if not ACTING[0] <= share <= ACTING[1]:
        out.append(f"{loss.name}: {share:.0%} of the gates act, not {ACTING[0]:.0%} to {ACTING[1]:.0%}")
    spread = metrics.get("policy/log_ratio_seq_std", math.inf)
    if not spread >= SEQUENCE_SPREAD:
        out.append(f"{loss.name}: the ratios of the sequences differ by {spread:.1e}, not {SEQUENCE_SPREAD:g}")
    return out


def _on_grid(x: Tensor, grid: float) -> Tensor:
    return (x / grid).round() * grid


def _generator(what: str) -> torch.Generator:
    return torch.Generator().manual_seed(SEED * 1000 + sum(what.encode()))


def _normal(what: str, count: int) -> Tensor:
    return torch.randn(count, dtype=torch.float64, generator=_generator(what))
