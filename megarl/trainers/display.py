"""What a person sees while a run goes on: a live panel on a terminal, one plain line a step elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Self, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from megarl.metrics import Max, Mean, Metric

SPARK = "▁▂▃▄▅▆▇█"


class Phases:
    """Seconds per phase of a step: `with phases("generate"): ...`.

    A phase entered twice adds up; nested phases are counted in both. `on_enter` is told the name, and after it that of
    where one is again, so that a display can show it; after an exception nothing. `synchronize` runs before each clock
    reading, for devices that work asynchronously.
    """

    def __init__(
        self, on_enter: Callable[[str], None] | None = None, synchronize: Callable[[], None] | None = None
    ) -> None:
        self._on_enter = on_enter or (lambda name: None)
        self._synchronize = synchronize or (lambda: None)
        self._seconds: dict[str, float] = {}
        self._inside = ["between phases"]
        self._started = time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._inside.append(name)
        self._on_enter(name)
        self._synchronize()
        start = time.perf_counter()
        try:
            yield
        finally:
            self._synchronize()
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start
            self._inside.pop()
        self._on_enter(self._inside[-1])

    def seconds(self, name: str) -> float:
        """Seconds of the phase since the last `metrics()`; 0 if it was not entered."""
        return self._seconds.get(name, 0.0)

    def metrics(self) -> dict[str, Metric]:
        """`time/<phase>`, the mean over ranks, and `time/step`, the slowest rank; then starts over."""
        now = time.perf_counter()
        out: dict[str, Metric] = {f"time/{name}": Mean(seconds) for name, seconds in self._seconds.items()}
        out["time/step"] = Max(now - self._started)
        self._seconds, self._started = {}, now
        return out


class Display:
    """The main rank's view of a run. Use it as a context manager; every method is safe on any rank and stream.

    `title` says what runs ("rl", "sft", "reward_model"); `total` steps, of which `start` are already done. `stream` is
    where a person looks (the real terminal, when standard output goes to a log). Other ranks pass `is_main=False` and
    show nothing.
    """

    def __init__(
        self, title: str, total: int, *, start: int = 0, is_main: bool = True, stream: TextIO | None = None
    ) -> None:
        self.title, self.total = title, total
        self._stream = stream or sys.stdout
        self._silent = not is_main
        self._step = start
        self._first_step, self._first_time = start, time.perf_counter()
        self._phase = "starting"
        self._metrics: dict[str, float] = {}
        self._history: deque[float] = deque(maxlen=24)
        self._live: Live | None = None
        if is_main and self._stream.isatty():
            self._start_live(start)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def phase(self, name: str) -> None:
        """Shows what the run is doing now."""
        self._phase = name.replace("_", " ")
        self._refresh()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows a finished step; `metrics` are the reduced floats of `reduce_metrics`."""
        if self._silent:
            return
        self._step, self._metrics = step, self._metrics | dict(metrics)
        self._history.append(_headline(metrics))
        if self._live is None:
            print(step_line(self.title, step, self.total, metrics, self._eta()), file=self._stream, flush=True)
            return
        self._bar.update(self._task, completed=step)
        self._refresh()

    def note(self, text: str) -> None:
        """One line that stays on the screen or in the log."""
        if self._silent:
            return
        if self._live is None:
            print(text, file=self._stream, flush=True)
        else:
            self._live.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        if self._live is not None:
            self._phase = "done" if self._step >= self.total else "stopped"
            self._refresh()
            self._live.stop()
            self._live = None

    def _start_live(self, start: int) -> None:
        console = Console(file=self._stream)
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            expand=True,
        )
        self._task = self._bar.add_task(self.title, total=self.total, completed=start)
        self._live = Live(
            self._render(), console=console, refresh_per_second=2, redirect_stdout=False, redirect_stderr=False
        )
        self._live.start()

    def _refresh(self) -> None:
        if self._live is not None:
            self._live.update(self._render())

    def _render(self) -> Group:
        table = Table.grid(padding=(0, 2), expand=True)
        cells = [f"[dim]{name}[/dim] {value}" for name, value in step_figures(self._metrics)]
        for row in range(0, len(cells), 4):
            table.add_row(*cells[row : row + 4])
        status = Text.assemble(("phase ", "dim"), self._phase, ("   trend ", "dim"), sparkline(self._history))
        times = Text.assemble(("time  ", "dim"), time_split(self._metrics) or "-")
        return Group(self._bar, table, times, status)

    def _eta(self) -> float:
        done = self._step - self._first_step
        seconds = time.perf_counter() - self._first_time
        return seconds / done * (self.total - self._step) if done > 0 else math.nan


class Transfer:
    """Bytes that are read or written, and how fast: a bar on a terminal, elsewhere a line each `interval` seconds.

    `stream` None: nothing is shown. Use it as a context manager; nothing shows before `start`.
    """

    def __init__(self, description: str, stream: TextIO | None, interval: float = 10.0) -> None:
        self._description, self._stream, self._interval = description, stream, interval
        self._bar: Progress | None = None
        self._done = self._total = 0
        self._started = self._said = time.perf_counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None and self._total:
            self._say()

    def start(self, total: int) -> None:
        """`total` bytes in all."""
        self._total, self._started = total, time.perf_counter()
        if self._stream is not None and self._stream.isatty():
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=None),
                DownloadColumn(binary_units=True),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=Console(file=self._stream),
                expand=True,
            )
            self._task = self._bar.add_task(self._description, total=total)
            self._bar.start()

    def add(self, count: int) -> None:
        """`count` more bytes are done."""
        self._done += count
        if self._bar is not None:
            self._bar.advance(self._task, count)
        elif time.perf_counter() - self._said > self._interval:
            self._say()

    def note(self, text: str) -> None:
        """One line that stays."""
        if self._stream is not None:
            print(text, file=self._stream, flush=True)

    def _say(self) -> None:
        self._said = time.perf_counter()
        speed = self._done / (self._said - self._started) / 2**20
        self.note(f"{self._description}: {self._done / 2**20:.0f} of {self._total / 2**20:.0f} MiB, {speed:.0f} MiB/s")


@contextmanager
def task(description: str, *, is_main: bool = True, stream: TextIO | None = None) -> Iterator[None]:
    """Shows one long action: a spinner on a terminal, elsewhere a line when it starts and one when it is done."""
    stream = stream or sys.stdout
    if not is_main:
        yield
        return
    start = time.perf_counter()
    if stream.isatty():
        console = Console(file=stream)
        with console.status(description):
            yield
        console.print(f"{description}: {time.perf_counter() - start:.1f} s", markup=False, highlight=False)
        return
    print(f"{description} ...", file=stream, flush=True)
    yield
    print(f"{description}: {time.perf_counter() - start:.1f} s", file=stream, flush=True)


FIGURES: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("reward", "reward/mean", lambda x: f"{x:.3f}"),
    ("accuracy", "reward/score", lambda x: f"{x:.1%}"),
    ("held-out", "eval/accuracy", lambda x: f"{x:.1%}"),
    ("loss", "sft/loss", lambda x: f"{x:.4f}"),
    ("validation", "sft/validation_loss", lambda x: f"{x:.4f}"),
    ("loss", "reward_model/loss", lambda x: f"{x:.4f}"),
    ("accuracy", "reward_model/accuracy", lambda x: f"{x:.1%}"),
    ("margin", "reward_model/margin", lambda x: f"{x:.3f}"),
    ("validation", "reward_model/validation_accuracy", lambda x: f"{x:.1%}"),
    ("length", "response/length_mean", lambda x: f"{x:.1f}"),
    ("truncated", "response/truncated_fraction", lambda x: f"{x:.1%}"),
    ("entropy", "policy/entropy", lambda x: f"{x:.3f}"),
    ("clipped", "policy/clip_frac", lambda x: f"{x:.1%}"),
    ("gap", "gap/logprob_mean", lambda x: f"{x:.1e}"),
    ("sync", "sync/unchecked", lambda x: "UNCHECKED"),
    ("experts changed", "routing/update_changed", lambda x: f"{x:.2%}"),
    ("by the engine", "routing/engine_changed", lambda x: f"{x:.2%}"),
    ("grad norm", "policy/grad_norm", lambda x: f"{x:.3g}"),
    ("grad norm", "sft/grad_norm", lambda x: f"{x:.3g}"),
    ("grad norm", "reward_model/grad_norm", lambda x: f"{x:.3g}"),
    ("lr", "policy/lr", lambda x: f"{x:.2g}"),
    ("lr", "sft/lr", lambda x: f"{x:.2g}"),
    ("lr", "reward_model/lr", lambda x: f"{x:.2g}"),
    ("rollout tok/s", "throughput/rollout_tokens_per_second", lambda x: f"{x:,.0f}"),
    ("learner tok/s", "throughput/learner_tokens_per_second", lambda x: f"{x:,.0f}"),
)


def step_figures(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """The figures a person follows, of those that the metrics hold: (short name, formatted value)."""
    return [(name, show(metrics[key])) for name, key, show in FIGURES if key in metrics]


def step_line(title: str, step: int, total: int, metrics: Mapping[str, float], eta: float) -> str:
    """The plain line of one step."""
    figures = " | ".join(f"{name} {value}" for name, value in step_figures(metrics))
    times = time_split(metrics)
    parts = [f"{title} step {step}/{total}", figures, times, f"left {duration(eta)}"]
    return " | ".join(part for part in parts if part)


def time_split(metrics: Mapping[str, float]) -> str:
    """`3.1 s = generate 1.4 + update 1.2 + ...`, the largest first; phases under 1 % are left out."""
    total = metrics.get("time/step")
    if total is None:
        return ""
    phases = {key.removeprefix("time/"): value for key, value in metrics.items() if key.startswith("time/")}
    phases.pop("step")
    shown = sorted(((s, name) for name, s in phases.items() if s >= 0.01 * total), reverse=True)
    split = " + ".join(f"{name.replace('_', ' ')} {seconds:.2f}" for seconds, name in shown)
    return f"{total:.2f} s" + (f" = {split}" if split else "")


def duration(seconds: float) -> str:
    """`75` -> `1:15`; unknown -> `?`."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def sparkline(values: Iterator[float] | deque[float]) -> str:
    """The last values as a row of bars, scaled to their own range."""
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return "-"
    low, high = min(known), max(known)
    scale = (len(SPARK) - 1) / (high - low) if high > low else 0.0
    return "".join(SPARK[round((value - low) * scale)] for value in known)


def _headline(metrics: Mapping[str, float]) -> float:
    followed = ("reward/score", "reward/mean", "sft/loss", "reward_model/loss")
    return next((metrics[key] for key in followed if key in metrics), math.nan)
