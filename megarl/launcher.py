"""Local ranks: start them, keep their noise out of the terminal, and leave nothing running.

The launcher is a small process without torch. Every rank is a session of its own, so that Ctrl-C reaches only the
launcher, which forwards it. Ranks die with the launcher (PR_SET_PDEATHSIG), and a guard process, which waits for the
end of a pipe that the launcher holds, then kills what the ranks had started: their process groups, and whatever has
the job's mark in its environment. Temporary files of the ranks are in a folder of the job's own, which goes with it.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import random
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from megarl.errors import BadInput

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
TERMINAL_FD, REPORT_FD, JOB = "MEGARL_TERMINAL_FD", "MEGARL_REPORT_FD", "MEGARL_JOB"
ERROR_FD = "MEGARL_ERROR_FD"
RESTARTS = "TORCHELASTIC_RESTART_COUNT"  # torchrun's own name

GUARD = """
import glob, os, shutil, signal, sys
scratch, job, *groups = sys.stdin.read().split()
if "done" in groups:
    sys.exit()
for group in groups:
    try:
        os.killpg(int(group), signal.SIGKILL)
    except ProcessLookupError:
        pass
for environ in glob.glob("/proc/[0-9]*/environ"):
    try:
        with open(environ, "rb") as f:
            if job.encode() in f.read().split(b"\\0"):
                os.kill(int(environ.split("/")[2]), signal.SIGKILL)
    except OSError:
        pass
shutil.rmtree(bytes.fromhex(scratch).decode(), ignore_errors=True)
"""

_libc = ctypes.CDLL(None, use_errno=True)


def is_rank() -> bool:
    """Whether this process is a rank (of ours or of torchrun) rather than the command a user typed."""
    return "RANK" in os.environ


def launched_locally() -> bool:
    """Whether this rank was started by `launch`, which has then prepared the run folder and redirected its output."""
    return REPORT_FD in os.environ


def restarts() -> int:
    """How often the ranks of this job have been started again after a fault, by `launch` or torchrun."""
    return int(os.environ.get(RESTARTS, "0"))


def launch(
    command: Sequence[str],
    nproc: int,
    log_dir: Path,
    grace_seconds: float,
    env: Mapping[str, str] = {},
    warned_grace_seconds: float | None = None,
    max_restarts: int = 0,
) -> int:
    """Run `command` as `nproc` local ranks and return the job's exit code.

    Output of rank N goes to `log_dir/rank{N}.log`; rank 0 also gets the number of a descriptor of this process's stdout
    in MEGARL_TERMINAL_FD. `env` is added to every rank's environment.

    0: all ranks ended well. 130 (143, 129): stopped by Ctrl-C (SIGTERM, SIGHUP): forwarded to the ranks, which have
    `grace_seconds` to end by themselves, `warned_grace_seconds` for every signal but SIGINT; a second signal ends them at
    once. Otherwise the exit code of the rank that failed first, with one line on stderr that names it, its step and
    phase, its error and its log; the others get SIGTERM and `grace_seconds`. Then all ranks are started again, at most
    `max_restarts` times, unless the input was bad. Whatever happens, no process and no temporary file of the job is left
    when this returns.
    Raises `BadInput` when there is no free port or the logs cannot be written.
    """
    warned = grace_seconds if warned_grace_seconds is None else warned_grace_seconds
    for restart in range(max_restarts + 1):
        job = _Job(command, nproc, log_dir, grace_seconds, warned, {**env, RESTARTS: str(restart)})
        code = job.run()
        if code in (0, 2) or job.stopped_by is not None or restart == max_restarts:
            break
        print(f"starting the ranks again ({restart + 1} of {max_restarts})", file=sys.stderr, flush=True)
    return code


def free_port() -> int:
    """A free TCP port on the loopback interface, or MASTER_PORT if that is set. Raises `BadInput` if there is none.

    Seconds pass until a rank listens on it, in which the kernel gives ports of its own range to whoever asks for any:
    the port is from below that range.
    """
    wanted = os.environ.get("MASTER_PORT")
    if wanted is not None and (not wanted.isdigit() or int(wanted) > 65535):
        raise BadInput(f"MASTER_PORT = {wanted!r}: not a port; unset it to have a free one chosen")
    for port in _quiet_ports() if wanted is None else [int(wanted)]:
        try:
            with socket.socket() as s:
                s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                s.bind(("127.0.0.1", port))
                return s.getsockname()[1]
        except OSError as e:
            problem = e.strerror
    if wanted is None:
        raise BadInput(f"no free TCP port on 127.0.0.1 ({problem}); end other jobs and try again")
    raise BadInput(f"MASTER_PORT = {wanted}: {problem}; unset it to have a free one chosen")


def _quiet_ports() -> list[int]:
    """Some ports below those that the kernel hands out, then 0: any."""
    first = 32768
    with suppress(OSError, ValueError, IndexError):
        first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    below = range(10_000, first)
    return [*random.SystemRandom().sample(below, min(20, len(below))), 0]


def redirect_rank_output(log_path: Path) -> TextIO | None:
    """Send this rank's stdout and stderr, down to the file descriptors, to `log_path`.

    Returns the stream that still reaches the terminal on rank 0, None on the others. A rank that `launch` started is
    redirected already. Call it before the libraries that talk are imported.
    """
    if not launched_locally() and TERMINAL_FD not in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os.environ[TERMINAL_FD] = str(os.dup(1)) if os.environ["RANK"] == "0" else ""
        os.environ[ERROR_FD] = str(os.dup(2))
        log_path.parent.mkdir(parents=True, exist_ok=True)
        log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
    return terminal()


def terminal() -> TextIO | None:
    """A stream to the terminal (or whatever the command's stdout is); None on ranks that show nothing.

    Outside a rank it is stdout. In a rank, fd 1 is the log and the terminal's descriptor is inherited.
    """
    if not is_rank():
        return sys.stdout
    number = os.environ.get(TERMINAL_FD)
    if not number:
        return None if number == "" or launched_locally() else sys.stdout
    return os.fdopen(int(number), "w", buffering=1, encoding="utf-8", errors="replace", closefd=False)


def error_stream() -> TextIO:
    """Where a one-line error goes: stderr, also in a rank of torchrun whose fd 2 has become the log."""
    number = os.environ.get(ERROR_FD)
    return os.fdopen(int(number), "w", encoding="utf-8", errors="replace", closefd=False) if number else sys.stderr


def report_failure(error: str, code: int) -> None:
    """Tell the launcher, if there is one, why this rank is about to exit with `code`: one line."""
    if launched_locally():
        line = json.dumps({"rank": int(os.environ["RANK"]), "code": code, "error": error[:2000]}) + "\n"
        with suppress(OSError):
            os.write(int(os.environ[REPORT_FD]), line.encode())


class Place:
    """Where in its work a rank is, as `rl step 7, update`: kept in a file that outlives the rank, however that ends.

    A change is a copy of `SIZE` bytes into mapped memory.
    """

    SIZE = 128

    def __init__(self, log_dir: Path, rank: int) -> None:
        with open(self.path(log_dir, rank), "wb+") as file:
            file.truncate(self.SIZE)
            self._memory = mmap.mmap(file.fileno(), self.SIZE)

    @staticmethod
    def path(log_dir: Path, rank: int) -> Path:
        return log_dir / f"rank{rank}.place"

    @classmethod
    def read(cls, log_dir: Path, rank: int) -> str:
        """Where rank `rank` is, or was last; empty when it never said."""
        with suppress(OSError):
            return cls.path(log_dir, rank).read_bytes().rstrip(b"\0").decode(errors="replace")
        return ""

    def write(self, where: str) -> None:
        self._memory[:] = where.encode()[: self.SIZE].ljust(self.SIZE, b"\0")


@dataclass
class _Rank:
    number: int
    process: subprocess.Popen
    log_path: Path
    pidfd: int
    code: int | None = None


@dataclass
class _Job:
    command: Sequence[str]
    nproc: int
    log_dir: Path
    grace_seconds: float
    warned_grace_seconds: float
    env: Mapping[str, str]
    ranks: list[_Rank] = field(default_factory=list)
    stopped_by: int | None = None  # the first signal that reached the launcher
    failed: list[_Rank] = field(default_factory=list)  # in the order seen, before any signal was sent
    deadline: float | None = None  # when the remaining ranks are killed
    received: list[int] = field(default_factory=list)

    def run(self) -> int:
        port = free_port()
        old = {number: signal.signal(number, lambda n, _: self.received.append(n)) for number in STOP_SIGNALS}
        wake_in, wake_out = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        old_wakeup = signal.set_wakeup_fd(wake_out, warn_on_full_buffer=False)
        self.reports, self.report_end = os.pipe2(os.O_NONBLOCK)
        _libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
        self.guard = subprocess.Popen([sys.executable, "-I", "-S", "-c", GUARD], stdin=subprocess.PIPE,
                                      start_new_session=True, text=True)  # fmt: skip
        self.mark = f"{JOB}={uuid.uuid4().hex}"
        self.scratch = tempfile.mkdtemp(prefix="megarl-")
        self.guard.stdin.write(f"{self.scratch.encode().hex()} {self.mark} ")
        self.guard.stdin.flush()
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(wake_in, selectors.EVENT_READ)
                self._start(port, selector)
                self._wait(wake_in, selector)
        finally:
            self._clean_up()
            signal.set_wakeup_fd(old_wakeup)
            for number, handler in old.items():
                signal.signal(number, handler)
            for fd in (wake_in, wake_out, *(r.pidfd for r in self.ranks)):
                os.close(fd)
        return self._verdict()

    def _start(self, port: int, selector: selectors.BaseSelector) -> None:
        try:
            self.log_dir.mkdir(parents=True, exist_ok=True)
            logs = [open(self.log_dir / f"rank{n}.log", "ab") for n in range(self.nproc)]  # noqa: SIM115
            for number in range(self.nproc):
                Place.path(self.log_dir, number).unlink(missing_ok=True)
        except OSError as e:
            raise BadInput(f"{self.log_dir}: cannot be written ({e.strerror}); set another run_dir") from None
        parent = os.getpid()
        screen = os.dup(1)
        for number, log in enumerate(logs):
            process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                env=self._environment(number, port, screen), preexec_fn=lambda: _die_with(parent),
                pass_fds=(self.report_end, *([screen] if number == 0 else [])),
            )  # fmt: skip
            self.guard.stdin.write(f"{process.pid} ")
            self.guard.stdin.flush()
            rank = _Rank(number, process, Path(log.name), os.pidfd_open(process.pid))
            self.ranks.append(rank)
            selector.register(rank.pidfd, selectors.EVENT_READ, rank)
            log.close()
        os.close(screen)

    def _environment(self, number: int, port: int, screen: int) -> dict[str, str]:
        threads = max(1, len(os.sched_getaffinity(0)) // self.nproc)
        env = {"OMP_NUM_THREADS": str(threads), **os.environ, **self.env}
        if os.isatty(screen):  # a display measures fd 1, which is the log in a rank
            size = os.get_terminal_size(screen)
            env = {"COLUMNS": str(size.columns), "LINES": str(size.lines), **env}
        return env | {
            "RANK": str(number),
            "LOCAL_RANK": str(number),
            "WORLD_SIZE": str(self.nproc),
            "LOCAL_WORLD_SIZE": str(self.nproc),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "lo",  # whatever the host name or a VPN says
            "NCCL_SOCKET_IFNAME": "lo",
            "PYTHONUNBUFFERED": "1",
            "TMPDIR": self.scratch,
            "TORCHINDUCTOR_CACHE_DIR": env.get("TORCHINDUCTOR_CACHE_DIR", _compile_cache()),
            JOB: self.mark.partition("=")[2],
            REPORT_FD: str(self.report_end),
            TERMINAL_FD: str(screen) if number == 0 else "",
        }

    def _wait(self, wake_in: int, selector: selectors.BaseSelector) -> None:
        while any(r.code is None for r in self.ranks):
            timeout = None if self.deadline is None else max(0.0, self.deadline - time.monotonic())
            ready = [key.data for key, _ in selector.select(timeout) if key.data is not None]
            with suppress(BlockingIOError):
                os.read(wake_in, 64)
            for rank in ready:
                selector.unregister(rank.pidfd)
                rank.code = rank.process.wait()
                if rank.code and self.deadline is None:
                    self.failed.append(rank)
            received, self.received = self.received, []
            for number in received:
                self._on_signal(number)
            if self.failed and self.deadline is None:
                self._ask_to_stop(signal.SIGTERM, self.grace_seconds)
            if self.deadline is not None and time.monotonic() >= self.deadline:
                self._kill_all()

    def _on_signal(self, number: int) -> None:
        if self.stopped_by is not None:
            self.deadline = time.monotonic()
            return
        self.stopped_by = number
        if number == signal.SIGINT:
            print(f"stopping at the end of this step, or in {self.grace_seconds:g} s; Ctrl-C again: at once",
                  file=sys.stderr, flush=True)  # fmt: skip
        if self.deadline is None:
            grace = self.grace_seconds if number == signal.SIGINT else self.warned_grace_seconds
            self._ask_to_stop(signal.SIGTERM if number == signal.SIGHUP else signal.Signals(number), grace)

    def _ask_to_stop(self, number: signal.Signals, grace: float) -> None:
        self.deadline = time.monotonic() + grace
        for rank in self.ranks:
            if rank.code is None:
                rank.process.send_signal(number)

    def _kill_all(self) -> None:
        for rank in self.ranks:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(rank.process.pid, signal.SIGKILL)
        self.deadline = time.monotonic() + 1

    def _clean_up(self) -> None:
        """End the rest of every rank's process group, and what left its group: the kernel gave it to us as a child."""
        self._kill_all()
        for rank in self.ranks:
            rank.code = rank.process.wait()
        while orphans := [pid for pid in _children(os.getpid()) if pid != self.guard.pid]:
            for pid in orphans:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                with suppress(ChildProcessError):
                    os.waitpid(pid, 0)
        _libc.prctl(PR_SET_CHILD_SUBREAPER, 0)
        with suppress(BrokenPipeError):
            self.guard.communicate("done")
        os.close(self.report_end)
        shutil.rmtree(self.scratch, ignore_errors=True)

    def _verdict(self) -> int:
        with os.fdopen(self.reports, "rb") as stream:
            reports = [json.loads(line) for line in (stream.read() or b"").splitlines()]
        if self.stopped_by is not None:
            return 128 + self.stopped_by
        if not self.failed:
            return 0
        killed = [r for r in self.failed if r.code < 0]
        if reports and not killed:
            first = reports[0]
            where = "" if first["code"] == 2 else f" (log: {self.ranks[first['rank']].log_path})"
            who = "" if first["code"] == 2 else f"rank {first['rank']}: "
            print(f"error: {who}{first['error']}{where}", file=sys.stderr, flush=True)
            return first["code"]
        rank = (killed or self.failed)[0]
        where = Place.read(self.log_dir, rank.number)
        cause = f"died by {signal.Signals(-rank.code).name}" if killed else _last_line(rank.log_path)
        cause += f" in {where}" if where else ""
        hint = " (out of memory?)" if rank.code == -signal.SIGKILL else ""
        print(f"error: rank {rank.number}: {cause}{hint} (log: {rank.log_path})", file=sys.stderr, flush=True)
        return 1 if killed else rank.code


def end_with_torchrun() -> None:
    """In a rank that torchrun started: it does not outlive torchrun, however that ends."""
    if "TORCHELASTIC_RUN_ID" in os.environ and not launched_locally():
        _die_with(os.getppid())


def _die_with(parent: int) -> None:
    """SIGKILL for this process when its parent ends, also when it ended before this call."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _compile_cache() -> str:
    """Where PyTorch keeps what it compiled, without a TMPDIR that goes with the job."""
    return str(Path(tempfile.gettempdir()) / f"torchinductor_{os.getuid()}")


def _children(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
    return found


def _last_line(log_path: Path) -> str:
    """The last line that says something: the exception's, when there was a traceback."""
    with open(log_path, "rb") as log:
        log.seek(max(0, log.seek(0, os.SEEK_END) - 65536))
        lines = [line.strip() for line in log.read().decode(errors="replace").splitlines()]
    if lines and lines[-1].startswith('File "') and any(line.startswith("Timeout (") for line in lines):
        return "hung, and its Python interpreter with it; its stack is in the log"
    return next((line for line in reversed(lines) if line), "ended without a word")
