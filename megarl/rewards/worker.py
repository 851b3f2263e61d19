"""One scoring process: `python -m megarl.rewards.worker PARENT_PID`, frames in on stdin and out on stdout.

First frame (see `frames`) in: `{"sys_path", "rewards": {name: (type, params)}}`; first frame out: None, or the error text.
Then for each chunk `[(name, prompt, response, answer, metadata), ...]` of one name: None once what these rows need is
imported, then one frame `(score, reason, seconds)` per item, written before the next item starts, so that the parent
always knows which item a hang or a crash belongs to. `reason` is "" for a good score. End of file ends the process.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import signal
import sys
import time
from typing import Any, BinaryIO

from megarl.rewards.frames import read_frame, write_frame
from megarl.rewards.functions import build

PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int) -> None:
    """SIGKILL on the parent's death: a hung verifier would never see the end of file."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(1)


def one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


def checked(score: Any) -> tuple[float, str]:
    """A finite float and ""; NaN, "not scorable", and why; or 0.0 and why it is no number."""
    try:
        value = float(score)
    except (TypeError, ValueError):
        return 0.0, f"the reward returned {score!r:.100}, not a number"
    return (
        (value, "") if math.isfinite(value) else (value if math.isnan(value) else 0.0, f"the reward returned {value}")
    )


def score_one(function: Any, item: tuple) -> tuple[float, str]:
    _, prompt, response, answer, metadata = item
    try:
        return checked(function(prompt, response, answer, **metadata))
    except Exception as error:  # a user's function may raise anything: one failed response, not a dead worker
        return 0.0, one_line(error)


def score_chunk(function: Any, items: list[tuple], out: BinaryIO) -> None:
    """Writes one frame per item; a batched reward (a judge) is called once for all of them."""
    if hasattr(function, "prepare"):
        with contextlib.suppress(Exception):  # the row at fault says so when it is scored
            function.prepare([item[4] for item in items])
    write_frame(out, None)
    started = time.perf_counter()
    if hasattr(function, "score_batch"):
        results = score_batch(function, items)
        seconds = (time.perf_counter() - started) / len(items)
        for score, reason in results:
            write_frame(out, (score, reason, seconds))
        return
    for item in items:
        score, reason = score_one(function, item)
        now = time.perf_counter()
        write_frame(out, (score, reason, now - started))
        started = now


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


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(int(sys.argv[1]))
    source, out = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    # What a verifier prints or reads must not touch the frames.
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    try:
        functions = load(read_frame(source))
    except EOFError:
        return
    except RuntimeError as error:
        return write_frame(out, str(error))
    write_frame(out, None)
    while True:
        try:
            items = read_frame(source)
        except EOFError:
            return
        score_chunk(functions[items[0][0]], items, out)


if __name__ == "__main__":
    main()
