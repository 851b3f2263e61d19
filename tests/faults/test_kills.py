"""Runs that are disturbed end like the one that was not, bit for bit; the long version is tools/soak.sh."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.program import Project
from tests.faults.kills import ROOT, Run, command, differences, is_running, kill_at, wait_until


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A TMPDIR with a name so short that sockets can be in folders of it."""
    with tempfile.TemporaryDirectory(prefix="megarl-test-") as folder:
        yield Path(folder)


def step_from(first: int) -> re.Pattern[str]:
    """Places in a step with one digit from `first` on, or with two digits."""
    return re.compile(rf" step ([{first}-9]|\d\d),")


def disturbed(
    part: str, config: Path, run_dir: Path, scratch: Path, kills: list[tuple[str, int, int]], *more: str
) -> None:
    """Run with `kills` of (phase, after step, rank); what it said, and that nothing of it is left."""
    own = [f"run_dir={run_dir}", "parallel.max_restarts=9", *more]
    run = Run(command(part, config, own), run_dir / part, scratch)
    try:
        done = [kill_at(run, phase, step, rank, delay=0.005, timeout=200) for phase, step, rank in kills]
        assert run.end(timeout=200) == 0, (run_dir / f"{part}.out").read_text()
        assert run.processes() == [] and list(scratch.iterdir()) == []
    finally:
        run.close()
    assert all(done)
    said = [line for line in (run_dir / f"{part}.out").read_text().splitlines() if line.startswith("error: ")]
    assert len(said) == len(kills)
    for line, kill in zip(said, done, strict=True):
        assert line.startswith(f"error: {kill.target}: died by SIGKILL in {part} step "), said


def test_sft_stopped_by_a_scheduler_then_killed_in_an_update_and_in_a_save(
    warm: Project, tmp_path: Path, scratch: Path
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    run = Run(command("sft", warm.config, [f"run_dir={run_dir}", "checkpoint.every=0"]), run_dir / "sft", scratch)
    try:
        assert wait_until(run, step_from(5), rank=1, timeout=200)
        run.process.send_signal(signal.SIGUSR1)
        assert run.end(timeout=60) == 128 + signal.SIGUSR1
        assert run.processes() == [] and list(scratch.iterdir()) == []
    finally:
        run.close()
    saved = [path.name for path in (run_dir / "sft/checkpoints").iterdir()]
    assert len(saved) == 1 and 5 <= int(saved[0].removeprefix("step_")) < 120
    after = int(saved[0].removeprefix("step_"))
    kills = [("update", after + 3, 1), ("checkpoint", after + 5, 0)]
    disturbed("sft", warm.config, run_dir, scratch, kills, "checkpoint.every=10", "resume=auto")
    assert differences(run_dir / "sft", warm.run / "sft") == []


@pytest.mark.slow
def test_rl_killed_in_an_update(trained: Project, tmp_path: Path, scratch: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(trained.run / "sft", run_dir / "sft")
    disturbed("rl", trained.config, run_dir, scratch, [("update", 4, 1)], "checkpoint.every=2")
    assert differences(run_dir / "rl", trained.run / "rl") == []


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["start", "generate", "gather", "sync", "checkpoint"])
def test_rl_killed_in_any_phase(trained: Project, tmp_path: Path, scratch: Path, phase: str) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(trained.run / "sft", run_dir / "sft")
    disturbed("rl", trained.config, run_dir, scratch, [(phase, 3, 0)], "checkpoint.every=2")
    assert differences(run_dir / "rl", trained.run / "rl") == []


def test_ranks_do_not_outlive_a_torchrun_that_is_killed(tmp_path: Path, scratch: Path) -> None:
    """Otherwise they would hold the device for hours, waiting for each other."""
    program = tmp_path / "rank.py"
    program.write_text(
        "import os, pathlib, sys, time\nfrom megarl import launcher\nlauncher.end_with_torchrun()\n"
        "pathlib.Path(sys.argv[1], f'ready-{os.getpid()}').touch()\ntime.sleep(100)\n"
    )
    runner = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = Run([*runner, str(program), str(tmp_path)], tmp_path / "sft", scratch)
    try:
        ranks = until(lambda: [int(path.name.removeprefix("ready-")) for path in tmp_path.glob("ready-*")], 2)
        run.process.kill()
        run.process.wait()
        until(lambda: [rank for rank in ranks if is_running(rank)], 0)
    finally:
        run.close()


def test_ranks_that_torchrun_starts_again_meet_each_other(tmp_path: Path) -> None:
    """Not the ranks before them, of which torchrun's store still knows the addresses."""
    runner = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    words = [*runner, "--monitor-interval", "0.1", "-m", "tests.faults.restarted_program", str(tmp_path)]
    with subprocess.Popen(words, cwd=ROOT, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}) as job:
        try:
            assert job.wait(timeout=120) == 0
        finally:
            job.terminate()
    assert [(tmp_path / f"rank{rank}").read_text() for rank in range(2)] == ["[(1, 0), (1, 1)]"] * 2


def until(found: Callable[[], list[int]], count: int) -> list[int]:
    deadline = time.monotonic() + 100
    while len(now := found()) != count:
        assert time.monotonic() < deadline, now
        time.sleep(0.05)
    return now
