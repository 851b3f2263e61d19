"""However a job ends, its exit code says how and nothing of it is left running: real processes, read from /proc."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megarl import launcher
from megarl.errors import BadInput

PROGRAM = Path(__file__).with_name("rank_program.py")
START = """
import sys, pathlib
from megarl.launcher import launch
program, behaviour, folder, grace, restarts = sys.argv[1:]
command = [sys.executable, program, behaviour, folder]
sys.exit(launch(command, 2, pathlib.Path(folder) / "logs", float(grace), max_restarts=int(restarts)))
"""


class Job:
    """A launcher with two ranks, in a process of its own."""

    def __init__(self, folder: Path, behaviour: str, grace: float = 20.0, restarts: int = 0):
        self.folder, self.scratch = folder, folder / "scratch"
        self.scratch.mkdir()
        command = [sys.executable, "-c", START, str(PROGRAM), behaviour, str(folder), str(grace), str(restarts)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=os.environ | {"TMPDIR": str(self.scratch)}, **pipes)

    def wait_until_ready(self, name: str = "ready") -> None:
        deadline = time.monotonic() + 60
        while not all((self.folder / f"{name}{rank}").exists() for rank in (0, 1)):
            assert self.process.poll() is None and time.monotonic() < deadline, self.process.communicate()
            time.sleep(0.02)

    def finish(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err

    def pids(self) -> list[int]:
        return [int(pid) for rank in (0, 1) for pid in (self.folder / f"pids{rank}").read_text().split()]

    def running(self) -> list[int]:
        return [pid for pid in self.pids() if is_running(pid)]

    def temporary(self) -> list[str]:
        return [str(path.relative_to(self.scratch)) for path in self.scratch.rglob("*")]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_success_shows_only_rank_0_s_display_and_leaves_no_helper(tmp_path: Path) -> None:
    job = Job(tmp_path, "succeed")
    assert job.finish() == (0, "display of rank 0\n", "")
    assert job.running() == []
    for rank in (0, 1):
        assert (tmp_path / f"logs/rank{rank}.log").read_text() == f"noise of rank {rank}\n"


def test_ctrl_c_lets_the_step_end(tmp_path: Path) -> None:
    job = Job(tmp_path, "boundary")
    job.wait_until_ready()
    started = time.monotonic()
    job.process.send_signal(signal.SIGINT)
    code, _, err = job.finish()
    assert code == 130 and len(err.splitlines()) == 1
    assert [(tmp_path / f"boundary{r}").read_text() for r in (0, 1)] == [str(int(signal.SIGINT))] * 2
    assert time.monotonic() - started < 10
    assert job.running() == []


def test_ctrl_c_ends_a_step_that_takes_longer_than_the_grace_time(tmp_path: Path) -> None:
    job = Job(tmp_path, "deaf", grace=0.8)
    job.wait_until_ready()
    started = time.monotonic()
    job.process.send_signal(signal.SIGINT)
    assert job.finish()[0] == 130
    assert 0.7 < time.monotonic() - started < 10
    assert job.running() == []


def test_ctrl_c_twice_ends_at_once(tmp_path: Path) -> None:
    job = Job(tmp_path, "deaf", grace=100)
    job.wait_until_ready()
    started = time.monotonic()
    job.process.send_signal(signal.SIGINT)
    assert "Ctrl-C again" in job.process.stderr.readline()
    job.process.send_signal(signal.SIGINT)
    assert job.finish()[0] == 130
    assert time.monotonic() - started < 10
    assert job.running() == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_schedulers_warning_is_like_ctrl_c_with_its_own_exit_code(tmp_path: Path, number: signal.Signals) -> None:
    job = Job(tmp_path, "boundary", restarts=3)
    job.wait_until_ready()
    job.process.send_signal(number)
    assert job.finish()[0] == 128 + number
    assert (tmp_path / "boundary1").read_text() == str(int(number))
    assert job.running() == [] and job.temporary() == []


@pytest.mark.parametrize(
    ("behaviour", "code", "line"),
    [
        ("raise", 1, "error: rank 1: ValueError: the second rank gives up (log: {logs}/rank1.log)"),
        ("report", 2, "error: prompts.jsonl:3: no answer"),
        ("crash", 1, "error: rank 1: died by SIGSEGV (log: {logs}/rank1.log)"),
    ],
)
def test_a_failing_rank_ends_the_job_with_one_line(tmp_path: Path, behaviour: str, code: int, line: str) -> None:
    job = Job(tmp_path, behaviour)
    got, out, err = job.finish()
    assert (got, out, err) == (code, "display of rank 0\n", line.format(logs=tmp_path / "logs") + "\n")
    assert job.running() == []


def test_a_failing_rank_ends_others_that_do_not_listen(tmp_path: Path) -> None:
    job = Job(tmp_path, "deaf", grace=0.5)
    job.wait_until_ready()
    assert sorted(name.partition("/")[2] for name in job.temporary()) == ["", "of-rank-0", "of-rank-1"]
    os.kill(job.pids()[3], signal.SIGKILL)
    code, _, err = job.finish()
    assert code == 1 and err.startswith("error: rank 1: died by SIGKILL (out of memory?)")
    assert job.running() == [] and job.temporary() == []


def test_ranks_are_started_again_until_they_end_well(tmp_path: Path) -> None:
    job = Job(tmp_path, "third time", restarts=5)
    code, out, err = job.finish()
    assert code == 0 and out == "display of rank 0\n" * 3
    assert [line.partition(" in ")[0] for line in err.splitlines()] == [
        "error: rank 1: died by SIGKILL",
        "starting the ranks again (1 of 5)",
        "error: rank 1: died by SIGKILL",
        "starting the ranks again (2 of 5)",
    ]
    assert " in rl step 1, update (out of memory?)" in err and " in rl step 2, update (out of memory?)" in err
    assert (tmp_path / "restarts0").read_text() == "2"
    assert job.running() == [] and job.temporary() == []


@pytest.mark.parametrize(("behaviour", "code", "starts"), [("raise", 1, 2), ("report", 2, 1)])
def test_restarts_are_counted_and_bad_input_is_not_tried_again(
    tmp_path: Path, behaviour: str, code: int, starts: int
) -> None:
    job = Job(tmp_path, behaviour, restarts=1)
    got, _, err = job.finish()
    assert got == code and err.count("error: ") == starts and err.count("starting the ranks again") == starts - 1


def test_nothing_survives_a_killed_launcher(tmp_path: Path) -> None:
    job = Job(tmp_path, "deaf")
    job.wait_until_ready()
    assert len(job.running()) == 6
    job.process.kill()
    job.process.wait()
    deadline = time.monotonic() + 20
    while (job.running() or job.temporary()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert job.running() == [] and job.temporary() == []


def test_a_rank_that_prints_nothing_and_fails_is_named(tmp_path: Path) -> None:
    code = f"""
import sys, pathlib
from megarl.launcher import launch
sys.exit(launch([sys.executable, "-c", "import sys; sys.exit(7)"], 1, pathlib.Path({str(tmp_path)!r}), 1))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 7
    assert done.stderr == f"error: rank 0: ended without a word (log: {tmp_path}/rank0.log)\n"


def test_ranks_are_told_their_world_on_the_loopback_interface(tmp_path: Path) -> None:
    names = [
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "GLOO_SOCKET_IFNAME",
        "NCCL_SOCKET_IFNAME",
    ]
    show = f"import os; print(*[os.environ[n] for n in {names}])"
    code = f"""
import sys, pathlib
from megarl.launcher import launch
sys.exit(launch([sys.executable, "-c", {show!r}], 3, pathlib.Path({str(tmp_path)!r}), 1))
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    said = [(tmp_path / f"rank{r}.log").read_text().split() for r in range(3)]
    assert said == [[str(r), str(r), "3", "3", "127.0.0.1", "lo", "lo"] for r in range(3)]


def test_a_free_port_is_none_that_the_kernel_hands_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds pass until a rank listens on it: another job's connection could have taken it."""
    monkeypatch.delenv("MASTER_PORT", raising=False)
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = {launcher.free_port() for _ in range(10)}
    assert len(ports) > 5 and max(ports) < first


def test_no_free_port_is_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        with pytest.raises(BadInput, match="unset it"):
            launcher.free_port()
    monkeypatch.setenv("MASTER_PORT", "many")
    with pytest.raises(BadInput, match="'many': not a port"):
        launcher.free_port()


def test_output_of_a_torchrun_rank_goes_to_its_log(tmp_path: Path) -> None:
    program = f"""
import os, pathlib, sys
from megarl import launcher
screen = launcher.redirect_rank_output(pathlib.Path({str(tmp_path)!r}) / "logs" / f"rank{{os.environ['RANK']}}.log")
print("noise", flush=True)
os.system("echo noise of a child")
print("noise", file=sys.stderr)
if screen: print("display", file=screen)
print("error line", file=launcher.error_stream(), flush=True)
"""
    for rank in ("0", "1"):
        env = os.environ | {"RANK": rank}
        done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
        assert done.stdout == ("display\n" if rank == "0" else "") and done.stderr == "error line\n"
        assert (tmp_path / f"logs/rank{rank}.log").read_text() == "noise\nnoise of a child\nnoise\n"


@pytest.mark.parametrize(("number", "code"), [("SIGTERM", 143), ("SIGUSR1", 138)])
def test_a_rank_that_waits_in_a_library_ends_with_the_grace_time(number: str, code: int) -> None:
    """Python runs no handler while its main thread is in C, so that only another thread can see to it."""
    program = f"""
import ctypes, signal, threading, time, os
from megarl.platform.signals import StopSignal
number = signal.{number}
stop = StopSignal.install({{number: 0.3}})
def told():
    time.sleep(0.3)
    assert stop.requested
    print("heard", flush=True)
threading.Timer(0.1, os.kill, (os.getpid(), number)).start()
threading.Thread(target=told).start()
libc = ctypes.CDLL(None)
for _ in range(600):
    libc.usleep(100_000)  # goes on after a signal, as a collective does
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, "heard\n"), done.stderr


def test_stop_signal_counts_and_ends_on_the_second() -> None:
    program = """
import os, signal
from megarl.platform.signals import StopSignal
stop = StopSignal.install()
assert stop is StopSignal.install() and not stop.requested and stop.exit_code == 0
os.kill(os.getpid(), signal.SIGTERM)
assert stop.requested and stop.exit_code == 143
stop.received = None
os.kill(os.getpid(), signal.SIGINT)
assert stop.exit_code == 130
print("first", flush=True)
os.kill(os.getpid(), signal.SIGINT)
print("not reached", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "first\n"), done.stderr
