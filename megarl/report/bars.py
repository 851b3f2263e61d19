"""Stacked horizontal bars, one for each phase, as inline SVG in the page's colours."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

from megarl.report.charts import BOTTOM, COLOURS, HEIGHT, RIGHT, TOP, WIDTH, linear_axis, show, tick_label

NAMES = 84  # width of the bars' names
THICKNESS = 0.62  # of a bar, as a share of its row


@dataclass(frozen=True)
class Bars:
    """One panel: `rows` from the top down as (name, what each part of the bar has); parts in `order`, then any others."""

    title: str
    help: str
    rows: list[tuple[str, dict[str, float]]]
    unit: str = ""
    order: tuple[str, ...] = ()


def render_bars(panel: Bars) -> str:
    """The panel as one `<figure>`; an empty string without a bar. Parts keep their order and their colour in all bars."""
    there = dict.fromkeys(name for _, parts in panel.rows for name in parts)
    names = [*(name for name in panel.order if name in there), *(name for name in there if name not in panel.order)]
    if not names:
        return ""
    _, end, ticks = linear_axis(0.0, max(sum(parts.values()) for _, parts in panel.rows))
    height, scale = (HEIGHT - TOP - BOTTOM) / len(panel.rows), (WIDTH - NAMES - RIGHT) / end
    out = [_grid(ticks, scale, panel.unit)]
    for row, (label, parts) in enumerate(panel.rows):
        y, left = TOP + (row + (1 - THICKNESS) / 2) * height, float(NAMES)
        middle = TOP + (row + 0.5) * height + 3.5
        out.append(f'<text class="tick" text-anchor="end" x="{NAMES - 7}" y="{middle:.1f}">{_words(label)}</text>')
        for index, name in enumerate(names):
            width = parts.get(name, 0.0) * scale
            tip = f"{_words(label)}, {_words(name)}: {escape(show(parts.get(name, 0.0), panel.unit))}"
            out.append(
                f'<rect class="bar c{index % COLOURS}{_shade(index)}" x="{left:.1f}" y="{y:.1f}" width="{width:.1f}" '
                f'height="{height * THICKNESS:.1f}"><title>{tip}</title></rect>'
            )
            left += width
    legend = "".join(
        f'<li><span class="key c{i % COLOURS}{_shade(i)}"></span>{_words(name)}</li>' for i, name in enumerate(names)
    )
    title = f"{panel.title} ({panel.unit})" if panel.unit else panel.title
    return (
        f'<figure class="chart"><figcaption><h3>{escape(title)}</h3><p>{escape(panel.help)}</p></figcaption>'
        f'<ul class="legend">{legend}</ul><div class="plot"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(panel.title, quote=True)}">{"".join(out)}</svg></div></figure>'
    )


def _grid(ticks: list[float], scale: float, unit: str) -> str:
    out = []
    for tick in ticks:
        x = NAMES + tick * scale
        out.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        label = tick_label(tick, ticks, unit)
        out.append(f'<text class="tick" text-anchor="middle" x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}">{label}</text>')
    return "".join(out)


def _shade(index: int) -> str:
    """Once all colours are used they come again, paler."""
    return " pale" if index >= COLOURS else ""


def _words(name: str) -> str:
    return escape(name.replace("_", " "))
