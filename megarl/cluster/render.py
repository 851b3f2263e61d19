"""A job's script: SLURM's options and this run's settings in front of launch/slurm.sbatch, or one call of launch/torchrun.sh."""

from __future__ import annotations

import itertools
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import megarl
from megarl.errors import BadInput

COMMANDS = {"sft": "sft", "reward-model": "reward_model", "train": "rl", "eval": "eval"}  # -> what the config must have


@dataclass(frozen=True)
class Job:
    """A run on a cluster. `sweep`: per array task its overrides, each as `a.b=c`; empty: one run."""

    config: Path
    overrides: tuple[str, ...]
    commands: tuple[str, ...]
    run_dir: Path  # of the run, or that of a sweep, whose runs are in folders of it
    nodes: int
    ranks_per_node: int
    gpus_per_node: int = 0
    cpus_per_rank: int | None = None
    partition: str | None = None
    account: str | None = None
    time: str | None = None
    image: str | None = None
    mounts: tuple[str, ...] = ()
    image_home: str = "/opt/megarl"
    sweep: tuple[tuple[str, ...], ...] = ()
    at_once: int | None = None
    sbatch: tuple[str, ...] = ()
    warn_seconds: int = 300
    max_faults: int = 3
    check: bool = True

    @property
    def folder(self) -> Path:
        """Where the script, its output and its state are: on a file system that every node sees."""
        return self.run_dir / "launch"


def launch_folder() -> Path:
    """The project's launch/. Raises `BadInput` when megarl was installed without it."""
    folder = Path(megarl.__file__).resolve().parents[1] / "launch"
    if not (folder / "slurm.sbatch").is_file():
        raise BadInput(f"{folder}: no launch scripts there; run `megarl launch` from a checkout (pip install -e .)")
    return folder


def sweep_tasks(sweeps: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Every combination of `a.b=c,d` settings, in order; commas within brackets or quotes belong to a value.

    Raises `BadInput` for what has no values, for one value twice, and for a setting given twice.
    """
    choices, names = [], []
    for sweep in sweeps:
        name, sign, values = sweep.partition("=")
        found = _split(values)
        if not sign or not name or not all(found):
            raise BadInput(f"--sweep {sweep}: not a setting with values; write a.b=c,d")
        if len(set(found)) != len(found) or name in names:
            raise BadInput(f"--sweep {sweep}: the same run twice; give each setting once, and each value once")
        names.append(name)
        choices.append([f"{name}={value}" for value in found])
    return tuple(itertools.product(*choices)) if choices else ()


def _split(text: str) -> list[str]:
    found, depth, quote = [""], 0, ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        elif char == "," and depth == 0:
            found.append("")
            continue
        depth += (char in "[{(") - (char in "]})") if not quote else 0
        found[-1] += char
    return found


def run_dirs(job: Job) -> list[Path]:
    """The run folder of each array task, or the one of the run: `RUN_DIR/lr=1e-05,seed=2`."""
    return [job.run_dir / _task_name(task) for task in job.sweep] or [job.run_dir]


def _task_name(task: Sequence[str]) -> str:
    """A folder's name from the settings' last words and values."""
    words = [f"{name.rpartition('.')[2]}={value}" for name, _, value in (one.partition("=") for one in task)]
    return "".join(c if c.isalnum() or c in "=,.+-_" else "_" for c in ",".join(words))


def slurm_script(job: Job) -> str:
    """The text to give to sbatch."""
    body = (launch_folder() / "slurm.sbatch").read_text()
    shebang, *lines = body.splitlines()
    rest = [line for line in lines if not line.startswith("#SBATCH")]
    text = [shebang, *(f"#SBATCH --{option}" for option in _sbatch_options(job)), *_settings(job), "", *rest]
    return "\n".join(text) + "\n"


def _sbatch_options(job: Job) -> list[str]:
    options: dict[str, object] = {
        "job-name": job.run_dir.name,
        "nodes": job.nodes,
        "ntasks-per-node": job.ranks_per_node,
        "cpus-per-task": job.cpus_per_rank,
        "gpus-per-node": job.gpus_per_node or None,
        "partition": job.partition,
        "account": job.account,
        "time": job.time,
        "array": f"0-{len(job.sweep) - 1}" + (f"%{job.at_once}" if job.at_once else "") if job.sweep else None,
        "output": job.folder / ("%A_%a.out" if job.sweep else "%j.out"),
        "open-mode": "append",
        "signal": f"B:USR1@{job.warn_seconds}",
    }
    given = [option.removeprefix("--") for option in job.sbatch]
    ours = [f"{name}={value}" for name, value in options.items() if value is not None]
    taken = {option.partition("=")[0] for option in given}
    return [option for option in ours if option.partition("=")[0] not in taken] + ["requeue", *given]


def _settings(job: Job) -> list[str]:
    in_image = job.image is not None
    settings = {
        "MEGARL_COMMANDS": " ".join(job.commands),
        "MEGARL_LAUNCH": f"{job.image_home}/launch" if in_image else str(launch_folder()),
        "MEGARL_JOB_ROOT": str(job.folder),
        "MEGARL_MAX_FAULTS": str(job.max_faults),
        "MEGARL_CHECK": "yes" if job.check else "no",
        "MEGARL_SRUN_OPTIONS": " ".join(_container_options(job)) if in_image else "",
        "PYTHON": "python3" if in_image else sys.executable,
    }
    lines = [f"export {name}={shlex.quote(value)}" for name, value in settings.items() if value]
    words = [str(job.config), *job.overrides]
    lines.append("set -- " + " ".join(map(shlex.quote, words)))
    if job.sweep:
        lines.append("case $SLURM_ARRAY_TASK_ID in")
        for number, (task, folder) in enumerate(zip(job.sweep, run_dirs(job), strict=True)):
            more = " ".join(map(shlex.quote, (*task, f"run_dir={folder}")))
            lines.append(f'{number}) set -- "$@" {more} ;;')
        lines.append("esac")
    return lines


def _container_options(job: Job) -> list[str]:
    here = os.getcwd()
    mounts = [f"{here}:{here}", *job.mounts]
    return [f"--container-image={job.image}", f"--container-mounts={','.join(mounts)}", f"--container-workdir={here}",
            "--no-container-mount-home"]  # fmt: skip


def check_mounts(job: Job, paths: Sequence[Path]) -> None:
    """Raises `BadInput` for a mount that is none, and for a path that ranks in a container would not see."""
    if job.image is None:
        if job.mounts:
            raise BadInput(f"--mount {job.mounts[0]}: there is no container; give --image too")
        return
    inside = [Path.cwd()]
    for mount in job.mounts:
        source, _, target = mount.partition(":")
        if not Path(source).is_dir() or not target.startswith("/"):
            raise BadInput(f"--mount {mount}: write FOLDER:/path/in/the/container, with a folder that is here")
        inside.append(Path(target.partition(":")[0]))
    for path in paths:
        if not any(path.is_relative_to(folder) for folder in inside):
            raise BadInput(f"{path}: not seen in the container; add --mount {path.parent}:{path.parent}")


def torchrun_script(job: Job, master: str, port: int, max_restarts: int, run_id: str) -> str:
    """The text of a script that starts one node's ranks: the same on every node."""
    options = ["--nodes", job.nodes, "--ranks-per-node", job.ranks_per_node, "--master", f"{master}:{port}",
               "--max-restarts", max_restarts, "--id", run_id]  # fmt: skip
    options += [] if job.check else ["--no-check"]
    lines = ["#!/usr/bin/env bash", "set -euo pipefail", f"cd {shlex.quote(os.getcwd())}",
             f"export PYTHON={shlex.quote(sys.executable)}",
             f"export MEGARL_JOB_DIR={shlex.quote(str(job.folder / run_id))}"]  # fmt: skip
    start = [str(launch_folder() / "torchrun.sh"), *map(str, options)]
    for number, command in enumerate(job.commands):
        first = start if number == 0 else [*start, "--no-check"]
        lines.append(" ".join(map(shlex.quote, [*first, "--", command, str(job.config), *job.overrides])))
    return "\n".join(lines) + "\n"
