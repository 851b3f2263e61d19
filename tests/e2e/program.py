"""The `megarl` command as a user runs it, on a project small enough for tests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

ROOT = Path(__file__).resolve().parents[2]
SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1, "operators": ["+"],
        "allow_parentheses": False, "allow_negation": False}  # fmt: skip
STEPS = 6
PATIENCE = 900 if torch.cuda.is_available() else 240  # seconds: on CUDA vLLM compiles the model when it starts


# What differs between two runs that compute the same: clocks, memory, and rates made of them.
CLOCKS = ("unix_time", "clock/", "time/", "throughput/", "memory/", "sync/seconds", "sync/move_seconds")
CLOCKS += ("sync/gb_per_second", "sync/of_plain_copy")

MARK = "MEGARL_TEST_PROJECT"  # in the environment of everything a project starts


def without_clocks(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if not name.startswith(CLOCKS)}


def sums(**settings: Any) -> dict[str, Any]:
    return {"type": "reasoning_gym", "task": "basic_arithmetic", "params": SUMS, **settings}


@dataclass(frozen=True)
class Project:
    """A YAML file, the model it names and the run folder it writes."""

    folder: Path
    model: Path

    @classmethod
    def create(cls, folder: Path, model: Path | None = None, **changes: Any) -> Project:
        project = cls(folder, model or folder / "model")
        project.config.write_text(yaml.safe_dump(project.settings() | changes))
        return project

    @property
    def config(self) -> Path:
        return self.folder / "project.yaml"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def settings(self) -> dict[str, Any]:
        train = [sums(size=400, seed=1)]
        return {
            "seed": 3,
            "run_dir": str(self.run),
            "model": {
                "path": str(self.model),
                "generate": {
                    "family": "qwen3_moe",
                    "num_layers": 2,
                    "hidden_size": 64,
                    "num_heads": 2,
                    "num_kv_heads": 1,
                    "head_dim": 32,
                    "num_experts": 8,
                    "top_k": 2,
                    "moe_intermediate_size": 32,
                    "context": 64,
                    "tokenizer": {"vocab_size": 300, "train_on": train},
                },
            },
            "parallel": {"ep": 2, "nproc": 2},
            "sft": {
                "data": [sums(size=400, seed=0)],
                "steps": 120,
                "batch_size": 64,
                "optimizer": {"lr": 3e-3, "schedule": "cosine", "warmup_steps": 4},
            },
            "rl": {
                "data": train,
                "algorithm": {"preset": "gspo", "gate": {"low": 0.01, "high": 0.013}},
                "steps": STEPS,
                "prompts_per_step": 16,
                "samples_per_prompt": 4,
                "optimizer_steps_per_rollout": 2,
                "optimizer": {"lr": 5e-4, "schedule": "linear", "warmup_steps": 2},
            },
            "rollout": {"max_response_tokens": 6},
            "reward": {"type": "reasoning_gym"},
            "eval": {"data": [sums(size=40, seed=99)]},
            "checkpoint": {"every": 2, "keep": 2, "async_save": True},
        }

    def rows(self, file: str = "rl/metrics.jsonl") -> list[dict[str, Any]]:
        path = self.run / file
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def megarl(self, *args: object, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        with self.start(*args, **env) as job:
            code, output, errors = job.end()
        return subprocess.CompletedProcess(job.process.args, code, output, errors)

    def start(self, *args: object, **env: str) -> Job:
        clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
        paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        clean |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, MARK: str(self.folder), **env}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return Job(subprocess.Popen([sys.executable, "-m", "megarl", *map(str, args)], env=clean, **pipes))

    def processes(self) -> list[int]:
        """Processes that a command of this project has started and that are still there."""
        mark, found = f"{MARK}={self.folder}".encode(), []
        for environ in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                if mark in environ.read_bytes().split(b"\0"):
                    found.append(int(environ.parent.name))
        return found


class Job:
    """A `megarl` command that runs in the background."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()  # its ranks die with it
        self.process.communicate()

    def wait_for(self, happened: Callable[[], bool], timeout: float = PATIENCE) -> None:
        deadline = time.monotonic() + timeout
        while not happened():
            assert self.process.poll() is None, f"ended too early: {self.end()}"
            assert time.monotonic() < deadline, f"nothing happened in {timeout} s"
            time.sleep(0.01)

    def wait_for_line(self, text: str) -> None:
        """Until a line of the output holds `text`; `end` then returns what comes after."""
        assert any(text in line for line in self.process.stdout), f"ended without {text!r}: {self.end()}"

    def rank(self, number: int) -> int:
        """The process id of a rank."""
        for child in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split():
            if f"\0RANK={number}\0" in f"\0{Path(f'/proc/{child}/environ').read_text()}":
                return int(child)
        raise AssertionError(f"no rank {number}")

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def end(self, timeout: float = PATIENCE) -> tuple[int, str, str]:
        """(exit code, stdout, stderr)."""
        output, errors = self.process.communicate(timeout=timeout)
        return self.process.returncode, output, errors
