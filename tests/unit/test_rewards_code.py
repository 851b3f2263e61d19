"""The code reward: programs that solve the tests, and programs that would rather do something else."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest

from megarl.config.schema import Reward
from megarl.errors import BadInput
from megarl.rewards import RewardRunner, required_field
from megarl.types import Prompt

SUMS = [{"input": "1 2\n", "output": "3\n"}, {"input": "5 -7", "output": "-2"}]
GOOD = "print(sum(map(int, input().split())))"


@pytest.fixture(scope="module")
def runner():
    params = {"seconds": 2.0, "memory_gib": 0.2}
    named = {"partial": Reward(type="code", params={**params, "partial": True})}
    named["patient"] = Reward(type="code", params={**params, "seconds": 60.0})
    reward = Reward(type="code", params=params, named=named, max_failed_fraction=1.0)
    with RewardRunner(reward) as runner:
        yield runner


def scores(runner: RewardRunner, *programs: str, tests: object = SUMS, reward: str | None = None) -> list[float]:
    prompt = Prompt("p", (1,), None, reward, metadata={"tests": tests})
    results = runner.score([(prompt, program) for program in programs])
    assert not any(result.failed for result in results), results
    return [result.score for result in results]


def test_programs_are_scored_by_what_they_print(runner: RewardRunner) -> None:
    wrong = ("print(3)", "import sys; print(3); sys.exit(1)", "no code")
    assert scores(runner, GOOD, f"Thus:\n```python\n{GOOD}\n```\nDone.", *wrong) == [1, 1, 0, 0, 0]
    assert scores(runner, GOOD, "print(3)", "print(4)", reward="partial") == [1, 0.5, 0]
    assert required_field(runner.reward) == ("tests",)


def test_a_schedulers_warning_to_every_process_changes_no_score(runner: RewardRunner) -> None:
    """SLURM sends its signals to all processes of a job: a program that one ends runs again."""
    own = os.getpid()

    def warn() -> None:
        for number in (signal.SIGUSR1, signal.SIGTERM):
            time.sleep(0.4)
            for child in psutil.Process(own).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    child.send_signal(number)

    slow = f"import time; time.sleep(0.7)\n{GOOD}"
    thread = threading.Thread(target=warn)
    thread.start()
    try:
        assert scores(runner, slow, slow, reward="patient") == [1, 1]
    finally:
        thread.join()


@pytest.mark.parametrize(("who", "expected"), [("os.getpid(), child", (0, b"3")), ("child", (143, b""))])
def test_a_program_that_a_warning_ends_runs_again_and_one_that_somebody_else_ends_does_not(
    who: str, expected: tuple[int, bytes]
) -> None:
    """Where there are no namespaces; in one a program hears no such signal."""
    program = textwrap.dedent(f"""
        import os, signal, threading, time
        from pathlib import Path
        from megarl.rewards import sandbox

        def warn():
            time.sleep(0.4)
            for child in map(int, Path(f"/proc/self/task/{{os.getpid()}}/children").read_text().split()):
                for process in ({who},):
                    os.kill(process, signal.SIGTERM)

        sandbox.new_namespaces = lambda network: ["processes"]
        sandbox.count_warnings()
        threading.Thread(target=warn).start()
        source = "import time; time.sleep(0.8); print(3, end='')"
        outcome = sandbox.run_program(source, b"", sandbox.Bounds(10.0, 1 << 30))
        print(repr((outcome.code, outcome.output)))
    """)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == (f"{expected!r}\n", "")


def test_tests_of_another_form_are_a_failure_of_that_row(runner: RewardRunner) -> None:
    for tests in ([], "x", [{"input": 1, "output": "2"}]):
        result = runner.score([(Prompt("p", (1,), None, metadata={"tests": tests}), GOOD)])[0]
        assert result.failed and "tests is not a list" in result.reason


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time; time.sleep(100)",
        "x = []\nwhile True: x.append(bytearray(10**7))",
        "import os\nwhile True: os.fork()",
        "while True: print('x' * 10**6)",
        "import os; os.kill(os.getppid(), 9)\nos.kill(-1, 9)",
        "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)",
        "import os\nif os.fork() == 0:\n    os.setsid()\n    os.fork()\n    while True: pass\nprint(3)",
        "open('big', 'wb').write(b'x' * 10**9); print(3)",
        "import ctypes; ctypes.string_at(0)",
    ],
)
def test_a_program_that_does_harm_fails_its_test_alone(runner: RewardRunner, program: str) -> None:
    one = SUMS[:1]
    assert scores(runner, GOOD, program, GOOD, tests=one) in ([1, 0, 1], [1, 1, 1] if "print(3)" in program else None)


def test_a_program_reaches_nothing_outside(runner: RewardRunner, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "value of a secret")
    before = {name for name in os.listdir("/tmp") if name.startswith("megarl-reward-")}
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        program = f"""
import os, socket, sys
found = []
try:
    socket.create_connection(("127.0.0.1", {server.getsockname()[1]}), timeout=0.3); found.append("network")
except OSError: pass
for place in ({str(tmp_path / "written")!r}, "/tmp/written-by-a-program", "/dev/shm/written-by-a-program"):
    try:
        open(place, "w"); found.append(place)
    except OSError: pass
open("own", "w").write("x")
found += [name for name in os.environ if "KEY" in name or "MEGARL" in name]
found += [pid for pid in os.listdir("/proc") if pid.isdigit() and int(pid) > 1 and int(pid) != os.getpid()]
try:
    found.append(open("/proc/1/mem", "rb") and os.getpid() != 1 and "memory of others" or "")
except OSError: pass
print(*filter(None, found))
"""
        with RewardRunner(Reward(type="code")) as fresh:
            expected = "" if not fresh.missing else "network"
            row = Prompt("p", (1,), None, metadata={"tests": [{"input": "", "output": expected}]})
            result = fresh.score([(row, program)])[0]
    assert (result.score, result.failed) == (1.0, False), result
    assert not list(tmp_path.iterdir())
    assert {name for name in os.listdir("/tmp") if name.startswith("megarl-reward-")} <= before


def test_params_are_checked() -> None:
    with pytest.raises(BadInput, match="does not fit code"):
        RewardRunner(Reward(type="code", params={"second": 1}))
