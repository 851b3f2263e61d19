"""A megarl job on the test's cluster: submitted by `megarl launch slurm`, watched, disturbed and brought back."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.cluster.slurm import Cluster

ROOT = Path(__file__).resolve().parents[2]
RANK_ENV = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def launch(cluster: Cluster, *words: object, **env: str):
    """`megarl launch slurm WORDS`"""
    cluster.env |= RANK_ENV | {"MASTER_PORT": str(_quiet_port())} | env
    return cluster.run(sys.executable, "-m", "megarl", "launch", "slurm", *words)


def _quiet_port() -> int:
    return 10_000 + time.time_ns() // 1000 % 10_000


class Job:
    """A job that was submitted."""

    def __init__(self, cluster: Cluster, *words: object, **env: str) -> None:
        self.cluster = cluster
        done = launch(cluster, *words, **env)
        assert done.returncode == 0, done.stderr
        self.number = re.match(r"job (\d+): ", done.stdout)[1]
        self.output = Path(re.search(r"output (\S+)", done.stdout)[1])

    @classmethod
    def of_array(cls, job: Job, task: int) -> Job:
        """A task of an array job."""
        one = cls.__new__(cls)
        one.cluster, one.number = job.cluster, f"{job.number}_{task}"
        one.output = job.output.with_name(f"{one.number}.out")
        return one

    @property
    def state(self) -> str:
        return self.cluster.job(self.number)["JobState"]

    def states(self) -> list[str]:
        """Of every task of an array."""
        lines = self.cluster.run("scontrol", "show", "job", "-o", self.number).stdout.splitlines()
        return [re.search(r"JobState=(\w+)", line)[1] for line in lines]

    def said(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def until(self, happened: Callable[[], bool], timeout: float = 120) -> None:
        deadline = time.monotonic() + timeout
        while not happened():
            assert time.monotonic() < deadline, f"nothing happened in {timeout} s: {self.state}\n{self.said()}"
            time.sleep(0.05)

    def until_step(self, rows: Path, step: int, timeout: float = 120) -> None:
        """Until `metrics.jsonl` has the row of a step that is at least this."""

        def reached() -> bool:
            assert self.state not in OVER, self.said()
            lines = rows.read_text().splitlines() if rows.exists() else []
            with suppress(ValueError, IndexError):
                return json.loads(lines[-1])["step"] >= step
            return False

        self.until(reached, timeout)

    def until_requeued(self, restarts: int) -> None:
        """Until it waits for its next start; SLURM would have it wait for two minutes: it starts now."""

        def waits() -> bool:
            job = self.cluster.job(self.number)
            assert job["JobState"] not in OVER, self.said()
            return job["JobState"] == "PENDING" and job["Restarts"] == str(restarts) and job["Reason"] == "BeginTime"

        self.until(waits)
        time.sleep(1.5)  # a start within the same second as the end of the last one is refused
        done = self.cluster.run("scontrol", "update", f"JobId={self.number}", "StartTime=now")
        assert done.returncode == 0, done.stderr

    def end(self, timeout: float = 200) -> str:
        """The state it has ended in, with nothing of it left."""
        self.until(lambda: self.state in OVER, timeout)
        self.until(lambda: self.processes() == [], 30)
        return self.state

    def processes(self) -> list[int]:
        """What it has started and what is still there."""
        mark = f"SLURM_JOB_ID={self.number}".encode()
        return [process for process in self.cluster.processes() if mark in environ(process)]

    def rank(self, number: int) -> int:
        """The process of a rank."""
        for process in self.processes():
            if f"RANK={number}".encode() in environ(process) and b"megarl" in words(process):
                return process
        raise AssertionError(f"no rank {number}: {self.said()}")

    def kill_step_on(self, node: str) -> None:
        """SIGKILL for every rank of the job on a node, and for what they have started."""
        mark = f"MEGARL_NODE={node}".encode()
        for process in self.processes():
            if mark in environ(process):
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)


def environ(process: int) -> list[bytes]:
    with suppress(OSError):
        return Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    return []


def words(process: int) -> list[bytes]:
    with suppress(OSError):
        return Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    return []

