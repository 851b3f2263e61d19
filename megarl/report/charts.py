"""Line and stacked-area charts as inline SVG, coloured by the page's CSS variables."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass, field
from html import escape

Point = tuple[float, float]

WIDTH, HEIGHT = 560, 260
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 12, 34
MOST_POINTS = 500  # per series, after thinning
COLOURS = 8


@dataclass(frozen=True)
class Series:
    name: str
    points: list[Point]
    band: list[tuple[float, float]] | None = None  # (low, high) per point, drawn as a shade
    smooth: bool = False  # draw a moving average over the faint raw line


@dataclass(frozen=True)
class Chart:
    """One panel. `unit`: "%" shows fractions of 1 as percent; any other stands in the title and behind numbers."""

    title: str
    help: str
    series: list[Series]
    unit: str = ""
    log: bool = False
    stacked: bool = False
    from_zero: bool = False
    lines: list[tuple[str, float]] = field(default_factory=list)  # named horizontal reference lines
    x_name: str = "step"


def render(chart: Chart) -> str:
    """The chart as one `<figure>`; an empty string when no series has a point."""
    series = [_thinned(s, chart.stacked) for s in chart.series if s.points]
    if chart.log:
        series = [s for s in (_positive(s) for s in series) if s.points]
    if not series:
        return ""
    heights = _stack(series) if chart.stacked else [[y for _, y in s.points] for s in series]
    scale = _Scale.over(chart, series, heights)
    marks = _areas(series, heights, scale) if chart.stacked else _lines(series, scale)
    body = _grid(chart, scale) + "".join(_reference(*line, scale) for line in chart.lines) + marks
    svg = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(chart.title, quote=True)}">{body}'
        f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/></svg>'
    )
    legend = "".join(f'<li><span class="key c{i % COLOURS}"></span>{escape(s.name)}</li>' for i, s in enumerate(series))
    title = f"{chart.title} ({chart.unit})" if chart.unit not in ("", "%") else chart.title
    data = escape(json.dumps(_hover(chart, series, heights, scale), separators=(",", ":")), quote=True)
    return (
        f'<figure class="chart" data-chart="{data}"><figcaption><h3>{escape(title)}</h3>'
        f'<p>{escape(chart.help)}</p></figcaption><ul class="legend">{legend}</ul>'
        f'<div class="plot">{svg}<div class="tip" hidden></div></div></figure>'
    )


def show(value: float, unit: str = "") -> str:
    """A number for people: `0.1234`, `12.3%`, `1.2e-07`, `1,234`."""
    if unit == "%":
        return f"{value * 100:.3g}%" if 0 < abs(value) < 0.01 else f"{value * 100:.1f}%"
    size = abs(value)
    if size == 0:
        text = "0"
    elif size < 1e-3 or size >= 1e7:
        text = f"{value:.2e}"
    elif size >= 1000:
        text = f"{value:,.0f}"
    else:
        text = f"{value:.4g}"
    return f"{text} {unit}" if unit else text


@dataclass(frozen=True)
class _Scale:
    x0: float
    x1: float
    y0: float
    y1: float
    log: bool
    y_ticks: list[float]

    @classmethod
    def over(cls, chart: Chart, series: list[Series], heights: list[list[float]]) -> _Scale:
        xs = [x for s in series for x, _ in s.points]
        ys = [y for column in heights for y in column]
        ys += [edge for s in series for low_high in s.band or [] for edge in low_high]
        ys += [y for _, y in chart.lines] + ([0.0] if chart.from_zero or chart.stacked else [])
        x0, x1 = min(xs), max(xs)
        if x0 == x1:
            x0, x1 = x0 - 0.5, x1 + 0.5
        y0, y1, ticks = _log_axis(min(ys), max(ys)) if chart.log else linear_axis(min(ys), max(ys))
        return cls(x0, x1, y0, y1, chart.log, ticks)

    def x(self, value: float) -> float:
        return LEFT + (value - self.x0) / (self.x1 - self.x0) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = (math.log10(self.y0), math.log10(self.y1)) if self.log else (self.y0, self.y1)
        at = math.log10(value) if self.log else value
        return HEIGHT - BOTTOM - (at - low) / (high - low) * (HEIGHT - TOP - BOTTOM)


def linear_axis(low: float, high: float) -> tuple[float, float, list[float]]:
    """Rounded ends of an axis that holds both, and its ticks."""
    if high - low < 1e-12 * max(abs(low), abs(high), 1e-12):
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    step = _nice_step((high - low) / 4)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return first * step, last * step, [k * step for k in range(first, last + 1)]


def _nice_step(raw: float) -> float:
    magnitude = 10.0 ** math.floor(math.log10(raw))
    return next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw * (1 - 1e-9))


def _log_axis(low: float, high: float) -> tuple[float, float, list[float]]:
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    last = max(last, first + 1)
    stride = max(1, math.ceil((last - first) / 5))
    return 10.0**first, 10.0**last, [10.0**k for k in range(first, last + 1, stride)]


def _grid(chart: Chart, scale: _Scale) -> str:
    out = []
    for tick in scale.y_ticks:
        y = scale.y(tick)
        label = f"1e{round(math.log10(tick))}" if scale.log else tick_label(tick, scale.y_ticks, chart.unit)
        out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(f'<text class="tick" text-anchor="end" x="{LEFT - 7}" y="{y + 3.5:.1f}">{label}</text>')
    for tick in step_ticks(scale.x0, scale.x1):
        x = scale.x(tick)
        out.append(f'<text class="tick" text-anchor="middle" x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}">{tick:g}</text>')
    name = escape(chart.x_name)
    out.append(f'<text class="axis" text-anchor="end" x="{WIDTH - RIGHT}" y="{HEIGHT - 3}">{name}</text>')
    return "".join(out)


def tick_label(tick: float, ticks: list[float], unit: str) -> str:
    """A tick's number with as many digits as tell it from the others."""
    factor = 100 if unit == "%" else 1
    step = (ticks[1] - ticks[0]) * factor if len(ticks) > 1 else 1.0
    largest = max(abs(t) for t in ticks) * factor
    if largest and (largest < 1e-3 or largest >= 1e6):
        return f"{tick * factor:.1e}" if tick else "0"
    decimals = max(0, -math.floor(math.log10(step) + 1e-9) + (1 if f"{step:e}".startswith("2.5") else 0))
    text = f"{tick * factor:,.{decimals}f}"
    return f"{text}%" if unit == "%" else text


def step_ticks(x0: float, x1: float) -> list[float]:
    """Whole numbers between both, about six."""
    step = max(1.0, _nice_step((x1 - x0) / 6)) if x1 > x0 else 1.0
    step = math.ceil(step)
    first = math.ceil(x0 / step - 1e-9)
    return [k * step for k in range(first, math.floor(x1 / step + 1e-9) + 1)]


def _lines(series: list[Series], scale: _Scale) -> str:
    out = []
    for i, s in enumerate(series):
        colour = f"c{i % COLOURS}"
        if s.band:
            upper = [(x, high) for (x, _), (_, high) in zip(s.points, s.band, strict=True)]
            lower = [(x, low) for (x, _), (low, _) in zip(s.points, s.band, strict=True)]
            out.append(f'<path class="band {colour}" d="{_path(upper + lower[::-1], scale)}Z"/>')
        averaged = _average(s.points) if s.smooth and len(s.points) > 15 else None
        if averaged:
            out.append(f'<path class="line raw {colour}" d="{_path(s.points, scale)}"/>')
        out.append(f'<path class="line {colour}" d="{_path(averaged or s.points, scale)}"/>')
        if len(s.points) <= 30:
            pixels = ((scale.x(x), scale.y(y)) for x, y in s.points)
            out += [f'<circle class="{colour}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in pixels]
    return "".join(out)


def _areas(series: list[Series], heights: list[list[float]], scale: _Scale) -> str:
    out, below = [], [0.0] * len(heights[0])
    for i, (s, column) in enumerate(zip(series, heights, strict=True)):
        xs = [x for x, _ in s.points]
        outline = list(zip(xs, column, strict=True)) + list(zip(xs, below, strict=True))[::-1]
        out.append(f'<path class="area c{i % COLOURS}" d="{_path(outline, scale)}Z"/>')
        below = column
    return "".join(out)


def _reference(name: str, value: float, scale: _Scale) -> str:
    y = scale.y(value)
    return (
        f'<line class="reference" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="reference" text-anchor="end" x="{WIDTH - RIGHT - 4}" y="{y - 4:.1f}">{escape(name)}</text>'
    )


def _path(points: list[Point], scale: _Scale) -> str:
    return "M" + "L".join(f"{scale.x(x):.1f},{scale.y(y):.1f}" for x, y in points)


def _average(points: list[Point]) -> list[Point]:
    """Mean over a centred window of about a twentieth of the run, which does not lag behind the data."""
    half = max(2, len(points) // 40)
    windows = (points[max(0, i - half) : i + half + 1] for i in range(len(points)))
    means = (sum(y for _, y in window) / len(window) for window in windows)
    return [(x, mean) for (x, _), mean in zip(points, means, strict=True)]


def _stack(series: list[Series]) -> list[list[float]]:
    total = [0.0] * len(series[0].points)
    out = []
    for s in series:
        total = [below + y for below, (_, y) in zip(total, s.points, strict=True)]
        out.append(total)
    return out


def _thinned(s: Series, averaged: bool) -> Series:
    """At most `MOST_POINTS` points: of each stretch its lowest and highest, so that spikes survive, or its mean."""
    if len(s.points) <= MOST_POINTS or s.band:
        return s
    stretches = MOST_POINTS // 2
    edges = [round(i * len(s.points) / stretches) for i in range(stretches + 1)]
    kept: list[Point] = []
    for start, end in itertools.pairwise(edges):
        stretch = s.points[start:end]
        if averaged:
            kept.append((stretch[-1][0], sum(y for _, y in stretch) / len(stretch)))
        else:
            kept += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
    return Series(s.name, kept, None, s.smooth)


def _positive(s: Series) -> Series:
    return Series(s.name, [p for p in s.points if p[1] > 0], None, s.smooth)


def _hover(chart: Chart, series: list[Series], heights: list[list[float]], scale: _Scale) -> dict:
    """What the page's script needs: per series its name and, per point, step, pixel position and text."""
    rows = []
    for s, column in zip(series, heights, strict=True):
        pixels = [
            [x, round(scale.x(x), 1), round(scale.y(top), 1), show(y, chart.unit)]
            for (x, y), top in zip(s.points, column, strict=True)
        ]
        rows.append({"name": s.name, "points": pixels})
    return {"x": chart.x_name, "width": WIDTH, "height": HEIGHT, "series": rows}
