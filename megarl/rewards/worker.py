"""One scoring process: `python -m megarl.rewards.worker PARENT_PID VERDICT_FD LIMITS`, frames in and out.

Three processes, forked from one interpreter. The warden stays outside and watches memory and processes of all below it.
The first process of the namespaces (of a pid namespace, where there is one) ends everything in them with itself. The
worker scores. When it ends, or the warden ends it, one line on VERDICT_FD says why.

First frame (see `frames`) in: `{"sys_path", "rewards": {name: (type, params)}}`; first frame out: `[]` with the names
whose rows need preparing, or the error text. Then for each chunk `[(name, prompt, response, answer, metadata), ...]` of
one name: None once what these rows need is imported, then one frame `[position, score, reason, seconds]` per item,
written before the next item starts, so that the runner always knows which item a hang or a crash belongs to. `reason`
is "" for a good score. End of file ends the process.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, BinaryIO

from megarl.rewards import sandbox
from megarl.rewards.frames import read_work, write_answer
from megarl.rewards.functions import build

LARGEST = 1e18  # a larger score overflows float32 in the square
PREPARING = 600  # seconds of processor time for what is imported between two chunks
THREADS_LEFT = 77  # exit code of a worker whose item left many threads: those of the next items would be ended for them
PRINTED = 1 << 16  # bytes of a worker's output that reach the log, each minute


# The warden --------------------------------------------------------------------------------------------------------


def main() -> None:
    parent, verdict, limits = int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    for number in (signal.SIGINT, *sandbox.WARNINGS):
        signal.signal(number, signal.SIG_IGN)
    sandbox.prctl(sandbox.PR_SET_PDEATHSIG, sandbox.END)  # a hung verifier would never see the end of file
    sandbox.prctl(sandbox.PR_SET_CHILD_SUBREAPER, 1)
    if os.getppid() != parent:
        os._exit(1)
    group = sandbox.task_group(limits["tasks"] + sandbox.MARGIN)
    folder = tempfile.mkdtemp(prefix="megarl-reward-")
    os.environ["TMPDIR"] = tempfile.tempdir = folder
    missing = sandbox.new_namespaces(limits["network"])
    output, printed = os.pipe()
    first = os.fork()
    if not first:
        try:
            os.close(output)
            sandbox.enter(group)
            if group is None and os.getuid():
                sandbox.limit_user_tasks(limits["tasks"] + sandbox.MARGIN)
            first_process(limits, missing, printed, verdict)
        finally:
            os._exit(1)
    os.close(printed)
    for fd in (0, 1):
        os.close(fd)  # the frames are the worker's
    signal.signal(sandbox.END, lambda *_: end(first, verdict, "", folder, group))
    end(first, verdict, watch(first, output, limits), folder, group)


def end(first: int, verdict: int, reason: str, folder: str, group: Path | None) -> None:
    """Kills everything below the warden, says why, removes its temporary folder and its cgroup, and exits."""
    signal.signal(sandbox.END, signal.SIG_IGN)
    if reason:
        with contextlib.suppress(OSError):
            os.write(verdict, f"{reason}\n".encode())
    with contextlib.suppress(ProcessLookupError):
        os.kill(first, signal.SIGKILL)
    sandbox.end_descendants()
    shutil.rmtree(folder, ignore_errors=True)
    sandbox.leave(group)
    os._exit(0)


def watch(first: int, output: int, limits: dict[str, Any]) -> str:
    """Passes on what is printed, in measure, until the first process ends or too much is used: why, or ""."""
    pidfd, left, renewed, open_ = os.pidfd_open(first), PRINTED, time.monotonic(), [output]
    looked = 0.0
    while True:
        ready, _, _ = select.select([pidfd, *open_], [], [], sandbox.INTERVAL)
        now = time.monotonic()
        if output in ready:
            text = os.read(output, 1 << 16)
            if not text:
                open_.clear()
            if now - renewed > 60:
                left, renewed = PRINTED, now
            with contextlib.suppress(OSError):
                os.write(2, text[: max(0, left)])
                if 0 < left <= len(text):
                    os.write(2, b"\n[rewards print more than 64 KiB a minute: the rest of it is dropped]\n")
            left -= len(text)
        if pidfd in ready:
            return ""
        if now - looked >= sandbox.INTERVAL:
            looked = now
            reason = sandbox.excess(first, limits["memory"], limits["tasks"])
            if reason:
                return reason


# The first process of the namespaces -----------------------------------------------------------------------------


def first_process(limits: dict[str, Any], missing: list[str], printed: int, verdict: int) -> None:
    """Starts the worker, reaps whatever loses its parent, and says how the worker ended."""
    sandbox.prctl(sandbox.PR_SET_PDEATHSIG, signal.SIGKILL)
    sandbox.prctl(sandbox.PR_SET_CHILD_SUBREAPER, 1)
    if not missing:
        try:
            sandbox.mount_own_proc()
        except OSError:
            missing = ["a /proc of its own"]
    worker = os.fork()
    if not worker:
        try:
            os.close(verdict)
            source, out = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
            # What a verifier prints or reads must not touch the frames.
            os.dup2(printed, 1)
            os.dup2(printed, 2)
            os.close(printed)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            work(source, out, limits, missing)
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
            os._exit(0)
    for fd in (0, 1, 2, printed):
        os.close(fd)
    while True:
        pid, status = os.waitpid(-1, 0)
        if pid == worker:
            code = os.waitstatus_to_exitcode(status)
            os.write(verdict, f"{ending(code, limits)}\n".encode())
            os._exit(0)


def ending(code: int, limits: dict[str, Any]) -> str:
    if code == -signal.SIGXCPU:
        return f"used more than {limits['cpu']} s of processor time"
    if code == THREADS_LEFT:
        return f"left more than {limits['tasks'] // 2} threads running"
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return f"the scoring process ended ({how})"


# The worker --------------------------------------------------------------------------------------------------------


def one_line(error: BaseException) -> str:
    try:
        text = str(error)
    except BaseException:  # its class is the verifier's own
        text = "it says nothing"
    return " ".join(f"{type(error).__name__}: {text[:2000]}".split())[:500]


def checked(score: Any) -> tuple[float, str]:
    """A finite float and ""; NaN, "not scorable", and why; or 0.0 and why it is no number."""
    if isinstance(score, str | bytes | bytearray):
        return 0.0, f"the reward returned {score[:100]!r}, not a number"
    try:
        value = float(score)
    except (TypeError, ValueError, OverflowError):
        return 0.0, f"the reward returned {type(score).__name__} {score!r:.100}, not a number"
    if math.isnan(value):
        return value, "the reward returned nan"
    if abs(value) > LARGEST:
        return 0.0, f"the reward returned {value}, not within {LARGEST:g}"
    return value, ""


def score_one(function: Any, item: tuple) -> tuple[float, str]:
    _, prompt, response, answer, metadata = item
    try:
        return checked(function(prompt, response, answer, **metadata))
    except BaseException as error:  # a function may raise anything, SystemExit too: one failed response
        return 0.0, one_line(error)


def score_chunk(function: Any, items: list[tuple], out: BinaryIO, limits: dict[str, Any]) -> None:
    """Writes one frame per item; a batched reward (a judge) is called once for all of them."""
    me, before = os.getpid(), {*sandbox.descendants(os.getpid())}
    limit_processor_time(PREPARING)
    if hasattr(function, "prepare"):
        with contextlib.suppress(Exception):  # the row at fault says so when it is scored
            function.prepare([item[4] for item in items])
    write_answer(out, None)
    started = time.perf_counter()
    if hasattr(function, "score_batch"):
        results = score_batch(function, items)
        seconds = (time.perf_counter() - started) / len(items)
        for position, (score, reason) in enumerate(results):
            write_answer(out, [position, score, reason, seconds])
        return
    for position, item in enumerate(items):
        limit_processor_time(limits["cpu"])
        score, reason = score_one(function, item)
        if os.getpid() != me:
            os._exit(0)  # a fork that the function has returned from as well
        now = time.perf_counter()
        if has_children() and sandbox.descendants(me).keys() - before and not sandbox.end_descendants(keep=before):
            os._exit(1)
        if len(os.listdir("/proc/self/task")) > limits["tasks"] // 2:
            os._exit(THREADS_LEFT)  # of threads only the end of their process disposes
        write_answer(out, [position, score, reason, now - started])
        started = time.perf_counter()


def has_children() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def limit_processor_time(seconds: float) -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    sandbox.limit(resource.RLIMIT_CPU, used.ru_utime + used.ru_stime + seconds)


def score_batch(function: Any, items: list[tuple]) -> list[tuple[float, str]]:
    try:
        scores = function.score_batch([item[1:] for item in items])
    except Exception as error:  # no answer for any of them
        return [(0.0, one_line(error))] * len(items)
    return [(0.0, "the judge returned null") if score is None else checked(score) for score in scores]


def load(setup: dict) -> dict:
    """The reward functions by name. Raises with the config key in front."""
    sys.path[:] = list(dict.fromkeys([*setup["sys_path"], *sys.path]))
    functions = {}
    for name, (kind, params) in setup["rewards"].items():
        try:
            functions[name] = build(kind, params)
        except Exception as error:
            key = "reward" if name is None else f"reward.named.{name}"
            raise RuntimeError(f"{key}.type: {kind} cannot be built from params {params}: {one_line(error)}") from None
    return functions


def work(source: BinaryIO, out: BinaryIO, limits: dict[str, Any], missing: list[str]) -> None:
    sandbox.prctl(sandbox.PR_SET_PDEATHSIG, signal.SIGKILL)
    sandbox.prctl(sandbox.PR_SET_CHILD_SUBREAPER, 1)  # what a verifier turns into a daemon stays below this process
    sandbox.count_warnings()
    sandbox.limit(resource.RLIMIT_CORE, 0)
    sandbox.limit(resource.RLIMIT_DATA, limits["memory"])
    try:
        functions = load(read_work(source))
    except EOFError:
        return
    except RuntimeError as error:
        return write_answer(out, {"error": str(error)[:4000]})
    slow = [name for name, function in functions.items() if hasattr(function, "prepare")]
    write_answer(out, {"prepare": slow, "missing": missing})
    while True:
        try:
            items = read_work(source)
        except EOFError:
            return
        score_chunk(functions[items[0][0]], items, out, limits)


if __name__ == "__main__":
    main()
