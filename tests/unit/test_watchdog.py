"""A rank that hangs ends the job with every stack in the logs; a rank that fails says in which step and phase."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megarl.config import load_config
from megarl.config.schema import PHASES
from megarl.errors import BadInput

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name("hanging_program.py")
START = """
import sys, pathlib
from megarl.launcher import launch
program, how, logs = sys.argv[1:]
sys.exit(launch([sys.executable, program, how, logs], 2, pathlib.Path(logs), 0.5))
"""


def end_of(how: str, logs: Path) -> tuple[int, str]:
    """(exit code, stderr) of two ranks."""
    command = [sys.executable, "-c", START, str(PROGRAM), how, str(logs)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT)
    return done.returncode, done.stderr


def test_a_stopped_rank_is_named_and_both_stacks_are_in_the_logs(tmp_path: Path) -> None:
    code, said = end_of("stopped", tmp_path)
    assert code == 1 and said.startswith(
        "error: rank 0: rl step 7, update: not done after 1 s; rank 1 is stopped in rl step 7, reward; "
    ), said
    assert "watchdog.phases.update" in said and len(said.splitlines()) == 1
    for rank, function in (("0", "hang"), ("1", "stop_itself")):
        assert re.search(
            rf'hanging_program.py", line \d+ in {function}$', (tmp_path / f"rank{rank}.log").read_text(), re.M
        )


def test_a_rank_that_is_elsewhere_is_named(tmp_path: Path) -> None:
    code, said = end_of("elsewhere", tmp_path)
    assert code == 1 and "not done after 1 s; rank 1 is in rl step 7, reward; the stack" in said, said


def test_a_rank_that_holds_the_interpreters_lock_writes_its_stack_and_ends(tmp_path: Path) -> None:
    code, said = end_of("locked", tmp_path)
    assert code == 1 and said.startswith("error: rank 0: ") and "in rl step 7, update" in said, said
    assert "in hang_with_the_lock" in (tmp_path / "rank0.log").read_text()


@pytest.mark.parametrize(
    ("how", "line"),
    [
        ("failed", r"error: rank 1: rl step 7, generate: ValueError: the engine is gone \(log: .*rank1.log\)"),
        ("lost", r"error: rank 0: rl step 7, gather: a collective lost a peer: .*\(log: .*rank0.log\)"),
    ],
)
def test_a_rank_that_fails_names_step_and_phase(tmp_path: Path, how: str, line: str) -> None:
    code, said = end_of(how, tmp_path)
    assert code == 1 and re.fullmatch(line, said.strip()), said


def test_limits_can_be_set_for_every_phase_that_is_entered() -> None:
    entered = set()
    for path in (ROOT / "megarl/trainers").glob("*.py"):
        entered |= set(re.findall(r'phases\("(\w+)"\)', path.read_text()))
    assert {"update", "generate"} < entered <= set(PHASES)
    with pytest.raises(BadInput, match="watchdog.phases.updates: no such phase; set one of start, "):
        load_config(ROOT / "configs/cpu/quickstart.yaml", ["watchdog.phases.updates=5"])
