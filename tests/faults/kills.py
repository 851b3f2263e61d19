"""Kills of a run's processes at chosen moments, and what two runs' folders differ in."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megarl.launcher import Place
from tests.e2e.program import without_clocks
from tests.marked import marked

ROOT = Path(__file__).resolve().parents[2]
WARM = "tests.faults.warm_program"
MARK = "MEGARL_TEST_FAULTS"  # in the environment of everything a run starts


@dataclass(frozen=True)
class Kill:
    """A process and the moment it was killed in: where its place said it was."""

    target: str  # rank 1, launcher
    place: str
    signal: str


class Run:
    """A command that trains, in a session of its own, with its ranks' processes and places."""

    def __init__(self, command: list[str], part_dir: Path, scratch: Path, ranks: int = 2) -> None:
        self.part_dir, self.scratch, self.ranks, self.command = part_dir, scratch, ranks, command
        self.ended: set[int] = set()  # ranks of a start in which one was killed
        scratch.mkdir(parents=True, exist_ok=True)
        self.mark = f"{MARK}={part_dir}"
        self.output = open(part_dir.parent / f"{part_dir.name}.out", "ab")  # noqa: SIM115
        self.start()

    def start(self) -> None:
        clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
        paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        clean |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, MARK: str(self.part_dir), "TMPDIR": str(self.scratch)}
        clean.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"torchinductor_{os.getuid()}"))
        self.process = subprocess.Popen(
            self.command, env=clean, stdout=self.output, stderr=self.output, start_new_session=True
        )

    def processes(self) -> list[int]:
        """Everything of this run that is still there."""
        return marked(self.mark)

    def rank(self, number: int) -> int | None:
        """The process of a rank, where there is one now."""
        for process in self.processes():
            with suppress(OSError):
                environ = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
                words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
                if f"RANK={number}".encode() in environ and {b"megarl", WARM.encode()} & {*words} and is_running(process):
                    return None if process in self.ended else process
        return None

    def place(self, rank: int) -> str:
        return Place.read(self.part_dir / "logs", rank)

    def kill(self, rank: int, number: signal.Signals = signal.SIGKILL) -> Kill | None:
        """Send a signal to a rank; where it was."""
        process = self.rank(rank)
        if process is None:
            return None
        if not self._has_said(rank, process):
            return None
        self.ended |= {one for one in map(self.rank, range(self.ranks)) if one is not None}
        place = self.place(rank)
        os.kill(process, number)
        return Kill(f"rank {rank}", place, number.name)

    def _has_said(self, rank: int, process: int) -> bool:
        """Whether a rank's place is its own: torchrun leaves there where the rank before it was."""
        with suppress(OSError):
            return str(Place.path(self.part_dir / "logs", rank).resolve()) in Path(f"/proc/{process}/maps").read_text()
        return False

    def end(self, timeout: float) -> int:
        try:
            return self.process.wait(timeout)
        finally:
            self.output.flush()

    def close(self) -> None:
        for process in self.processes():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.process.wait()
        self.output.close()


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(run: Run, place: re.Pattern[str], rank: int, timeout: float) -> bool:
    """Until the rank is where the pattern says; False when the run or the time ends first."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and run.process.poll() is None:
        if place.search(run.place(rank)):
            return True
        time.sleep(0.002)
    return False


def kill_at(run: Run, phase: str, after_step: int, rank: int, delay: float, timeout: float) -> Kill | None:
    """Kill `rank` `delay` seconds into its next `phase` of a step above `after_step`; None when none came."""
    deadline = time.monotonic() + timeout
    wanted = re.compile(rf"(?: step (\d+))?, {phase}$")
    while time.monotonic() < deadline and run.process.poll() is None:
        found = wanted.search(run.place(rank))
        if found and int(found[1] or 0) >= (after_step if phase != "start" else 0):
            time.sleep(delay)
            if (kill := run.kill(rank)) is not None:
                return kill
            time.sleep(0.1)
        time.sleep(0.002)
    return None


def differences(run: Path, other: Path) -> list[str]:
    """What is not the same, bit for bit, in the folders `RUN_DIR/<part>` of two runs, clocks aside: nothing, or where."""
    found = [*_rows(run / "metrics.jsonl", other / "metrics.jsonl"), *_rows(run / "eval.jsonl", other / "eval.jsonl")]
    for pattern in ("rollouts/*", "hf/*"):
        found += _files(run, other, pattern)
    steps = [sorted(folder.glob("checkpoints/step_*"))[-1].name for folder in (run, other)]
    if len(set(steps)) != 1:
        return [*found, f"newest checkpoints: {steps}"]
    return found + list(_checkpoints(*(folder / "checkpoints" / steps[0] for folder in (run, other))))


def _rows(path: Path, other: Path) -> Iterator[str]:
    rows, others = (
        [json.loads(line) for line in p.read_text().splitlines()] if p.exists() else [] for p in (path, other)
    )
    steps, expected = ([row["step"] for row in one] for one in (rows, others))
    if steps != expected:
        yield f"{path.name}: steps {steps}, not {expected}"
        return
    for row, reference in zip(rows, others, strict=True):
        row, reference = without_clocks(row), without_clocks(reference)
        names = [name for name in {**row, **reference} if row.get(name) != reference.get(name)]
        if names:
            yield f"{path.name}, step {row['step']}: {', '.join(names[:5])}"


def _files(run: Path, other: Path, pattern: str) -> Iterator[str]:
    names = {path.relative_to(folder) for folder in (run, other) for path in folder.glob(pattern)}
    for name in sorted(names):
        both = [folder / name for folder in (run, other)]
        if not all(path.exists() for path in both):
            yield f"{name}: only in one"
        elif both[0].read_bytes() != both[1].read_bytes():
            yield f"{name}: other bytes"


def _checkpoints(path: Path, other: Path) -> Iterator[str]:
    state, expected = (json.loads((one / "state.json").read_text()) for one in (path, other))
    for one in (state, expected):
        one["owners"].pop("clock", None)
        one.pop("config", None)  # with the run_dir, and how often ranks may come back
    if state != expected:
        yield f"state.json: {[name for name in state if state[name] != expected.get(name)]}"
    tensors, others = _tensors(path / "shards"), _tensors(other / "shards")
    if tensors.keys() != others.keys():
        yield f"shards: other names: {sorted(tensors.keys() ^ others.keys())[:5]}"
        return
    unequal = [name for name in tensors if not torch.equal(tensors[name], others[name])]
    if unequal:
        yield f"shards: {len(unequal)} of {len(tensors)} tensors, such as {unequal[0]}"


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    entries = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    state: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(state, checkpoint_id=str(path), no_dist=True)
    return state


def command(part: str, config: Path, overrides: list[str], torchrun: int = 0, warm: bool = False) -> list[str]:
    """`megarl sft|train CONFIG ...`, by the local launcher, or with this many restarts by torchrun.

    `warm`: by a launcher whose ranks are forks.
    """
    name = {"sft": "sft", "rl": "train"}[part]
    arguments = [name, str(config), *overrides]
    if not torchrun:
        return [sys.executable, "-m", WARM if warm else "megarl", *arguments]
    runner = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return [*runner, "--max-restarts", str(torchrun), "--monitor-interval", "0.5", "-m", "megarl", *arguments]


def choose(random_: random.Random, phases: list[str]) -> tuple[str, int, float]:
    """(phase, rank, delay in seconds) of the next kill."""
    return (
        random_.choice(phases),
        random_.randrange(2),
        random_.choice((0.0, random_.uniform(0, 0.1), random_.uniform(0, 1))),
    )
