"""A heat map, one row a layer and one column a stretch of steps, as inline SVG in the page's colours."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from html import escape

from megarl.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Point, show, step_ticks

MOST_COLUMNS = 120  # steps are averaged in stretches beyond this
LEVELS = 12  # shades; neighbours of one shade are drawn as one piece
KEY_WIDTH = 12  # of one shade in the legend


@dataclass(frozen=True)
class HeatMap:
    """One panel: `rows` from the top down as (name, points); every stretch of steps shows its mean."""

    title: str
    help: str
    rows: list[tuple[str, list[Point]]]
    unit: str = ""
    row_name: str = "layer"
    x_name: str = "step"


def render_heat_map(panel: HeatMap) -> str:
    """The panel as one `<figure>`; an empty string when no row has a point."""
    rows = [(name, points) for name, points in panel.rows if points]
    if not rows:
        return ""
    steps = sorted({x for _, points in rows for x, _ in points})
    width = max(1, math.ceil(len(steps) / MOST_COLUMNS))
    stretches = [steps[i : i + width] for i in range(0, len(steps), width)]
    cells = [_binned(dict(points), stretches) for _, points in rows]
    largest = max((value for row in cells for value in row if value is not None), default=0.0)
    names = [name for name, _ in rows]
    svg = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(panel.title, quote=True)}">'
        f"{_marks(cells, largest)}{_axes(panel, names, stretches)}"
        f'<rect class="cell" width="0" height="0"/></svg>'
    )
    data = {
        "row": panel.row_name,
        "x": panel.x_name,
        "box": [LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM],
        "width": WIDTH,
        "rows": names,
        "columns": [_stretch_name(stretch) for stretch in stretches],
        "values": [[None if v is None else show(v, panel.unit) for v in row] for row in cells],
    }
    return (
        f'<figure class="chart heat" data-heat="{escape(json.dumps(data, separators=(",", ":")), quote=True)}">'
        f"<figcaption><h3>{escape(panel.title)}</h3><p>{escape(panel.help)}</p></figcaption>"
        f'{_legend(largest, panel.unit)}<div class="plot">{svg}<div class="tip" hidden></div></div></figure>'
    )


def _binned(points: dict[float, float], stretches: list[list[float]]) -> list[float | None]:
    known = ([points[x] for x in stretch if x in points] for stretch in stretches)
    return [sum(values) / len(values) if values else None for values in known]


def _marks(cells: list[list[float | None]], largest: float) -> str:
    """One path for each shade, which starts as faint as the background."""
    width, height = (WIDTH - LEFT - RIGHT) / len(cells[0]), (HEIGHT - TOP - BOTTOM) / len(cells)
    pieces: dict[int, list[str]] = {}
    for i, row in enumerate(cells):
        levels = [_level(value, largest) for value in row]
        start = 0
        for j in range(1, len(levels) + 1):
            if j == len(levels) or levels[j] != levels[start]:
                if levels[start]:
                    x, right, y, end = LEFT + start * width, LEFT + j * width, TOP + i * height, TOP + (i + 1) * height
                    pieces.setdefault(levels[start], []).append(f"M{x:.1f},{y:.1f}H{right:.1f}V{end:.1f}H{x:.1f}z")
                start = j
    return "".join(
        f'<path class="shade" fill-opacity="{level / LEVELS:.2f}" d="{"".join(found)}"/>'
        for level, found in sorted(pieces.items())
    )


def _level(value: float | None, largest: float) -> int:
    """0: not drawn; 1 to LEVELS."""
    if value is None or largest <= 0 or value <= 0:
        return 0
    return min(LEVELS, math.ceil(value / largest * LEVELS))


def _axes(panel: HeatMap, names: list[str], stretches: list[list[float]]) -> str:
    height, width = (HEIGHT - TOP - BOTTOM) / len(names), (WIDTH - LEFT - RIGHT) / len(stretches)
    stride = math.ceil(len(names) / 16)
    out = [f'<rect class="frame" x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" height="{HEIGHT - TOP - BOTTOM}"/>']
    for i in range(0, len(names), stride):
        y = TOP + (i + 0.5) * height + 3.5
        out.append(f'<text class="tick" text-anchor="end" x="{LEFT - 7}" y="{y:.1f}">{escape(names[i])}</text>')
    for tick in step_ticks(stretches[0][0], stretches[-1][-1]):
        column = next(i for i, stretch in enumerate(stretches) if tick <= stretch[-1])
        x = LEFT + (column + 0.5) * width
        out.append(f'<text class="tick" text-anchor="middle" x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}">{tick:g}</text>')
    out.append(f'<text class="axis" x="4" y="{TOP + 8}">{escape(panel.row_name)}</text>')
    end = f'x="{WIDTH - RIGHT}" y="{HEIGHT - 3}"'
    return "".join(out) + f'<text class="axis" text-anchor="end" {end}>{escape(panel.x_name)}</text>'


def _legend(largest: float, unit: str) -> str:
    shades = "".join(
        f'<rect class="shade" fill-opacity="{level / LEVELS:.2f}" x="{(level - 1) * KEY_WIDTH}" width="{KEY_WIDTH}" '
        'height="10"/>'
        for level in range(1, LEVELS + 1)
    )
    bar = f'<svg class="shades" viewBox="0 0 {LEVELS * KEY_WIDTH} 10" aria-hidden="true">{shades}</svg>'
    return f'<p class="legend"><span>{escape(show(0.0, unit))}</span>{bar}<span>{escape(show(largest, unit))}</span></p>'


def _stretch_name(stretch: list[float]) -> str:
    return f"{stretch[0]:g}" if len(stretch) == 1 else f"{stretch[0]:g} to {stretch[-1]:g}"
