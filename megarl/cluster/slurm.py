"""What a SLURM cluster has, asked from its controller, and every option of a job held against it before submission."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from megarl.errors import BadInput

PATIENCE = 60  # seconds for an answer of the controller


@dataclass(frozen=True)
class Partition:
    """Of a cluster: `max_seconds` none where jobs have no limit; GPUs and cores of its best equipped nodes."""

    name: str
    default: bool
    up: bool
    max_seconds: int | None
    nodes: int
    cpus: int
    gpus: int

    def describe(self) -> str:
        return f"{self.name}{' (default)' if self.default else ''}"


@dataclass(frozen=True)
class Wanted:
    """What a job asks of the cluster; None: not asked for."""

    nodes: int
    ranks_per_node: int
    gpus_per_node: int | None = None
    cpus_per_rank: int | None = None
    partition: str | None = None
    account: str | None = None
    time: str | None = None
    image: str | None = None


def ask(*command: str) -> str:
    """The output of one of SLURM's commands. Raises `BadInput` with its own words when it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    except FileNotFoundError:
        raise BadInput(f"{command[0]}: not installed here; submit from a login node, or see the script with --dry-run") from None
    except subprocess.TimeoutExpired:
        raise BadInput(f"{command[0]}: no answer in {PATIENCE} s; the controller is down or SLURM_CONF is wrong") from None
    if done.returncode:
        raise BadInput(_complaint(command[0], done.stderr))
    return done.stdout


def _complaint(program: str, text: str) -> str:
    """Of all that a command said on stderr, the line that says why."""
    lines = [re.sub(r"^\w+: (error: |fatal: )?", "", line).strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("Try ")]
    return f"{program}: {lines[-1] if lines else 'failed without a word'}"


def partitions() -> list[Partition]:
    """Those of the cluster. Raises `BadInput` when its controller does not answer."""
    found: dict[str, Partition] = {}
    for line in ask("sinfo", "-h", "-e", "-o", "%P|%a|%l|%D|%c|%G").splitlines():
        name, state, limit, nodes, cpus, gres = line.strip().split("|")
        one = Partition(name.rstrip("*"), name.endswith("*"), state == "up", seconds(limit), int(nodes),
                        int(cpus.rstrip("+")), gpus_in(gres))  # fmt: skip
        before = found.get(one.name, one)
        total = one.nodes + (before.nodes if before is not one else 0)
        found[one.name] = Partition(one.name, one.default, one.up, one.max_seconds, total, max(one.cpus, before.cpus),
                                    max(one.gpus, before.gpus))  # fmt: skip
    return list(found.values())


def gpus_in(gres: str) -> int:
    """GPUs of a node, from `gpu:h100:8(S:0-1),nvme:1`."""
    return sum(int(count) for count in re.findall(r"(?:^|,)gpu(?::[^:,()]+)?:(\d+)", gres))


def seconds(limit: str) -> int | None:
    """A time as SLURM writes it (minutes, m:s, h:m:s, d-h, d-h:m, d-h:m:s) in seconds; None: infinite.

    Raises `BadInput` for what is none.
    """
    if limit.lower() in ("infinite", "unlimited", "n/a"):
        return None
    days, dash, rest = limit.rpartition("-")
    parts = rest.split(":")
    if not all(part.isdigit() for part in (*parts, *([days] if dash else []))) or len(parts) > 3:
        raise BadInput(f"--time {limit}: not a time; write minutes, hours:minutes:seconds or days-hours:minutes:seconds")
    numbers = [int(part) for part in parts]
    if dash:
        hours, minutes, secs = (*numbers, 0, 0)[:3]
    else:
        hours, minutes, secs = {1: (0, numbers[0], 0), 2: (0, *numbers), 3: tuple(numbers)}[len(numbers)]
    return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + secs


def check(wanted: Wanted, found: list[Partition]) -> Partition:
    """The partition the job will run in. Raises `BadInput` for the first thing the cluster does not have."""
    partition = _partition(wanted, found)
    where = f"partition {partition.name}"
    if wanted.nodes > partition.nodes:
        raise BadInput(f"--nodes {wanted.nodes}: {where} has {partition.nodes}; set --nodes {partition.nodes} or less"
                       + _roomier(found, wanted.nodes))  # fmt: skip
    if (wanted.gpus_per_node or 0) > partition.gpus:
        has = f"at most {partition.gpus}" if partition.gpus else "none"
        raise BadInput(f"--gpus-per-node {wanted.gpus_per_node}: nodes of {where} have {has}; "
                       f"set --gpus-per-node {partition.gpus}, or another partition")  # fmt: skip
    cpus = wanted.ranks_per_node * (wanted.cpus_per_rank or 1)
    if cpus > partition.cpus:
        raise BadInput(f"--ranks-per-node {wanted.ranks_per_node} x --cpus-per-rank {wanted.cpus_per_rank or 1} = {cpus} "
                       f"cores: nodes of {where} have {partition.cpus}; set fewer")  # fmt: skip
    if wanted.time is not None:
        asked, most = seconds(wanted.time), partition.max_seconds
        if most is not None and (asked is None or asked > most):
            raise BadInput(f"--time {wanted.time}: {where} allows {_clock(most)} at most; "
                           "set no more: the job is requeued and goes on")  # fmt: skip
    if wanted.account is not None:
        _check_account(wanted.account)
    if wanted.image is not None:
        _check_image(wanted.image)
    return partition


def _partition(wanted: Wanted, found: list[Partition]) -> Partition:
    names = ", ".join(one.describe() for one in found) or "none"
    if wanted.partition is None:
        default = [one for one in found if one.default]
        if not default:
            raise BadInput(f"--partition: not given, and this cluster has no default; set one of {names}")
        return default[0]
    chosen = [one for one in found if one.name == wanted.partition]
    if not chosen:
        raise BadInput(f"--partition {wanted.partition}: this cluster has no such partition; set one of {names}")
    if not chosen[0].up:
        raise BadInput(f"--partition {wanted.partition}: it is down; set another of {names}")
    return chosen[0]


def _roomier(found: list[Partition], nodes: int) -> str:
    names = [one.name for one in found if one.nodes >= nodes]
    return f", or --partition {' or '.join(names)}" if names else ""


def _clock(total: int) -> str:
    days, rest = divmod(total, 86400)
    return (f"{days}-" if days else "") + f"{rest // 3600:02d}:{rest % 3600 // 60:02d}:{rest % 60:02d}"


def _check_account(account: str) -> None:
    storage = re.search(r"AccountingStorageType\s*=\s*(\S+)", ask("scontrol", "show", "config"))
    if storage is None or storage[1] == "accounting_storage/none":
        raise BadInput(f"--account {account}: this cluster keeps no accounts; leave --account out")
    listed = ask("sacctmgr", "-nP", "show", "assoc", "format=account", "where", f"user={_user()}").split()
    if listed and account not in listed:
        raise BadInput(f"--account {account}: you have no such account here; set one of {', '.join(sorted(set(listed)))}")


def _user() -> str:
    import getpass

    return getpass.getuser()


def _check_image(image: str) -> None:
    looks_local = image.startswith(("/", "./", "../", "~")) or image.endswith((".sqsh", ".sif"))
    if looks_local and not Path(image).expanduser().is_file():
        raise BadInput(f"--image {image}: no such file; enroot import makes one from a container image")
    if "--container-image" not in ask("srun", "--help"):
        raise BadInput(f"--image {image}: srun has no --container-image here (pyxis is not installed); leave --image out")


def test_submission(script: Path) -> None:
    """Have the controller look at the job without taking it. Raises `BadInput` with its words when it would not."""
    ask("sbatch", "--test-only", str(script))


def submit(script: Path) -> str:
    """The number of the job that the script has become."""
    return ask("sbatch", "--parsable", str(script)).strip().partition(";")[0]
