"""The presets as a table, preset x axes: `python -m megarl.algorithms.table` prints the README's."""

from __future__ import annotations

from megarl.algorithms.axis import Choice
from megarl.algorithms.presets import PRESETS, Algorithm

COLUMNS = ("advantage", "ratio", "gate", "aggregate", "KL", "filter", "shaping", "value model", "correction")


def preset_table() -> str:
    """A Markdown table with one row a preset."""
    rows = [["preset", *COLUMNS], ["---"] * (len(COLUMNS) + 1)]
    rows += [[f"`{name}`", *_cells(algorithm)] for name, algorithm in PRESETS.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cells(a: Algorithm) -> list[str]:
    kl, fix = a.kl, a.correction
    return [
        _choice(a.advantage, hidden=("eps", "ddof", "singleton")),
        a.ratio,
        _choice(a.gate),
        a.aggregate,
        "" if kl is None else f"{kl.estimator} in the {kl.placement}, {kl.coef:g}",
        "" if a.filter is None else _choice(a.filter),
        "" if a.shaping is None else _choice(a.shaping),
        "" if a.value is None else f"clip {a.value.clip:g}",
        "" if fix is None else f"{fix.mode} {fix.level} at {fix.high:g}",
    ]


def _choice(choice: Choice, hidden: tuple[str, ...] = ()) -> str:
    shown = [f"{name} {value}" for name, value in choice.settings if name not in hidden and value is not None]
    return f"{choice.type} ({', '.join(shown)})" if shown else choice.type


if __name__ == "__main__":
    print(preset_table())
