"""What `megarl launch` and the check of the nodes decide, without a cluster."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megarl.cluster import health, render, slurm
from megarl.cluster.health import GIB, Limits, Report, faults, rounds
from megarl.cluster.interface import interface_to
from megarl.cluster.peers import lost
from megarl.errors import BadInput

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
PARTITIONS = [
    slurm.Partition("gpu", False, True, 86400, 16, 64, 8),
    slurm.Partition("old", False, False, None, 4, 16, 4),
    slurm.Partition("cpu", True, True, None, 32, 32, 0),
]


def job(tmp_path: Path, **changes) -> render.Job:
    given = {"config": tmp_path / "c.yaml", "overrides": ("seed=2",), "commands": ("sft", "train"),
             "run_dir": tmp_path / "run", "nodes": 2, "ranks_per_node": 8, **changes}  # fmt: skip
    return render.Job(**given)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("5", 300), ("5:30", 330), ("1:00:00", 3600), ("1-12", 129600), ("2-0:30", 174600), ("1-0:0:5", 86405), ("infinite", None)],
)
def test_times_are_read_as_slurm_reads_them(text: str, expected: int | None) -> None:
    assert slurm.seconds(text) == expected


@pytest.mark.parametrize("text", ["", "soon", "1:2:3:4", "-5", "1-", "1.5"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="not a time"):
        slurm.seconds(text)


@pytest.mark.parametrize(
    ("gres", "count"),
    [("(null)", 0), ("gpu:8", 8), ("gpu:h100:8(S:0-1)", 8), ("gpu:h100:4,gpu:a100:2", 6), ("nvme:1,gpu:2", 2), ("mygpu:3", 0)],
)
def test_gpus_of_a_node(gres: str, count: int) -> None:
    assert slurm.gpus_in(gres) == count


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"partition": "old"}, "it is down"),
        ({"gpus_per_node": 4}, "nodes of partition cpu have none; set --gpus-per-node 0"),
        ({"partition": "gpu", "gpus_per_node": 16}, "have at most 8; set --gpus-per-node 8"),
        ({"partition": "gpu", "nodes": 17}, "partition gpu has 16; set --nodes 16 or less, or --partition cpu"),
        ({"partition": "gpu", "time": "1-1"}, "allows 1-00:00:00 at most"),
        ({"partition": "gpu", "time": "infinite"}, "allows 1-00:00:00 at most"),
        ({"cpus_per_rank": 5}, "= 40 cores: nodes of partition cpu have 32"),
    ],
)
def test_what_a_partition_lacks_is_refused(changes: dict, line: str) -> None:
    with pytest.raises(BadInput, match=line):
        slurm.check(replace(slurm.Wanted(2, 8), **changes), PARTITIONS)


def test_a_job_that_fits_has_its_partition() -> None:
    assert slurm.check(slurm.Wanted(32, 8), PARTITIONS).name == "cpu"
    assert slurm.check(slurm.Wanted(16, 8, 8, 8, "gpu", time="1-0"), PARTITIONS).name == "gpu"
    with pytest.raises(BadInput, match="no default; set one of gpu, old"):
        slurm.check(slurm.Wanted(1, 1), PARTITIONS[:2])


def test_a_sweep_is_every_combination() -> None:
    tasks = render.sweep_tasks(["a.lr=1e-5,3e-5", "b=[1,2],[3]", "c='x,y'"])
    assert tasks == tuple(itertools.product(["a.lr=1e-5", "a.lr=3e-5"], ["b=[1,2]", "b=[3]"], ["c='x,y'"]))
    assert render.sweep_tasks([]) == ()


@pytest.mark.parametrize("sweep", [["a"], ["a="], ["a=1,"], ["=1,2"], ["a=1,1"], ["a=1", "a=2"]])
def test_what_is_no_sweep_is_refused(sweep: list[str]) -> None:
    with pytest.raises(BadInput, match="--sweep"):
        render.sweep_tasks(sweep)


def test_runs_of_a_sweep_have_folders_of_their_own(tmp_path: Path) -> None:
    one = job(tmp_path, sweep=render.sweep_tasks(["rl.optimizer.lr=1e-5,3e-5", "model.path=a/b,c"]))
    folders = render.run_dirs(one)
    assert len(set(folders)) == 4 and all(folder.parent == one.run_dir for folder in folders)
    assert folders[0].name == "lr=1e-5,path=a_b"


def test_every_option_of_a_job_is_in_its_script_and_the_users_own_wins(tmp_path: Path) -> None:
    one = job(tmp_path, gpus_per_node=8, cpus_per_rank=6, partition="gpu", account="lab", time="4:00:00",
              sbatch=("qos=high", "--job-name=mine", "exclusive"), overrides=("x=a b",))  # fmt: skip
    text = render.slurm_script(one)
    options = [line for line in text.splitlines() if line.startswith("#SBATCH ")]
    for option in ("nodes=2", "ntasks-per-node=8", "gpus-per-node=8", "cpus-per-task=6", "partition=gpu", "account=lab",
                   "time=4:00:00", "signal=B:USR1@300", "requeue", "qos=high", "job-name=mine", "exclusive"):  # fmt: skip
        assert options.count(f"#SBATCH --{option}") == 1, option
    assert len([line for line in options if "job-name" in line]) == 1
    assert text.index("#SBATCH --exclusive") < text.index("export ")  # sbatch reads no option after the first command
    assert f"set -- {one.config} 'x=a b'\n" in text
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_ranks_in_a_container_start_from_its_own_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    one = job(tmp_path, image="megarl.sqsh", mounts=(f"{tmp_path}:/data",))
    text = render.slurm_script(one)
    assert "export MEGARL_LAUNCH=/opt/megarl/launch\n" in text and "export PYTHON=python3\n" in text
    assert f"--container-image=megarl.sqsh --container-mounts={tmp_path}:{tmp_path},{tmp_path}:/data " in text
    render.check_mounts(one, [one.config, Path("/data/model")])
    for paths, mounts, line in (([Path("/elsewhere/model")], (), "/elsewhere/model: not seen in the container"),
                                ([], ("/nowhere:/data",), "--mount /nowhere:/data"), ([], ("x",), "--mount x")):  # fmt: skip
        with pytest.raises(BadInput, match=line):
            render.check_mounts(replace(one, mounts=mounts), paths)


def test_the_scripts_are_bash(tmp_path: Path) -> None:
    for script in ("environment.sh", "rank.sh", "torchrun.sh", "slurm.sbatch"):
        subprocess.run(["bash", "-n", str(LAUNCH / script)], check=True)
    text = render.torchrun_script(job(tmp_path), "10.0.0.1", 29500, 3, "a b")
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    assert text.count("--no-check") == 1, "the second command finds nodes that were looked at"


def test_a_rank_has_its_environment_from_one_place_and_what_is_set_wins(tmp_path: Path) -> None:
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "VLLM_HOST_IP", "OMP_NUM_THREADS", "NCCL_DEBUG", "TMPDIR",
             "VLLM_CACHE_ROOT")  # fmt: skip
    script = f"source {LAUNCH}/environment.sh && printenv {' '.join(names)}"
    env = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, "PYTHONPATH": str(LAUNCH.parent), "TMPDIR": str(tmp_path),
           "MASTER_ADDR": "127.0.0.1", "LOCAL_WORLD_SIZE": "1000", "NCCL_DEBUG": "INFO", "MEGARL_JOB_ID": "7"}  # fmt: skip
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, check=True)
    expected = ["lo", "lo", "127.0.0.1", "1", "INFO", f"{tmp_path}/megarl-7", f"{tmp_path}/vllm_{os.getuid()}"]
    assert done.stdout.split() == expected
    assert (tmp_path / "megarl-7").is_dir()
    done = subprocess.run(["bash", "-c", script], env={**env, "MASTER_ADDR": "no-such.invalid"}, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: no-such.invalid: no way there from "), done


def reports(nodes: int, per_node: int, **changes) -> list[Report]:
    """Of nodes that are well: 10 GB/s within and between them."""
    world = nodes * per_node
    pairs = [pair for one in rounds(world, per_node) for pair in one]
    found = []
    for rank in range(world):
        speeds = {sum(pair) - rank: 10.0 for pair in pairs if rank in pair}
        found.append(Report(rank, f"n{rank // per_node}", "", per_node, per_node, 78 * GIB, 80 * GIB, 0.0, speeds))
    return found


@pytest.mark.parametrize(("nodes", "per_node"), [(1, 1), (1, 8), (2, 1), (2, 8), (3, 2), (5, 1), (16, 8)])
def test_every_rank_is_measured_and_never_with_two_at_once(nodes: int, per_node: int) -> None:
    found = rounds(nodes * per_node, per_node)
    for pairs in found:
        ranks = [rank for pair in pairs for rank in pair]
        assert len(ranks) == len(set(ranks))
    pairs = [pair for one in found for pair in one]
    assert len(pairs) == len(set(pairs))
    if nodes * per_node > 1:
        assert {rank for pair in pairs for rank in pair} == set(range(nodes * per_node))
    between = {rank // per_node for a, b in pairs if a // per_node != b // per_node for rank in (a, b)}
    assert between == (set(range(nodes)) if nodes > 1 else set())


@pytest.mark.parametrize(("nodes", "per_node"), [(1, 1), (2, 1), (2, 8), (5, 2)])
def test_nodes_that_are_well_are_not_accused(nodes: int, per_node: int) -> None:
    found = reports(nodes, per_node)
    assert faults(found, Limits()) == []
    assert health.summary(found).startswith(f"nodes: {nodes} well, {nodes * per_node} ranks")


@pytest.mark.parametrize("bad", range(5))
def test_the_bad_node_is_named_and_no_other(bad: int) -> None:
    """Whatever is wrong with it, and also where all of its neighbours' measurements with it are slow."""
    well = reports(5, 2)

    def spoilt(**changes) -> list[Report]:
        return [replace(one, **changes) if one.node == f"n{bad}" else one for one in well]

    nodes = {one.rank: one.node for one in well}
    slow = [
        replace(one, bandwidth={other: 0.5 if f"n{bad}" in (one.node, nodes[other]) and one.node != nodes[other] else speed
                                for other, speed in one.bandwidth.items()})
        for one in well
    ]  # fmt: skip
    for found in (spoilt(free=40 * GIB), spoilt(clock=-3.0), spoilt(devices=1), slow):
        lines = faults(found, Limits())
        assert lines and all(line.startswith(f"node n{bad}: ") for line in lines), lines


def test_two_slow_nodes_are_measured_against_the_least() -> None:
    well = reports(2, 1)
    slow = [replace(one, bandwidth={other: 0.001 for other in one.bandwidth}) for one in well]
    assert [line.partition(":")[0] for line in faults(slow, Limits())] == ["node n0", "node n1"]


def test_limits_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGARL_CHECK_SKEW", "5")
    assert Limits.from_environment(free=0.1) == Limits(skew=5.0, free=0.1)
    monkeypatch.setenv("MEGARL_CHECK_SKEW", "wide")
    with pytest.raises(BadInput, match="MEGARL_CHECK_SKEW = 'wide'"):
        Limits.from_environment()


def test_the_way_to_an_address() -> None:
    assert interface_to("127.0.0.1") == ("lo", "127.0.0.1", True)
    assert interface_to("127.0.0.5")[0] == "lo"
    with pytest.raises(BadInput, match="no way there"):
        interface_to("no-such-host.invalid")


def test_a_node_that_refuses_a_connection_is_not_lost() -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        nodes = {"here": {"address": "127.0.0.1", "ranks": [0]}, "there": {"address": "127.0.0.1", "ranks": [1]}}
        assert lost(nodes, "here") == []


def test_without_slurm_a_script_is_shown_but_nothing_is_submitted(tmp_path: Path) -> None:
    config = LAUNCH.parent / "configs/cpu/quickstart.yaml"
    command = [sys.executable, "-m", "megarl", "launch", "slurm", str(config), f"run_dir={tmp_path}/run", "--nodes", "2"]
    (tmp_path / "bin").mkdir()
    env = {**os.environ, "PATH": str(tmp_path / "bin"), "PYTHONPATH": str(LAUNCH.parent)}
    done = subprocess.run([*command, "--run", "sft"], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: sinfo: not installed here; submit from a login node, or see the script with --dry-run\n"
    done = subprocess.run([*command, "--run", "sft", "--dry-run"], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=1\n" in done.stdout
    assert done.stderr.startswith("note: not held against a cluster: sinfo: not installed here")
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"nodes": 2}, "--master 127.0.0.1: the other nodes cannot reach it"),
        ({"master": "host:x"}, "--master host:x: x is no port"),
        ({"nodes": 3, "ranks_per_node": 1, "master": "n1"}, "--nodes 3 x --ranks-per-node 1 = 3 ranks: "),
    ],
)
def test_torchrun_with_what_cannot_work_is_refused(options: dict, line: str, tmp_path: Path) -> None:
    from megarl.cluster.command import launch_torchrun

    with pytest.raises(BadInput, match=line):
        launch_torchrun(LAUNCH.parent / "configs/cpu/quickstart.yaml", [f"run_dir={tmp_path}/run"], run="sft", **options)
