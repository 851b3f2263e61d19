"""`megarl launch slurm` and `megarl launch torchrun`: everything is checked here, before anything is submitted."""

from __future__ import annotations

import math
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from megarl.cluster import render, slurm
from megarl.cluster.render import COMMANDS, Job
from megarl.config import Config, check_run_dir, check_world, resolve, smallest_world
from megarl.errors import BadInput

app = typer.Typer(help="Start a run on a cluster: a SLURM job, or this node's part of a torchrun.")

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the project.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="a.b=c", help="Values that replace the file's.", show_default=False)
]
Run = Annotated[str, typer.Option("--run", metavar="sft,train", help="Commands, one after the other.")]
Nodes = Annotated[
    int | None, typer.Option(min=1, help="Nodes (default: as many as the smallest world needs).", show_default=False)
]
Ranks = Annotated[
    int | None, typer.Option(min=1, help="Ranks on a node (default: its GPUs, or all ranks on one).", show_default=False)
]
NoCheck = Annotated[bool, typer.Option("--no-check", help="Start without looking at the nodes first.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, print the script, start nothing.")]


def _text(flag: str, metavar: str, text: str) -> Any:
    return typer.Option(flag, metavar=metavar, help=text, show_default=False)


@app.command(name="slurm")
def launch_slurm(
    config: ConfigFile,
    overrides: Overrides = None,
    run: Run = "train",
    nodes: Nodes = None,
    ranks_per_node: Ranks = None,
    gpus_per_node: Annotated[
        int | None, typer.Option(min=0, help="GPUs of a node (default: all the partition's nodes have).", show_default=False)
    ] = None,
    cpus_per_rank: Annotated[int | None, typer.Option(min=1, help="Cores of a rank.", show_default=False)] = None,
    partition: Annotated[str | None, _text("--partition", "NAME", "Partition (default: the cluster's).")] = None,
    account: Annotated[str | None, _text("--account", "NAME", "Account.")] = None,
    time: Annotated[str | None, _text("--time", "H:M:S", "Time limit of one start; the job goes on after it.")] = None,
    image: Annotated[str | None, _text("--image", "FILE", "Container: a .sqsh file or an image of a registry (pyxis).")] = None,
    mount: Annotated[list[str] | None, _text("--mount", "FOLDER:/PATH", "Folder the container sees, beside this one.")] = None,
    image_home: Annotated[str, _text("--image-home", "/PATH", "megarl's checkout in the container.")] = "/opt/megarl",
    sweep: Annotated[list[str] | None, _text("--sweep", "a.b=c,d", "A run for each value: an array job.")] = None,
    at_once: Annotated[int | None, typer.Option(min=1, help="Runs of a sweep at once.", show_default=False)] = None,
    sbatch: Annotated[list[str] | None, _text("--sbatch", "OPTION=VALUE", "Any other option of sbatch.")] = None,
    warn_seconds: Annotated[int, typer.Option(min=1, help="Seconds before the time limit to save in.")] = 300,
    max_faults: Annotated[int, typer.Option(min=0, help="How often a job comes back after a fault.")] = 3,
    no_check: NoCheck = False,
    dry_run: DryRun = False,
) -> None:
    """Submit a run to SLURM: saved and requeued before its time limit and at preemption, and after a fault.

    Example: [bold]megarl launch slurm project.yaml --nodes 4 --time 4:00:00 --run sft,train[/bold]
    """
    found = _partitions(dry_run)
    if found and gpus_per_node is None:
        gpus_per_node = slurm.check(slurm.Wanted(1, 1, partition=partition), found).gpus
    plan = _plan(config, overrides, run, sweep or ())
    nodes, ranks_per_node = _size(plan, nodes, ranks_per_node or gpus_per_node or None)
    wanted = slurm.Wanted(nodes, ranks_per_node, gpus_per_node, cpus_per_rank, partition, account, time, image)
    where = slurm.check(wanted, found).name if found else "no cluster asked"
    _check_world(plan, nodes, ranks_per_node)
    job = Job(
        config=config.absolute(), overrides=(*_grace(plan, warn_seconds), *(overrides or ())), commands=plan.commands,
        run_dir=Path(plan.configs[0].run_dir).absolute(), nodes=nodes, ranks_per_node=ranks_per_node,
        gpus_per_node=gpus_per_node or 0, cpus_per_rank=cpus_per_rank, partition=partition, account=account, time=time,
        image=image, mounts=tuple(mount or ()), image_home=image_home, sweep=plan.sweep, at_once=at_once,
        sbatch=tuple(sbatch or ()), warn_seconds=warn_seconds, max_faults=max_faults, check=not no_check,
    )  # fmt: skip
    _check_files(plan, job)
    text = render.slurm_script(job)
    if found:
        _test(text, job.sbatch)
    if dry_run:
        print(text, end="")
        return
    script = _write(job.folder / "job.sbatch", text)
    number = slurm.submit(script)
    runs = f"{len(job.sweep)} runs on " if job.sweep else ""
    print(f"job {number}: {runs}{nodes} nodes x {ranks_per_node} ranks, partition {where}; script {script}; "
          f"output {job.folder}/{number}{'_*' if job.sweep else ''}.out")  # fmt: skip


@app.command(name="torchrun")
def launch_torchrun(
    config: ConfigFile,
    overrides: Overrides = None,
    run: Run = "train",
    nodes: Nodes = None,
    ranks_per_node: Ranks = None,
    master: Annotated[str, _text("--master", "HOST[:PORT]", "Address of the first node.")] = "127.0.0.1",
    run_id: Annotated[str, _text("--id", "NAME", "Of this start, the same on every node.")] = "megarl",
    max_restarts: Annotated[
        int | None, typer.Option(min=0, help="Restarts after a fault (default: parallel.max_restarts).", show_default=False)
    ] = None,
    no_check: NoCheck = False,
    dry_run: DryRun = False,
) -> None:
    """This node's part of a run by torchrun; give the same command on every node.

    Example: [bold]megarl launch torchrun project.yaml --nodes 2 --ranks-per-node 8 --master node1:29500[/bold]
    """
    plan = _plan(config, overrides, run, ())
    if nodes is not None and nodes > 1 and master.partition(":")[0] in ("127.0.0.1", "localhost"):
        raise BadInput(f"--master {master}: the other nodes cannot reach it; give the first node's name or address")
    host, _, port = master.partition(":")
    if port and not (port.isdigit() and 0 < int(port) < 65536):
        raise BadInput(f"--master {master}: {port} is no port; write HOST or HOST:PORT")
    nodes, ranks_per_node = _size(plan, nodes, ranks_per_node)
    _check_world(plan, nodes, ranks_per_node)
    job = Job(
        config=config.absolute(), overrides=tuple(overrides or ()), commands=plan.commands,
        run_dir=Path(plan.configs[0].run_dir).absolute(), nodes=nodes, ranks_per_node=ranks_per_node, check=not no_check,
    )  # fmt: skip
    restarts = plan.configs[0].parallel.max_restarts if max_restarts is None else max_restarts
    text = render.torchrun_script(job, host, int(port or 29500), restarts, run_id)
    if dry_run:
        print(text, end="")
        return
    script = _write(job.folder / f"{run_id}-{os.uname().nodename}-{os.getpid()}.sh", text)
    os.execvp("bash", ["bash", str(script)])


def _partitions(dry_run: bool) -> list[slurm.Partition]:
    """Those of the cluster; none where a script is only shown and there is no cluster."""
    try:
        return slurm.partitions()
    except BadInput as e:
        if not dry_run:
            raise
        print(f"note: not held against a cluster: {e}", file=sys.stderr)
        return []


@dataclass(frozen=True)
class _Plan:
    """What is to run: the commands, the settings of each array task, and the checked configuration of each run."""

    commands: tuple[str, ...]
    sweep: tuple[tuple[str, ...], ...]
    configs: list[Config]
    origins: Mapping[str, str]


def _plan(config: Path, overrides: list[str] | None, run: str, sweep: Sequence[str]) -> _Plan:
    commands = tuple(run.split(","))
    for command in commands:
        if command not in COMMANDS:
            raise BadInput(f"--run {run}: {command!r} is no command that runs on a cluster; give some of {', '.join(COMMANDS)}")
    tasks = render.sweep_tasks(sweep)
    configs, origins = [], {}
    for task in tasks or ((),):
        for command in commands:
            resolved = resolve(config, [*(overrides or ()), *task], require=COMMANDS[command])
        configs.append(resolved.config)
        origins = resolved.origins
    if tasks and len({one.run_dir for one in configs}) != 1:
        raise BadInput("--sweep run_dir: every run has a folder of its own already, named by its settings; sweep something else")
    return _Plan(commands, tasks, configs, origins)


def _size(plan: _Plan, nodes: int | None, ranks_per_node: int | None) -> tuple[int, int]:
    """(nodes, ranks on each), what is not given from the smallest world of the layout."""
    needed = max(one.parallel.nproc or smallest_world(one) for one in plan.configs)
    ranks_per_node = ranks_per_node or math.ceil(needed / (nodes or 1))
    return nodes or math.ceil(needed / ranks_per_node), ranks_per_node


def _check_world(plan: _Plan, nodes: int, ranks_per_node: int) -> None:
    for one in plan.configs:
        try:
            check_world(one, nodes * ranks_per_node, "rl" if "train" in plan.commands else None)
        except BadInput as e:
            raise BadInput(f"--nodes {nodes} x --ranks-per-node {ranks_per_node} = {nodes * ranks_per_node} ranks: {e}") from None


def _grace(plan: _Plan, warn_seconds: int) -> list[str]:
    """A warning leaves the ranks almost all of its time, unless the user says how much."""
    if "log.warned_grace_seconds" in plan.origins:
        return []
    return [f"log.warned_grace_seconds={max(1, int(0.9 * warn_seconds))}"]


def _check_files(plan: _Plan, job: Job) -> None:
    """Every run's folder is free or to be continued, and what ranks read is seen where they run."""
    seen = [job.config, job.run_dir]
    for one, folder in zip(plan.configs, render.run_dirs(job), strict=True):
        for command in plan.commands:
            check_run_dir(one.model_copy(update={"run_dir": str(folder)}), COMMANDS[command])
        seen.append(Path(one.model.path).absolute())
    render.check_mounts(job, seen)


def _test(text: str, options: Sequence[str]) -> None:
    """What only the controller knows: features, reservations, quality of service, licences, limits of a user."""
    with tempfile.TemporaryDirectory(prefix="megarl-") as folder:
        try:
            slurm.test_submission(_write(Path(folder) / "job.sbatch", text))
        except BadInput as e:
            given = " ".join(f"--sbatch {one}" for one in options)
            raise BadInput(f"{e}" + (f"; change or leave out {given}" if given else "")) from None


def _write(script: Path, text: str) -> Path:
    try:
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text(text)
    except OSError as e:
        raise BadInput(f"{script}: cannot be written ({e.strerror}); set another run_dir") from None
    return script
