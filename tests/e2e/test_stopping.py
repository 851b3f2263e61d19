"""However a run ends before its time: the exit code, one line, and nothing left running."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.e2e.program import Project


def test_a_rank_that_dies_ends_the_job(branch: Project) -> None:
    with branch.start("train", branch.config, "rl.steps=1000") as job:
        job.wait_for(lambda: len(branch.rows()) >= 2)
        os.kill(job.rank(1), signal.SIGKILL)
        code, _, errors = job.end(timeout=60)
    assert code == 1
    assert errors.startswith("error: rank 1: died by SIGKILL") and len(errors.splitlines()) == 1, errors
    assert str(branch.run / "rl/logs/rank1.log") in errors


@pytest.mark.slow  # tests/unit/test_launcher.py interrupts ranks that do not listen twice, without vLLM
def test_interrupting_twice_ends_at_once(branch: Project) -> None:
    with branch.start("train", branch.config, "log.grace_seconds=200") as job:
        job.wait_for_line("start vLLM")  # seconds in which nobody looks at a first Ctrl-C
        job.interrupt()
        time.sleep(0.5)
        assert job.process.poll() is None
        before = time.monotonic()
        job.interrupt()
        code, _, errors = job.end(timeout=60)
    assert time.monotonic() - before < 5
    assert code == 130 and len(errors.splitlines()) == 1, errors
