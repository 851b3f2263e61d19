"""What a long life brings a SLURM job: RL, time limits, preemption, sweeps, bad nodes, cancellation. Minutes."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.cluster.jobs import Job, launch
from tests.cluster.slurm import Cluster
from tests.e2e.program import Project
from tests.faults.kills import differences

TWO_NODES = ("--nodes", 2, "--ranks-per-node", 1)
pytestmark = pytest.mark.slow


def test_rl_on_two_nodes_is_warned_then_loses_a_node_and_ends_as_if_undisturbed(
    cluster: Cluster, trained: Project, tmp_path: Path
) -> None:
    run_dir, rows = tmp_path / "run", tmp_path / "run/rl/metrics.jsonl"
    shutil.copytree(trained.run / "sft", run_dir / "sft")
    job = Job(cluster, trained.config, f"run_dir={run_dir}", "checkpoint.every=2", *TWO_NODES)
    job.until_step(rows, 1)
    assert cluster.run("scancel", "--signal=USR1", job.number).returncode == 0  # to every process of the step
    job.until_requeued(1)
    assert "train: stopped by a signal; requeued" in job.said()
    job.until_step(rows, 4)
    job.kill_step_on("n1")
    job.until_requeued(2)
    assert job.end() == "COMPLETED", job.said()
    assert "train: fault 1 of at most 3; requeued" in job.said()
    assert differences(run_dir / "rl", trained.run / "rl") == []


def test_a_job_with_more_urgent_ones_beside_it_saves_waits_and_goes_on(
    cluster: Cluster, warm: Project, tmp_path: Path
) -> None:
    run_dir, rows = tmp_path / "run", tmp_path / "run/sft/metrics.jsonl"
    job = Job(cluster, warm.config, f"run_dir={run_dir}", "checkpoint.every=0", "--run", "sft", *TWO_NODES)
    job.until_step(rows, 10)
    urgent = cluster.run("sbatch", "--parsable", "-p", "urgent", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
    assert urgent.returncode == 0
    job.until_requeued(1)
    assert job.end() == "COMPLETED", job.said()
    assert "sft: stopped by TERM; requeued" in job.said() or "sft: stopped by a signal; requeued" in job.said()
    assert re.search(r"sft: resumed after step \d+ ", job.said())
    assert differences(run_dir / "sft", warm.run / "sft") == []


def test_before_its_time_limit_a_job_saves_and_requeues_and_a_cancelled_one_does_not(
    cluster: Cluster, warm: Project, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    settings = ("sft.steps=5000", "checkpoint.every=0", f"run_dir={run_dir}")
    job = Job(cluster, warm.config, *settings, "--run", "sft", *TWO_NODES, "--time", "2", "--warn-seconds", 20)
    job.until_requeued(1)
    assert "sft: stopped by USR1; requeued" in job.said() and "stopped after step" in job.said()
    job.until_step(run_dir / "sft/metrics.jsonl", 1)
    job.until(lambda: "sft: resumed after step" in job.said())
    assert cluster.run("scancel", job.number).returncode == 0
    assert job.end() == "CANCELLED", job.said()
    assert cluster.job(job.number)["Restarts"] == "1"


def test_a_sweep_is_an_array_of_runs(cluster: Cluster, warm: Project, tmp_path: Path) -> None:
    run_dir = tmp_path / "sweep"
    job = Job(cluster, warm.config, f"run_dir={run_dir}", "--run", "sft", "--ranks-per-node", 2, "--sweep", "seed=3,4")
    second = Job.of_array(job, 1)
    job.until(lambda: (run_dir / "seed=4/sft/checkpoints").exists())
    assert cluster.run("scancel", "--batch", "--signal=USR1", second.number).returncode == 0
    second.until_requeued(1)
    job.until(lambda: len(job.states()) == 2 and set(job.states()) == {"COMPLETED"}, 200)
    assert "sft: stopped by USR1; requeued" in second.said() and "sft: resumed after step" in second.said()
    assert sorted(path.name for path in run_dir.iterdir()) == ["launch", "seed=3", "seed=4"]
    assert differences(run_dir / "seed=3/sft", warm.run / "sft") == [], "the project's own seed is 3"
    assert differences(run_dir / "seed=4/sft", warm.run / "sft") != []
    assert sorted(path.name for path in run_dir.glob("launch/*.out")) == [f"{job.number}_{task}.out" for task in (0, 1)]


def test_bad_nodes_are_named_and_the_run_does_not_start(cluster: Cluster, warm: Project, tmp_path: Path) -> None:
    settings = (f"run_dir={tmp_path}/run", "--run", "sft", *TWO_NODES, "--max-faults", 0)
    cluster.env["MEGARL_CHECK_FREE"] = "1.5"
    try:
        job = Job(cluster, warm.config, *settings)
        assert job.end() == "FAILED"
    finally:
        del cluster.env["MEGARL_CHECK_FREE"]
    assert re.findall(r"^error: node (n\d): rank", job.said(), re.MULTILINE) == ["n0", "n1"], job.said()
    assert cluster.job(job.number)["ExitCode"] == "1:0" and not (tmp_path / "run/sft").exists()


def test_bad_input_that_only_ranks_can_see_is_not_tried_again(cluster: Cluster, warm: Project, tmp_path: Path) -> None:
    job = Job(cluster, warm.config, f"run_dir={tmp_path}/run", "sft.max_tokens=2", "--run", "sft", *TWO_NODES, "--no-check")
    assert job.end() == "FAILED"
    assert cluster.job(job.number)["ExitCode"] == "2:0" and cluster.job(job.number)["Restarts"] == "0", job.said()
    assert "sft: bad input, see above; not requeued" in job.said() and "error: rank " in job.said()


def test_a_job_without_a_launch_folder_to_write_to_is_refused(cluster: Cluster, warm: Project, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = launch(cluster, warm.config, f"run_dir={tmp_path}/file/run", "--run", "sft", *TWO_NODES)
    assert done.returncode == 2 and "cannot be written" in done.stderr and done.stderr.count("\n") == 1
