"""The README's table of presets is the presets."""

from pathlib import Path

from megarl.algorithms import PRESETS
from megarl.algorithms.table import preset_table

ROOT = Path(__file__).resolve().parents[2]


def test_the_readme_has_the_table_of_the_presets():
    table = preset_table()
    assert all(f"| `{name}` |" in table for name in PRESETS)
    assert table in (ROOT / "README.md").read_text(), "print it with: python -m megarl.algorithms.table"
