"""Runs a function on N ranks: one Python process each, over the loopback interface.

    results = run_ranks("tests.dist.convert_cases:round_trip", 2, "/checkpoint", tp=2)

calls `round_trip("/checkpoint", tp=2)` in every process with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT
set, and returns what each rank returned. Arguments and results travel as JSON. Starting two ranks costs more than most
cases do: `run_in_turn` runs many of them, each on a layout of its own, in one launch.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from megarl.launcher import free_port

ROOT = Path(__file__).resolve().parents[2]
TAIL = 4000  # characters of a failing rank's output that are shown


class RanksFailed(AssertionError):
    """A rank failed or the time ran out; the message holds the output of the rank that failed first."""


def run_ranks(
    target: str, nproc: int, *args: Any, timeout: float = 240, env: dict[str, str] | None = None, **kwargs: Any
) -> list[Any]:
    """`[target(*args, **kwargs) of rank 0, of rank 1, ...]`; `target` is `module:function`, `env` goes to every rank.

    Raises RanksFailed when any rank fails or `timeout` seconds pass; every process is gone afterwards. Where ranks compute
    on GPUs and there are fewer of them, the test is skipped.
    """
    _need_devices(nproc)
    call = json.dumps({"target": target, "args": args, "kwargs": kwargs})
    common = {
        "WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        folder = Path(name)
        processes: list[subprocess.Popen] = []
        try:
            for rank in range(nproc):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": paths}
                with open(folder / f"output-{rank}", "wb") as output:
                    processes.append(
                        subprocess.Popen(
                            [sys.executable, "-m", "tests.dist.harness", call, str(folder / f"result-{rank}")],
                            stdout=output,
                            stderr=subprocess.STDOUT,
                            stdin=subprocess.DEVNULL,
                            cwd=ROOT,
                            env={**os.environ, **common, **own, **(env or {})},
                            start_new_session=True,
                        )
                    )
            problem = _wait(processes, timeout)
        finally:
            for process in processes:
                _end(process)
        if problem is not None:
            rank, why = problem
            text = (folder / f"output-{rank}").read_text(errors="replace")[-TAIL:]
            raise RanksFailed(f"{target} on {nproc} ranks: rank {rank} {why}; its output ends with:\n{text}")
        return [json.loads((folder / f"result-{rank}").read_text()) for rank in range(nproc)]


def _need_devices(count: int) -> None:
    import pytest
    import torch

    if torch.cuda.is_available() and torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} GPUs, there is {torch.cuda.device_count()}")


def run_in_turn(module: str, nproc: int, cases: dict[str, tuple[str, dict[str, Any]]], **launch: Any) -> dict[str, Any]:
    """name -> what each rank returned, for `cases`: name -> (function of `module`, its arguments)."""
    ranks = run_ranks("tests.dist.harness:in_turn", nproc, module, list(cases.values()), **launch)
    return {name: list(results) for name, results in zip(cases, zip(*ranks, strict=True), strict=True)}


def in_turn(module: str, steps: list[tuple[str, dict[str, Any]]]) -> list[Any]:
    """Run by the ranks: each function's result; Megatron's groups are torn down between any two."""
    import gc

    import torch.distributed as dist

    out = []
    for function, arguments in steps:
        out.append(getattr(importlib.import_module(module), function)(**arguments))
        from megatron.core import parallel_state

        if dist.is_initialized():
            dist.barrier()
        parallel_state.destroy_model_parallel()
        gc.collect()
        for group in [g for g in dist.distributed_c10d._world.pg_map if g is not dist.group.WORLD]:
            dist.destroy_process_group(group)  # three threads each, for as long as it is
    return out


def _wait(processes: list[subprocess.Popen], timeout: float) -> tuple[int, str] | None:
    """None once all ranks ended well; otherwise the first rank seen to fail and why."""
    deadline = time.monotonic() + timeout
    while True:
        codes = [process.poll() for process in processes]
        for rank, code in enumerate(codes):
            if code:
                return rank, f"ended with code {code}"
        if None not in codes:
            return None
        if time.monotonic() > deadline:
            return codes.index(None), f"had not ended after {timeout} s"
        time.sleep(0.05)


def _end(process: subprocess.Popen) -> None:
    """Kill the rank's process group: the rank and whatever it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _rank_main(call: str, result: str) -> None:
    import torch.distributed as dist

    work = json.loads(call)
    module, function = work["target"].split(":")
    value = getattr(importlib.import_module(module), function)(*work["args"], **work["kwargs"])
    Path(result).write_text(json.dumps(value))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    _rank_main(*sys.argv[1:])
