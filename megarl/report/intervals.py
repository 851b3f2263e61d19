"""Means with intervals, one row each, as inline SVG in the page's colours."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape

from megarl.report.charts import BOTTOM, COLOURS, RIGHT, TOP, WIDTH, linear_axis, show, tick_label

NAMES = 120  # width of the names
ROW = 22


@dataclass(frozen=True)
class Intervals:
    """One panel. `rows`: (name, mean, low, high, colour 0 to 7); without an interval `low` and `high` are NaN."""

    title: str
    help: str
    rows: list[tuple[str, float, float, float, int]]
    unit: str = ""


def render_intervals(panel: Intervals) -> str:
    """The panel as one `<figure>`; an empty string when no row has a number."""
    rows = [row for row in panel.rows if math.isfinite(row[1])]
    if not rows:
        return ""
    ends = [value for row in rows for value in row[1:4] if math.isfinite(value)]
    low, high, ticks = linear_axis(min(ends), max(ends))
    height = TOP + ROW * len(rows) + BOTTOM

    def at(value: float) -> float:
        return NAMES + (value - low) / (high - low) * (WIDTH - NAMES - RIGHT)

    marks = []
    for tick in ticks:
        x = f"{at(tick):.1f}"
        kind = "reference" if tick == 0 else "grid"
        marks.append(f'<line class="{kind}" x1="{x}" x2="{x}" y1="{TOP}" y2="{height - BOTTOM}"/>')
        label = tick_label(tick, ticks, panel.unit)
        marks.append(f'<text class="tick" text-anchor="middle" x="{x}" y="{height - BOTTOM + 16}">{label}</text>')
    for i, (name, mean, left, right, colour) in enumerate(rows):
        y = TOP + (i + 0.5) * ROW
        said = show(mean, panel.unit)
        if math.isfinite(left):
            said += f" [{show(left, panel.unit)}, {show(right, panel.unit)}]"
            line = f'x1="{at(left):.1f}" x2="{at(right):.1f}" y1="{y}" y2="{y}"'
            marks.append(f'<line class="whisker c{colour % COLOURS}" {line}/>')
        marks.append(f'<text class="name" text-anchor="end" x="{NAMES - 10}" y="{y + 4}">{escape(name)}</text>')
        title = f"<title>{escape(f'{name}: {said}')}</title>"
        marks.append(f'<circle class="c{colour % COLOURS}" cx="{at(mean):.1f}" cy="{y}" r="4">{title}</circle>')
    label = escape(panel.title, quote=True)
    return (
        f'<figure class="chart"><figcaption><h3>{escape(panel.title)}</h3><p>{escape(panel.help)}</p></figcaption>'
        f'<div class="plot"><svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}">'
        f"{''.join(marks)}</svg></div></figure>"
    )
