"""Metrics that know how they combine, one reduction a step, and the places they are written to.

A mean is kept as a total and a count until the very end, so that merging micro-batches and ranks can never become a
mean of means. The names of the metrics of a run are listed with the report (`megarl.report.data`).
"""

from __future__ import annotations

import json
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megarl.errors import BadInput

Scalar = float | Tensor  # a 0-dimensional tensor stays on its device until the step's one reduction


class Metric(ABC):
    """A value that merges with others of its own type and becomes a float once, at the end of a step."""

    @abstractmethod
    def merge(self, other: Any) -> Metric:
        """The metric of both sets of observations together."""

    @abstractmethod
    def value(self) -> float:
        """The float to report; NaN when nothing was observed."""

    @abstractmethod
    def detached(self) -> Metric:
        """The same metric in Python floats, safe to pickle."""


@dataclass(frozen=True)
class Mean(Metric):
    """A weighted mean: `Mean(6, 3)` merged with `Mean(2, 1)` is 8 / 4 = 2."""

    total: Scalar
    count: Scalar = 1.0

    @classmethod
    def of(cls, values: Tensor, mask: Tensor) -> Mean:
        """Mean of `values [n]` over entries where `mask [n]` is positive; other entries may hold anything."""
        kept = mask > 0
        return cls(torch.where(kept, values.detach().double(), 0.0).sum(), kept.sum())

    def merge(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.count + other.count)

    def value(self) -> float:
        return float(self.total) / float(self.count) if float(self.count) else math.nan

    def detached(self) -> Mean:
        return Mean(float(self.total), float(self.count))


@dataclass(frozen=True)
class Sum(Metric):
    """A total over micro-batches and ranks; a rank that only repeats another rank's share must not report it."""

    total: Scalar

    def merge(self, other: Sum) -> Sum:
        return Sum(self.total + other.total)

    def value(self) -> float:
        return float(self.total)

    def detached(self) -> Sum:
        return Sum(float(self.total))

    def scaled(self, factor: float) -> Sum:
        """The total times `factor`: 1 / n turns the sum over n optimizer steps into their mean."""
        return Sum(self.total * factor)


@dataclass(frozen=True)
class Max(Metric):
    """The largest observation."""

    largest: Scalar

    @classmethod
    def of(cls, values: Tensor, mask: Tensor) -> Max:
        """Over entries where `mask` is positive; -inf when there is none."""
        kept = torch.where(mask > 0, values.detach().double(), -math.inf)
        return cls(kept.max() if kept.numel() else -math.inf)

    def merge(self, other: Max) -> Max:
        return Max(_larger(self.largest, other.largest))

    def value(self) -> float:
        return _or_nan(float(self.largest), -math.inf)

    def detached(self) -> Max:
        return Max(float(self.largest))


@dataclass(frozen=True)
class Min(Metric):
    """The smallest observation."""

    smallest: Scalar

    @classmethod
    def of(cls, values: Tensor, mask: Tensor) -> Min:
        """Over entries where `mask` is positive; inf when there is none."""
        kept = torch.where(mask > 0, values.detach().double(), math.inf)
        return cls(kept.min() if kept.numel() else math.inf)

    def merge(self, other: Min) -> Min:
        return Min(-_larger(-self.smallest, -other.smallest))

    def value(self) -> float:
        return _or_nan(float(self.smallest), math.inf)

    def detached(self) -> Min:
        return Min(float(self.smallest))


@dataclass(frozen=True)
class Std(Metric):
    """A population standard deviation kept as count, mean and sum of squared deviations.

    Merging follows Chan, Golub and LeVeque (1979), which loses no digits where E[x^2] - E[x]^2 does.
    """

    count: Scalar
    mean: Scalar
    squares: Scalar

    @classmethod
    def of(cls, values: Tensor, mask: Tensor) -> Std:
        """Over entries of `values [n]` where `mask [n]` is positive."""
        kept = mask > 0
        x, count = values.detach().double(), kept.sum()
        mean = torch.where(kept, x, 0.0).sum() / count.clamp(min=1)
        return cls(count, mean, torch.where(kept, x - mean, 0.0).square().sum())

    def merge(self, other: Std) -> Std:
        a, b = self.detached(), other.detached()
        count = a.count + b.count
        if not count:
            return a
        delta = b.mean - a.mean
        mean = a.mean + delta * b.count / count
        return Std(count, mean, a.squares + b.squares + delta**2 * a.count * b.count / count)

    def value(self) -> float:
        return math.sqrt(float(self.squares) / float(self.count)) if float(self.count) else math.nan

    def detached(self) -> Std:
        return Std(float(self.count), float(self.mean), float(self.squares))


@dataclass(frozen=True)
class Quantile(Metric):
    """A quantile kept as a histogram over bins that are finest around `centre`: exact to half a percent of the
    distance from it, from 1e-7 on."""

    share: float
    centre: float
    counts: Tensor  # [2 * BINS + 1] float64: below, at, and above the centre

    BINS = 2000
    SMALLEST, STEP = 1e-7, 0.01  # bin k holds distances around SMALLEST * exp(k STEP)

    @classmethod
    def of(cls, values: Tensor, mask: Tensor, share: float, centre: float = 0.0) -> Quantile:
        """Over entries of `values [n]` where `mask [n]` is positive."""
        distance = values.detach().double()[mask > 0] - centre
        distance = distance[~distance.isnan()]
        size = (distance.abs() / cls.SMALLEST).clamp(min=1.0).log() / cls.STEP
        signed = (size.round().clamp(max=cls.BINS) * distance.sign()).long() + cls.BINS
        return cls(share, centre, torch.bincount(signed, minlength=2 * cls.BINS + 1).double())

    def merge(self, other: Quantile) -> Quantile:
        return Quantile(self.share, self.centre, self.counts + other.counts)

    def value(self) -> float:
        total = float(self.counts.sum())
        if not total:
            return math.nan
        place = int(torch.searchsorted(self.counts.cumsum(0), self.share * total)) - self.BINS
        return self.centre + math.copysign(self.SMALLEST * math.exp(abs(place) * self.STEP), place) * (place != 0)

    def detached(self) -> Quantile:
        return Quantile(self.share, self.centre, self.counts.cpu())


@dataclass(frozen=True)
class ExpertLoad(Metric):
    """Tokens of each expert of a layer, and what is reported of them: `max_over_mean`, or the number of `unused` ones."""

    counts: Tensor  # [E] float64
    statistic: str

    def merge(self, other: ExpertLoad) -> ExpertLoad:
        return ExpertLoad(self.counts + other.counts, self.statistic)

    def value(self) -> float:
        if not self.counts.sum():
            return math.nan
        if self.statistic == "unused":
            return float((self.counts == 0).sum())
        return float(self.counts.max() / self.counts.mean())

    def detached(self) -> ExpertLoad:
        return ExpertLoad(self.counts.cpu(), self.statistic)


@dataclass(frozen=True)
class Correlation(Metric):
    """Pearson's correlation, kept as count, means, and sums of products of deviations (merged as `Std`)."""

    count: Scalar
    means: tuple[Scalar, Scalar]
    squares: tuple[Scalar, Scalar]
    products: Scalar

    @classmethod
    def of(cls, x: Tensor, y: Tensor, mask: Tensor) -> Correlation:
        """Over entries of `x [n]` and `y [n]` where `mask [n]` is positive."""
        kept = mask > 0
        x, y = x.detach().double()[kept], y.detach().double()[kept]
        if not len(x):
            return cls(0.0, (0.0, 0.0), (0.0, 0.0), 0.0)
        dx, dy = x - x.mean(), y - y.mean()
        return cls(
            float(len(x)),
            (float(x.mean()), float(y.mean())),
            (float(dx.square().sum()), float(dy.square().sum())),
            float((dx * dy).sum()),
        )

    def merge(self, other: Correlation) -> Correlation:
        count = self.count + other.count
        if not count:
            return self
        dx, dy = (b - a for a, b in zip(self.means, other.means))
        weight = self.count * other.count / count
        return Correlation(
            count,
            tuple(a + (b - a) * other.count / count for a, b in zip(self.means, other.means)),
            (self.squares[0] + other.squares[0] + dx * dx * weight, self.squares[1] + other.squares[1] + dy * dy * weight),
            self.products + other.products + dx * dy * weight,
        )

    def value(self) -> float:
        """NaN when either does not vary."""
        spread = math.sqrt(self.squares[0] * self.squares[1])
        return self.products / spread if spread > 0 else math.nan

    def detached(self) -> Correlation:
        return self


@dataclass(frozen=True)
class WithinCorrelation(Metric):
    """How far values of the same group go together: Fisher's intraclass correlation, over all pairs of all groups.

    Kept as sums over groups of n values that add up to s: 0 for independent values, 1 when each group has one value. The
    mean of a group then varies as (1 + (n - 1) correlation) / n times a value.
    """

    count: Scalar  # sum of n
    pairs: Scalar  # sum of n (n - 1)
    total: Scalar  # sum of s
    weighted: Scalar  # sum of n s
    totals_squared: Scalar  # sum of s^2
    squares: Scalar  # sum of the squares of all values

    @classmethod
    def of(cls, counts: Tensor, totals: Tensor, squares: Tensor) -> WithinCorrelation:
        """Of groups `[S]`: how many values, their sum, and the sum of their squares."""
        n, s, q = (x.detach().double() for x in (counts, totals, squares))
        return cls(*map(float, (n.sum(), (n * (n - 1)).sum(), s.sum(), (n * s).sum(), s.square().sum(), q.sum())))

    def merge(self, other: WithinCorrelation) -> WithinCorrelation:
        return WithinCorrelation(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def value(self) -> float:
        """NaN when no group has two values, or they do not vary."""
        if not self.pairs:
            return math.nan
        mean = self.total / self.count
        variance = self.squares / self.count - mean**2
        squared_sizes = self.pairs + self.count
        of_groups = self.totals_squared - 2 * mean * self.weighted + mean**2 * squared_sizes
        products = of_groups - self.count * variance
        return products / self.pairs / variance if variance > 0 else math.nan

    def detached(self) -> WithinCorrelation:
        return self


def merge(into: dict[str, Metric], new: Mapping[str, Metric]) -> dict[str, Metric]:
    """Adds the observations of `new` to `into`, in place, and returns it.

    Raises ValueError when a name is used with two types.
    """
    for name, metric in new.items():
        known = into.get(name)
        if known is None:
            into[name] = metric
        elif type(known) is type(metric):
            into[name] = known.merge(metric)
        else:
            raise ValueError(f"metric {name} is a {type(known).__name__} here and a {type(metric).__name__} there")
    return into


def reduce_metrics(metrics: Mapping[str, Metric], gather: Callable[[Any], list[Any]]) -> dict[str, float]:
    """The step's one reduction: every rank's metrics merged by type, as floats, the same on every rank.

    `gather(x)` returns the `x` of every rank (`Mesh.all_gather_object`; `lambda x: [x]` alone). Names may differ
    between ranks. A name nobody observed anything for is left out.
    """
    merged: dict[str, Metric] = {}
    for rank_metrics in gather({name: metric.detached() for name, metric in metrics.items()}):
        merge(merged, rank_metrics)
    values = {name: metric.value() for name, metric in sorted(merged.items())}
    return {name: value for name, value in values.items() if not math.isnan(value) or _was_nan(merged[name])}


def _was_nan(metric: Metric) -> bool:
    """A NaN that was observed (a diverged loss) stays visible; a NaN for want of observations does not."""
    parts = [part for value in vars(metric).values() for part in (value if isinstance(value, tuple) else (value,))]
    scalars = [part for part in parts if isinstance(part, float | int) or (isinstance(part, Tensor) and not part.dim())]
    return any(math.isnan(float(part)) for part in scalars)


def _larger(a: Scalar, b: Scalar) -> Scalar:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return torch.maximum(torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64))
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)


def _or_nan(value: float, nothing: float) -> float:
    return math.nan if value == nothing else value


class Sink:
    """A place that metrics are written to, one call a step, on rank 0."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records the metrics of one step."""
        raise NotImplementedError

    def close(self) -> None:
        """Flushes what is buffered."""


class JsonlSink(Sink):
    """One JSON object a step, flushed at once; values that are not finite become null.

    A resumed run passes the step it continues from: rows after it are cut, so that no step appears twice.
    """

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            cut_jsonl(path, -1 if resume_step is None else resume_step)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        row = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, "unix_time": round(time.time(), 3), **row}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoardSink(Sink):
    """TensorBoard event files; a resumed run purges the steps it will write again."""

    def __init__(self, folder: Path, resume_step: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=None if resume_step is None else resume_step + 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbSink(Sink):
    """Weights & Biases; the run's id is kept in its folder, so that a resumed run continues the same page."""

    def __init__(self, project: str, folder: Path, name: str, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            remedy = "pip install wandb, or set log.wandb: none"
            raise BadInput(f"log.wandb = {project!r}: wandb is not installed; {remedy}") from None
        folder.mkdir(parents=True, exist_ok=True)
        id_file = folder / "wandb_run_id"
        run_id = id_file.read_text().strip() if id_file.exists() else None
        self._run = wandb.init(
            project=project, dir=str(folder), name=name, config=dict(config), id=run_id, resume="allow"
        )
        id_file.write_text(self._run.id)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class Writer(Sink):
    """Passes every step on to several sinks; with none of them it writes nowhere, which is what other ranks hold."""

    def __init__(self, sinks: Sequence[Sink] = ()) -> None:
        self._sinks = list(sinks)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for sink in self._sinks:
            sink.write(step, metrics)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()


def open_writer(
    folder: Path,
    *,
    is_main: bool,
    resume_step: int | None = None,
    tensorboard: bool = True,
    wandb: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> Writer:
    """The sinks of one phase of a run (`RUN_DIR/sft` or `RUN_DIR/rl`): `metrics.jsonl`, `tensorboard/`, W&B.

    Ranks other than the main one get a writer without sinks. Raises BadInput when `wandb` is asked for and absent.
    """
    if not is_main:
        return Writer()
    sinks: list[Sink] = [JsonlSink(folder / "metrics.jsonl", resume_step)]
    if tensorboard:
        sinks.append(TensorBoardSink(folder / "tensorboard", resume_step))
    if wandb:
        sinks.append(WandbSink(wandb, folder, f"{folder.parent.name}/{folder.name}", config or {}))
    return Writer(sinks)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file; a last line torn by an interruption is skipped, a missing file has no rows."""
    return list(_rows(path)) if path.exists() else []


def cut_jsonl(path: Path, last_step: int) -> None:
    """Keeps the rows with `step <= last_step`; the file is replaced in one rename."""
    kept = [row for row in read_jsonl(path) if row["step"] <= last_step]
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    os.replace(partial, path)


def _rows(path: Path) -> Iterable[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            yield row
        elif number < len(lines):
            raise BadInput(f"{path}:{number}: not a JSON object; delete the line")
