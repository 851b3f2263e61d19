"""What encloses scoring processes and the programs they run: namespaces where the system allows them, and limits.

Standard library only. Linux lets root and, on most systems, any user make namespaces; in many containers nobody can.
What could not be had is returned, never passed over: `Enclosure.missing`.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import resource
import select
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PR_SET_PDEATHSIG, PR_CAPBSET_DROP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 24, 36, 38
NEW_FILES, NEW_IPC, NEW_USER, NEW_PIDS, NEW_NET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_PRIVATE = 2, 4, 8, 0x4000, 1 << 18
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 1
LAST_CAPABILITY = 63
MARGIN = 8  # tasks that a cgroup allows beyond what ends a tree, so that it is ended and not refused
INTERVAL = 0.05  # seconds between two looks at what a tree of processes uses

# A scheduler's warnings reach every process of a job, not only the ranks, which then finish their step: scoring goes on.
WARNINGS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
END = signal.SIGRTMIN  # so the word to a warden that its work is over is another
_warned = [0]

_libc = ctypes.CDLL(None, use_errno=True)


def prctl(option: int, value: int) -> None:
    _libc.prctl(option, value, 0, 0, 0)


def _call(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def count_warnings() -> None:
    """In this process warnings are counted from now on; what it executes, such as a program, has the default again."""

    def count(*_: object) -> None:
        _warned[0] += 1

    for number in WARNINGS:
        signal.signal(number, count)


def unshare(flags: int) -> bool:
    """Whether this process (for `NEW_PIDS`: its next child) is in new namespaces now; all of them or none."""
    return _libc.unshare(flags) == 0


def new_namespaces(network: bool) -> list[str]:
    """Own processes and, unless `network`, an empty network for the children of this process.

    Returns what could not be had. Without root it takes a user namespace, in which the user stays who it is.
    """
    wanted = NEW_PIDS | NEW_IPC | (0 if network else NEW_NET)
    user, group = os.getuid(), os.getgid()
    if unshare(wanted):
        return []
    if unshare(wanted | NEW_USER):
        with contextlib.suppress(OSError):
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
            Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
        return []
    return ["processes of its own"] + ([] if network else ["being cut off from the network"])


def mount_own_proc() -> None:
    """In the first process of a new pid namespace: a /proc that shows this namespace only, for it and its children.

    Raises OSError. Whoever watches from outside keeps the /proc that shows all.
    """
    _call(_libc.unshare(NEW_FILES))
    _call(_libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None))
    _call(_libc.mount(b"proc", b"/proc", b"proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, None))


class _Attributes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "user_namespace")]


def only_writable(folder: str, size: int) -> None:
    """After `mount_own_proc`: every file system read-only, and an empty one of `size` bytes at `folder`. Raises OSError."""
    read_only = _Attributes(MOUNT_ATTR_RDONLY, 0, 0, 0)
    _call(
        _libc.syscall(
            SYS_MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, ctypes.byref(read_only), ctypes.sizeof(read_only)
        )
    )
    _call(_libc.mount(b"none", folder.encode(), b"tmpfs", MS_NOSUID | MS_NODEV, f"size={size},mode=700".encode()))


def give_up_privileges() -> None:
    """From the next exec on this process has no capability and can get none, root or not."""
    for capability in range(LAST_CAPABILITY + 1):
        prctl(PR_CAPBSET_DROP, capability)
    prctl(PR_SET_NO_NEW_PRIVS, 1)


def limit(kind: int, value: float, hard: bool = False) -> None:
    """This process's limit `kind`, its soft one or both; never above the hard one that it has."""
    _, ceiling = resource.getrlimit(kind)
    number = math.ceil(value)
    number = number if ceiling == resource.RLIM_INFINITY else min(number, ceiling)
    resource.setrlimit(kind, (number, number if hard else ceiling))


def task_group(tasks: int) -> Path | None:
    """A new cgroup of at most `tasks` processes and threads; None where none can be made. A tree outruns what looks at it.

    A process enters by writing 0 into its `cgroup.procs`; its folder can be removed once it is empty.
    """
    with open("/proc/self/cgroup", encoding="ascii", errors="replace") as file:
        entries = [line.rstrip("\n").split(":", 2) for line in file]
    for _, controllers, path in entries:
        version_1 = "pids" in controllers.split(",")
        if not version_1 and controllers:
            continue
        parent = Path("/sys/fs/cgroup", "pids" if version_1 else ".", path.strip("/"))
        for old in parent.glob("megarl-reward-*"):  # of a warden that was killed
            if not Path("/proc", old.name.rpartition("-")[2]).exists():
                with contextlib.suppress(OSError):
                    old.rmdir()
        group = parent / f"megarl-reward-{os.getpid()}"
        try:
            group.mkdir(exist_ok=True)
            (group / "pids.max").write_text(str(tasks))
            return group
        except OSError:
            with contextlib.suppress(OSError):
                group.rmdir()
    return None


def enter(group: Path | None) -> None:
    """Puts this process, and what it will start, into a task group."""
    if group is not None:
        with contextlib.suppress(OSError):
            (group / "cgroup.procs").write_text("0")


def leave(group: Path | None) -> None:
    """Removes a task group, once all in it have ended, with those below it."""
    if group is not None:
        for folder in (*group.glob("megarl-reward-*"), group):
            with contextlib.suppress(OSError):
                folder.rmdir()


def limit_user_tasks(tasks: int) -> None:
    """Lets this process's user have `tasks` more processes and threads than now. Linux does not bind root by it."""
    user, found = os.getuid(), 0
    for entry in os.scandir("/proc"):
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and entry.stat().st_uid == user:
                found += len(os.listdir(f"/proc/{entry.name}/task"))
    limit(resource.RLIMIT_NPROC, found + tasks)


# The tree of processes below one --------------------------------------------------------------------------------


def descendants(pid: int) -> dict[int, int]:
    """Every process below `pid`, and how many threads it has. Daemons too, when `pid` is their subreaper."""
    found: dict[int, int] = {}
    waiting = [pid]
    while waiting:
        parent = waiting.pop()
        tasks = f"/proc/{parent}/task"
        try:
            names = os.listdir(tasks)
        except OSError:
            continue
        found[parent] = len(names)
        for name in names:
            with contextlib.suppress(OSError), open(f"{tasks}/{name}/children", "rb") as file:
                waiting += [int(child) for child in file.read().split() if int(child) not in found]
    found.pop(pid, None)
    return found


def resident(pids: Sequence[int], limit: int) -> int:
    """Bytes of memory that `pids` hold of their own; what forks share counts once, at the cost of a slower look."""
    total = sum(_bytes(f"/proc/{pid}/status", (b"RssAnon:", b"RssShmem:")) for pid in pids)
    if total <= limit:
        return total
    return sum(_bytes(f"/proc/{pid}/smaps_rollup", (b"Pss_Anon:", b"Pss_Shmem:")) for pid in pids) or total


def excess(pid: int, memory: int, tasks: int) -> str:
    """What the processes below `pid` use too much of: more than `memory` bytes or `tasks` processes and threads; or ""."""
    below = descendants(pid)
    if sum(below.values()) > tasks:
        return f"started more than {tasks} processes and threads"
    if resident([*below], memory) > memory:
        return f"used more than {memory / 2**30:g} GiB of memory"
    return ""


def _bytes(file: str, keys: tuple[bytes, ...]) -> int:
    try:
        with open(file, "rb") as stream:
            return sum(int(line.split()[1]) << 10 for line in stream.read().splitlines() if line.startswith(keys))
    except (OSError, ValueError):  # it has ended
        return 0


def end_descendants(seconds: float = 2.0, keep: Sequence[int] = ()) -> bool:
    """Kills every process below this one but `keep`, and reaps; whether none is left in time.

    Stopped before they are killed: what is stopped starts no others.
    """
    me, end = os.getpid(), time.monotonic() + seconds
    while True:
        stopped: set[int] = set()
        while new := descendants(me).keys() - stopped - {*keep}:
            for pid in new:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGSTOP)
            stopped |= new
            if time.monotonic() > end:
                break
        for pid in stopped:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        for pid in stopped:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        if not stopped:
            return True
        if time.monotonic() > end:
            return False
        time.sleep(0.001)


# A model's program -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bounds:
    """What one program may use."""

    seconds: float
    memory: int  # bytes, all its processes together
    tasks: int = 32  # processes and threads
    file: int = 16 << 20  # bytes in a file, or printed
    disk: int = 64 << 20  # bytes in its folder


@dataclass(frozen=True)
class Outcome:
    """How a program ended: its exit code (128 + n: by signal n), what it printed, and why it was ended, if it was."""

    code: int
    output: bytes
    ended: str = ""


def run_program(source: str, stdin: bytes, bounds: Bounds) -> Outcome:
    """Runs a Python program in an empty folder of its own, which is gone afterwards with all it started.

    Where namespaces can be had it has no network, sees no process but its own, and can write into that folder and
    nowhere else. Nothing of this process's environment reaches it anyhow. What a warning ends runs again.
    """
    while True:
        before, outcome = _warned[0], _run_once(source, stdin, bounds)
        if outcome.code - 128 not in WARNINGS:
            return outcome
        time.sleep(INTERVAL)  # the same warning may come a little later here
        if _warned[0] == before:
            return outcome


def _run_once(source: str, stdin: bytes, bounds: Bounds) -> Outcome:
    with (
        tempfile.TemporaryDirectory(prefix="megarl-program-", ignore_cleanup_errors=True) as folder,
        os.fdopen(os.memfd_create("stdin"), "r+b") as given,
        os.fdopen(os.memfd_create("stdout"), "r+b") as printed,
    ):
        given.write(stdin)
        given.seek(0)
        group = task_group(bounds.tasks + MARGIN)
        pid = os.fork()
        if not pid:
            try:
                enter(group)
                _become_program(source, folder, given.fileno(), printed.fileno(), bounds)
            finally:
                os._exit(127)
        try:
            ended = _watch_program(pid, bounds)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            leave(group)
        printed.seek(0)
        return Outcome(128 - code if code < 0 else code, printed.read(bounds.file), ended)


def _become_program(source: str, folder: str, given: int, printed: int, bounds: Bounds) -> None:
    """Never returns: the program, or the process that waits for it outside its namespaces."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.setsid()
    for number, fd in enumerate((given, printed, os.open(os.devnull, os.O_WRONLY))):
        os.dup2(fd, number)
    os.closerange(3, 1 << 12)
    if not new_namespaces(network=False):
        child = os.fork()
        if child:
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            os._exit(128 - code if code < 0 else code)
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        mount_own_proc()
        only_writable(folder, bounds.disk)
    os.nice(5)  # whoever watches it comes first
    os.chdir(folder)
    Path("program.py").write_text(source, encoding="utf-8", errors="replace")
    for kind, value in (
        (resource.RLIMIT_CPU, bounds.seconds + 1),
        (resource.RLIMIT_DATA, bounds.memory),
        (resource.RLIMIT_FSIZE, bounds.file),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 256),
    ):
        limit(kind, value, hard=True)
    give_up_privileges()
    home = {"HOME": folder, "TMPDIR": folder, "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}
    os.execve(sys.executable, [sys.executable, "-I", "program.py"], home)


def _watch_program(pid: int, bounds: Bounds) -> str:
    """Waits for its end; why it has to be ended before it, or nothing."""
    end = time.monotonic() + bounds.seconds
    pidfd = os.pidfd_open(pid)
    try:
        while not select.select([pidfd], [], [], min(INTERVAL, max(0.0, end - time.monotonic())))[0]:
            if time.monotonic() >= end:
                return f"ran longer than {bounds.seconds:g} s"
            reason = excess(pid, bounds.memory, bounds.tasks)
            if reason:
                return reason
        return ""
    finally:
        os.close(pidfd)
