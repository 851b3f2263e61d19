"""Verifiers that misbehave in every way we could think of, with namespaces and where nobody may make any."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megarl.config.schema import Reward
from megarl.rewards import RewardRunner
from megarl.types import Prompt
from tests.unit import reward_program

ROOT = Path(__file__).resolve().parents[2]
VERIFIER = """
import ctypes, math, os, signal, subprocess, sys, threading, time

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)", "left-over-of-a-verifier"]

def score(prompt, response, answer, **metadata):
    if response == "good":
        return 1
    if response == "hang":
        while True: pass
    if response == "hang in C":
        ctypes.CDLL(None).pause()
        time.sleep(1000)
    if response == "burn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        end = time.process_time() + 1000
        while time.process_time() < end: sum(range(10**5))
    if response == "exit":
        os._exit(7)
    if response == "sys.exit":
        sys.exit(3)
    if response == "segfault":
        ctypes.string_at(8)
    if response == "kill itself":
        os.kill(os.getpid(), signal.SIGKILL)
    if response == "stop itself":
        os.kill(os.getpid(), signal.SIGSTOP)
    if response == "children":
        for _ in range(3): subprocess.Popen(SLEEP)
        return 0.5
    if response == "daemon":
        if not os.fork():
            os.setsid()
            if not os.fork():
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                os.execv(SLEEP[0], SLEEP)
            os._exit(0)
        os.wait()
        return 0.5
    if response == "daemon and exit":
        if not os.fork():
            os.setsid()
            if not os.fork(): os.execv(SLEEP[0], SLEEP)
            os._exit(0)
        time.sleep(0.1)
        os._exit(5)
    if response == "fork":
        os.fork()
        return 0.5
    if response == "fork bomb":
        while True:
            try: os.fork()
            except OSError: pass
    if response == "threads":
        for _ in range(100): threading.Thread(target=time.sleep, args=(100,), daemon=True).start()
        time.sleep(100)
    if response == "print":
        line = "x" * 1_000_000
        for _ in range(2000): print(line)
        return 0.5
    if response == "memory":
        kept = []
        while True: kept.append(bytearray(10_000_000))
    if response == "memory of children":
        for _ in range(8):
            if not os.fork():
                kept = bytearray(b"x") * 150_000_000
                time.sleep(100)
        time.sleep(100)
    if response == "close":
        os.closerange(0, 200)
        return 0.5
    if response == "babble":
        for fd in range(3, 20):
            try: os.write(fd, b"\\xff" * 4096)
            except OSError: pass
        return 0.5
    if response == "forge":
        for fd in range(3, 20):
            try: os.write(fd, (11).to_bytes(4, "little") + b'[9, 1, "",0]')
            except OSError: pass
        time.sleep(100)
    if response == "raise":
        raise Strange
    return {"nan": math.nan, "infinity": -math.inf, "huge": 1e300, "text": "0.5", "long text": "9" * 10**7,
            "none": None, "list": [1.0], "object": Strange(), "huge int": 10**400}[response]

class Strange(BaseException):
    def __str__(self): raise RuntimeError("no text")
    __repr__ = __float__ = __str__

score.prepare = lambda rows: None
"""

# What a response does -> what its result says; None: it gets the score the verifier returns.
CASES = {
    "hang": "timed out after 1.5 s|processor time",
    "hang in C": "timed out after 1.5 s",
    "burn": "timed out after 1.5 s|processor time",
    "exit": "exit code 7",
    "sys.exit": "SystemExit: 3",
    "segfault": "SIGSEGV",
    "kill itself": "SIGKILL",
    "stop itself": "timed out after 1.5 s",
    "children": None,
    "daemon": None,
    "daemon and exit": "exit code 5",
    "fork": None,
    "fork bomb": "started more than 40 processes|timed out after 1.5 s",
    "threads": "started more than 40 processes and threads|left more than 20 threads running",
    "print": "none or timed out after 1.5 s",
    "memory": "MemoryError|more than 0.3 GiB",
    "memory of children": "more than 0.3 GiB of memory|timed out after 1.5 s",
    "close": "ended|no answer|timed out",
    "babble": "what is no answer",
    "forge": "what is no answer",
    "raise": "Strange",
    "nan": "nan",
    "infinity": "-inf",
    "huge": "not within",
    "text": "'0.5', not a number",
    "long text": "not a number",
    "none": "NoneType None, not a number",
    "list": "list",
    "object": "Strange|no text",
    "huge int": "not a number",
}
# Where only signals hold the tree together. Not the fork bomb: root without a cgroup is bound by nothing but the warden.
FEW = [
    "hang",
    "kill itself",
    "stop itself",
    "children",
    "daemon",
    "daemon and exit",
    "fork",
    "memory of children",
    "nan",
]
NO_NAMESPACES = ["unshare", "-Ur", "sh", "-c",
                 'echo 0 > /proc/sys/user/max_user_namespaces; exec setpriv --bounding-set=-all "$@"', "sh"]  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What `reward_program` saw, where a worker may have namespaces (if this system lets it) and where it may not."""
    folder = tmp_path_factory.mktemp("verifier")
    (folder / "bad_verifier.py").write_text(VERIFIER)
    found = {"as here": run([], folder, list(CASES))}
    if not found["as here"]["missing"]:
        found["without namespaces"] = run(NO_NAMESPACES, folder, FEW)
        assert found["without namespaces"]["missing"] == ["processes of its own", "being cut off from the network"]
    return found


def run(prefix: list[str], folder: Path, cases: list[str]) -> dict:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)])}
    command = [*prefix, sys.executable, "-m", "tests.unit.reward_program", *cases]
    with open(folder / "log", "wb") as log:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, env=env, cwd=folder, timeout=240)
    text = (folder / "log").read_bytes()
    assert done.returncode == 0, text[-2000:]
    assert len(text) < 1 << 20, "what verifiers print must not fill the disk"
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES)
def test_the_others_keep_their_scores_and_nothing_is_left(outcomes: dict[str, dict], case: str) -> None:
    for where, outcome in outcomes.items():
        if case not in outcome["cases"]:
            continue
        seen = outcome["cases"][case]
        assert seen["good"] == [["1.0", False, ""]] * 12, where
        assert seen["left"] == [], where
        score, failed, reason = seen["bad"]
        wanted = CASES[case]
        if wanted is None or (wanted.startswith("none or ") and not failed):
            assert (score, failed, reason) == ("0.5", False, ""), where
        else:
            assert (score, failed) == ("nan" if case == "nan" else "-1.0", True), where
            assert any(part in reason for part in wanted.removeprefix("none or ").split("|")), (where, reason)
            assert len(reason) <= 500, where
        assert outcome["workers"] == 1 and outcome["at the end"] == 0, where


def test_too_many_processes_and_too_much_memory_end_a_worker_long_before_its_time(tmp_path, monkeypatch) -> None:
    (tmp_path / "greedy_verifier.py").write_text(VERIFIER)
    monkeypatch.syspath_prepend(str(tmp_path))
    limits = {"memory_gib": 0.3, "max_processes": 40, "max_failed_fraction": 1.0, "timeout_seconds": 60}
    with RewardRunner(Reward(type="greedy_verifier:score", **limits)) as runner:
        rows = [(Prompt("p", (1,), ""), text) for text in ("fork bomb", "good", "memory of children", "good")]
        said = [(result.score, result.reason) for result in runner.score(rows)]
    assert said == [
        (0.0, "started more than 40 processes and threads"),
        (1.0, ""),
        (0.0, "used more than 0.3 GiB of memory"),
        (1.0, ""),
    ]


def test_a_worker_has_no_network_and_no_tokens_unless_asked(tmp_path, monkeypatch) -> None:
    (tmp_path / "reaching_verifier.py").write_text(
        "import os, socket\n"
        "def score(prompt, response, answer, **metadata):\n"
        "    if response.isdigit():\n"
        "        socket.create_connection(('127.0.0.1', int(response)), timeout=1).close()\n"
        "        return 1\n"
        "    return response in os.environ\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("SOME_API_KEY", "value of a secret")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        rows = [(Prompt("p", (1,), ""), text) for text in (str(server.getsockname()[1]), "SOME_API_KEY", "HOME")]
        for network in (False, True):
            reward = Reward(type="reaching_verifier:score", network=network, max_failed_fraction=1.0)
            with RewardRunner(reward) as runner:
                cut_off = not network and not runner.missing
                assert [result.score for result in runner.score(rows)] == [not cut_off, network, True]
                assert network or runner.missing in ([], ["processes of its own", "being cut off from the network"])


def test_time_outs_of_the_program_are_those_of_the_cases() -> None:
    assert f"timed out after {reward_program.TIMEOUT:g} s" in CASES["hang in C"]
