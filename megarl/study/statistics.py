"""What is computed from the steps of one run, and over the seeds of an arm."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Row = dict[str, Any]

RESAMPLES = 10_000
COVERAGE = {2: 0.50, 3: 0.72, 4: 0.80, 5: 0.85, 10: 0.90, 20: 0.93}  # of a 95 % interval of n normal values, simulated
T95 = {
    1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228, 15: 2.131, 30: 2.042,
}  # two-sided 95 % points of Student's t by degrees of freedom
COLLAPSED_BELOW = 0.5  # of the running maximum of the reward
COLLAPSED_FOR = 0.1  # of the steps
SPIKE = 5.0  # times the median of the steps before
SPIKE_WINDOW = 20


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its 95 % interval; `low` and `high` are NaN with fewer than two seeds.

    `is_clear`: the mean is not 0 by Student's t at 95 %, which over few seeds is right where the bootstrap is too narrow.
    """

    mean: float
    low: float = math.nan
    high: float = math.nan
    seeds: int = 0
    is_clear: bool = False


def bootstrap(values: Sequence[float], resamples: int = RESAMPLES) -> Interval:
    """Percentile bootstrap of the mean (Efron 1979) over the seeds' values; NaNs are left out.

    Over few seeds it holds the mean less often than 95 % of the time (`coverage`).
    """
    known = np.asarray([value for value in values if not math.isnan(value)], dtype=np.float64)
    if not len(known):
        return Interval(math.nan)
    if len(known) == 1:
        return Interval(float(known[0]), seeds=1)
    drawn = np.random.default_rng(0).choice(known, (resamples, len(known))).mean(axis=1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    limit = T95[max(n for n in T95 if n < len(known))] * known.std(ddof=1) / math.sqrt(len(known))
    return Interval(float(known.mean()), float(low), float(high), len(known), bool(abs(known.mean()) > limit))


def coverage(seeds: int) -> float:
    """How often the interval over so many seeds holds the mean of normally distributed values."""
    return COVERAGE[max((n for n in COVERAGE if n <= seeds), default=2)]


def moving_average(values: Sequence[float]) -> list[float]:
    """Mean of each value and those before it, over a twentieth of the run."""
    width = max(1, len(values) // 20)
    return [sum(part) / len(part) for part in (values[max(0, i - width + 1) : i + 1] for i in range(len(values)))]


def has_collapsed(rewards: Sequence[float]) -> bool:
    """Whether the reward ends below half of its running maximum, and has been there for more than a tenth of the steps.

    `rewards`: one a step, averaged over a twentieth of the run first, so that one bad batch is no collapse. A reward that
    comes back above the line has recovered.
    """
    best, below = -math.inf, 0
    for reward in moving_average(rewards):
        best = max(best, reward)
        below = below + 1 if reward < COLLAPSED_BELOW * best else 0
    return below > COLLAPSED_FOR * len(rewards)


def spikes(norms: Sequence[float]) -> int:
    """Steps whose gradient norm is more than `SPIKE` times the median of the `SPIKE_WINDOW` steps before."""
    found = 0
    for i in range(3, len(norms)):
        found += norms[i] > SPIKE * float(np.median(norms[max(0, i - SPIKE_WINDOW) : i]))
    return found


@dataclass(frozen=True)
class Quantity:
    """A number of one run, from its steps; `unit` as in the charts ("%" for fractions of 1)."""

    key: str
    label: str
    meaning: str
    unit: str
    of: Callable[[list[Row]], float]


def column(rows: Sequence[Row], name: str) -> list[float]:
    """The finite values of a metric, step by step."""
    values = (row.get(name) for row in rows)
    return [float(v) for v in values if isinstance(v, int | float) and math.isfinite(v)]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _mean_of(name: str) -> Callable[[list[Row]], float]:
    return lambda rows: mean(column(rows, name))


def _at_end(name: str) -> Callable[[list[Row]], float]:
    """Mean over the last fifth of the steps."""
    return lambda rows: mean(column(rows[-max(1, len(rows) // 5) :], name))


def _rms(name: str) -> Callable[[list[Row]], float]:
    return lambda rows: math.sqrt(mean([value**2 for value in column(rows, name)]) if column(rows, name) else math.nan)


def _variance_share(rows: list[Row]) -> float:
    """1 - Var(z | replay) / Var(z), both averaged over the steps."""
    live, replayed = (_rms(f"routing/log_ratio_std_{name}")(rows) ** 2 for name in ("live", "replayed"))
    return 1 - replayed / live if live else math.nan


def _averaging(name: str) -> Callable[[list[Row]], float]:
    """std(log s_i) / std(z_t), measured."""

    def of(rows: list[Row]) -> float:
        token = _rms(f"routing/log_ratio_std_{name}")(rows)
        return _rms(f"routing/log_ratio_seq_std_{name}")(rows) / token if token else math.nan

    return of


def _independent(rows: list[Row]) -> float:
    """The same if the tokens of a sequence were independent: the root of the mean of 1 / n."""
    return math.sqrt(mean(column(rows, "routing/inverse_length")))


QUANTITIES = (
    Quantity("reward", "Reward at the end", "score of the samples, last fifth of the steps", "%", _at_end("reward/score")),
    Quantity(
        "accuracy", "Held-out accuracy", "greedy, after the last step", "%",
        lambda rows: (column(rows, "eval/accuracy") or [math.nan])[-1],
    ),
    Quantity(
        "best", "Best reward", "largest moving average of the score", "%",
        lambda rows: max(moving_average(column(rows, "reward/score")), default=math.nan),
    ),
    Quantity(
        "collapsed", "Collapsed", "share of runs whose reward ends below half of its maximum for a tenth of the steps", "%",
        lambda rows: float(has_collapsed(column(rows, "reward/score"))),
    ),
    Quantity("entropy", "Entropy at the end", "nats a token, last fifth of the steps", "", _at_end("policy/entropy")),
    Quantity("grad_norm", "Gradient norm", "mean over the optimizer steps", "", _mean_of("policy/grad_norm")),
    Quantity(
        "spikes", "Gradient spikes", "steps whose largest norm is above 5 times the median of the 20 before", "",
        lambda rows: float(spikes(column(rows, "policy/grad_norm_max"))),
    ),
    Quantity("zero", "No gradient", "trained tokens without one: clipped, or advantage 0", "%",
             _mean_of("policy/zero_grad_frac")),
    Quantity("clipped", "Clipped", "trained tokens outside a hard gate", "%", _mean_of("policy/clip_frac")),
    Quantity("no_signal", "Groups without a signal", "of those trained on: all rewards equal, so advantage 0", "%",
             _mean_of("groups/trained_without_signal_fraction")),
    Quantity("changed", "Experts changed by an update", "expert level, live routing, all optimizer steps of a rollout", "%",
             _mean_of("routing/update_changed")),
    Quantity("token_any", "Tokens changed in a layer", "by an update, in at least one layer", "%",
             _mean_of("routing/update_token_any")),
    Quantity("engine", "Experts engine / learner", "expert level, same weights", "%", _mean_of("routing/engine_changed")),
    Quantity("gap", "Log-prob gap to the engine", "mean |old - rollout| of sampled tokens", "", _mean_of("gap/logprob_mean")),
    Quantity("std", "std z, live routing", "log-ratio of a token after the updates of a step, root mean square over steps",
             "", _rms("routing/log_ratio_std_live")),
    Quantity("std_replayed", "std z, replayed", "the same tokens with the experts of before the update", "",
             _rms("routing/log_ratio_std_replayed")),
    Quantity("std_difference", "std of the difference", "live minus replayed", "", _rms("routing/log_ratio_std_difference")),
    Quantity("share", "Share of routing in Var z", "1 - Var(z | replay) / Var(z)", "%", _variance_share),
    Quantity("std_seq", "std log s", "mean log-ratio of a sequence, live routing", "", _rms("routing/log_ratio_seq_std_live")),
    Quantity("within", "Correlation in a sequence, z", "of the tokens' log-ratio, live routing", "",
             _mean_of("routing/log_ratio_within_live")),
    Quantity("within_routing", "Correlation in a sequence, routing part", "of live minus replayed", "",
             _mean_of("routing/log_ratio_within_difference")),
    Quantity("averaging", "std log s / std z", "what the mean over a sequence leaves", "", _averaging("live")),
    Quantity("averaging_routing", "std log s / std z, routing part", "of live minus replayed", "", _averaging("difference")),
    Quantity("independent", "1 / sqrt(n)", "what it would leave of independent tokens", "", _independent),
)  # fmt: skip


def summarise(steps: Sequence[Row]) -> dict[str, float]:
    """Every quantity of one run, from its steps; NaN where it did not measure it."""
    return {q.key: q.of(list(steps)) if steps else math.nan for q in QUANTITIES}
