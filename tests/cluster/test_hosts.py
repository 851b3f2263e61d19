"""launch/torchrun.sh on two hosts: network namespaces of this machine, with a cable that is cut in the middle of a run."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tests.cluster import hosts
from tests.cluster.conftest import need
from tests.cluster.hosts import Hosts
from tests.cluster.jobs import RANK_ENV, environ
from tests.e2e.program import Project
from tests.faults.kills import differences


def launch(made: Hosts, tmp_path: Path, config: Path, name: str, *words: object) -> list[subprocess.Popen]:
    """`megarl launch torchrun` on every host; what host N said is in NAME.N"""
    command = [sys.executable, "-m", "megarl", "launch", "torchrun", config, f"run_dir={tmp_path}/run", *words]
    command += ["--run", "sft", "--nodes", made.count, "--ranks-per-node", 1, "--master", f"{made.address(0)}:29500"]
    env = {"MEGARL_IDLE_SECONDS": "2", **RANK_ENV}
    return [made.start(host, [*command, "--id", name], tmp_path / f"{name}.{host}", **env) for host in range(made.count)]


def wait_for(happened: Callable[[], bool], launched: list[subprocess.Popen], said: Callable[[], str], timeout: float = 120):
    deadline = time.monotonic() + timeout
    while not happened():
        assert time.monotonic() < deadline and all(one.poll() is None for one in launched), said()
        time.sleep(0.05)


def last_step(rows: Path) -> int:
    with suppress(OSError, ValueError, IndexError):
        return json.loads(rows.read_text().splitlines()[-1])["step"]
    return 0


def test_a_cut_cable_ends_the_run_with_the_lost_host_named_and_the_next_start_goes_on(
    two_hosts: Hosts, warm: Project, tmp_path: Path
) -> None:
    rows = tmp_path / "run/sft/metrics.jsonl"

    def said(name: str) -> str:
        return "".join(f"--- host {host}\n{(tmp_path / f'{name}.{host}').read_text()}" for host in range(2))

    common = ("checkpoint.every=10", "parallel.timeout_minutes=0.1")
    launched = launch(two_hosts, tmp_path, warm.config, "first", *common)
    wait_for(lambda: last_step(rows) >= 15, launched, lambda: said("first"))
    two_hosts.cut(1)
    codes = [one.wait(150) for one in launched]
    assert all(codes), said("first")
    for host, other in ((0, 1), (1, 0)):
        text = (tmp_path / f"first.{host}").read_text()
        line = f"error: node host{other} ({two_hosts.address(other)}, rank"
        assert line in text and f"is lost: it does not answer node host{host}" in text, said("first")
    assert re.search(r"error: rank \d: sft step \d+, [\w ]+: a collective lost a peer", said("first"))
    assert two_hosts.processes() == []
    two_hosts.mend(1)
    launched = launch(two_hosts, tmp_path, warm.config, "second", *common, "resume=auto", "--no-check")
    assert [one.wait(150) for one in launched] == [0, 0], said("second")
    assert re.search(r"sft: resumed after step \d0 ", said("second"))
    assert differences(tmp_path / "run/sft", warm.run / "sft") == []


@pytest.mark.slow
def test_a_killed_rank_brings_all_hosts_back_to_the_newest_checkpoint(
    two_hosts: Hosts, warm: Project, tmp_path: Path
) -> None:
    rows = tmp_path / "run/sft/metrics.jsonl"
    launched = launch(two_hosts, tmp_path, warm.config, "first", "checkpoint.every=10", "parallel.max_restarts=1", "--no-check")

    def said() -> str:
        return "".join((tmp_path / f"first.{host}").read_text() for host in range(2))

    wait_for(lambda: last_step(rows) >= 15, launched, said)
    for process in two_hosts.processes():
        if b"RANK=1" in environ(process):
            os.kill(process, signal.SIGKILL)
    assert [one.wait(200) for one in launched] == [0, 0], said()
    assert said().count("starting the ranks again (1 of 1)\n") == 2
    assert re.search(r"sft: resumed after step [1-9]0 ", said())
    assert differences(tmp_path / "run/sft", warm.run / "sft") == []


@pytest.mark.slow
def test_the_check_of_the_nodes_names_the_host_with_the_slow_cable(warm: Project, tmp_path: Path) -> None:
    need(hosts.missing())
    with Hosts(tmp_path, count=3) as made:
        slow = made.limit(1, "100mbit")
        if slow:
            pytest.skip(f"no cable can be made slow here: {slow}")
        launched = launch(made, tmp_path, warm.config, "first", "parallel.ep=1", "sft.batch_size=63")
        codes = [one.wait(200) for one in launched]
        said = "".join((tmp_path / f"first.{host}").read_text() for host in range(3))
        assert all(codes), said
        assert re.findall(r"error: node (\w+): to other nodes", said) == ["host1"], said
    assert made.processes() == [] and made.namespaces() == []
