"""A save that is killed, has no room or may not write: what was there before stays, and is found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def program(folder: Path, kills: int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.checkpoint_program", str(folder), str(kills), str(kills)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def seen() -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="megarl-faults-") as folder:  # pytest's own is for its user alone
        Path(folder).chmod(0o755)
        yield program(Path(folder) / "run", kills=8)


@pytest.mark.parametrize("fault, why", [("full", "No space left on device"), ("refused", "Permission denied")])
def test_a_save_that_fails_ends_the_run_with_a_line_and_leaves_the_last_one(seen, fault, why):
    found = seen[fault]
    for how in ("waiting", "behind"):
        assert found[how].startswith("the checkpoint of step 2 cannot be written to ") and why in found[how]
        assert "step_000001 is whole and stays" in found[how]
    assert (found["left"], found["restored"]) == (["step_000001"], 1)


def test_killed_at_any_moment_of_a_save_nothing_is_lost_and_nothing_half_written_is_seen(seen):
    assert seen["killed"]["kills"] == 8 and seen["killed"]["partial"] > 0


@pytest.mark.slow
def test_killed_a_hundred_times(tmp_path):
    found = program(tmp_path / "run", kills=100)["killed"]
    assert found["kills"] == 100 and found["partial"] > 20
