"""`megarl launch slurm` on a real controller with two real nodes, all on this machine."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from tests.cluster.jobs import Job, launch
from tests.cluster.slurm import Cluster
from tests.e2e.program import Project
from tests.faults.kills import differences

TWO_NODES = ("--nodes", 2, "--ranks-per-node", 1)

REFUSED = {  # options -> what the line must say
    ("--partition", "gpu"): "--partition gpu: this cluster has no such partition; set one of main (default), one, urgent",
    ("--nodes", 3, "--ranks-per-node", 2): "--nodes 3: partition main has 2; set --nodes 2 or less",
    ("--nodes", 2, "--partition", "one"): "--nodes 2: partition one has 1; set --nodes 1 or less, or --partition main or urgent",
    ("--nodes", 1, "--ranks-per-node", 3): "--nodes 1 x --ranks-per-node 3 = 3 ranks: ",
    ("--gpus-per-node", 8): "--gpus-per-node 8: nodes of partition main have none; set --gpus-per-node 0",
    ("--ranks-per-node", 8): "--ranks-per-node 8 x --cpus-per-rank 1 = 8 cores: nodes of partition main have 4",
    ("--time", "2:00:00", "--partition", "one"): "--time 2:00:00: partition one allows 01:00:00 at most",
    ("--time", "soon"): "--time soon: not a time",
    ("--account", "lab"): "--account lab: this cluster keeps no accounts",
    ("--image", "/nowhere/megarl.sqsh"): "--image /nowhere/megarl.sqsh: no such file",
    ("--image", "docker://megarl"): "--image docker://megarl: srun has no --container-image here",
    ("--mount", "/data:/data"): "--mount /data:/data: there is no container",
    ("--sbatch", "constraint=h100"): "sbatch: ",
    ("--sbatch", "reservation=ours"): "sbatch: ",
    ("--sbatch", "no-such-option=1"): "sbatch: ",
    ("--sbatch", "gres=gpu:4"): "sbatch: ",
    ("--sweep", "seed"): "--sweep seed: not a setting with values",
    ("--run", "fit"): "--run fit: 'fit' is no command",
}


def test_what_the_cluster_lacks_is_refused_in_one_line_before_submission(
    cluster: Cluster, warm: Project, tmp_path: Path
) -> None:
    for options, expected in REFUSED.items():
        done = launch(cluster, warm.config, f"run_dir={tmp_path}/run", "--run", "sft", *options)
        assert (done.returncode, done.stdout) == (2, ""), (options, done)
        assert done.stderr.startswith(f"error: {expected}") and done.stderr.count("\n") == 1, (options, done.stderr)
    done = launch(cluster, warm.config, "--run", "sft", *TWO_NODES)  # its run_dir holds a run
    assert done.returncode == 2 and "already holds a run" in done.stderr
    assert cluster.run("squeue", "-h").stdout == "" and list(tmp_path.iterdir()) == []


def test_a_dry_run_shows_a_script_that_sbatch_takes(cluster: Cluster, warm: Project, tmp_path: Path) -> None:
    done = launch(cluster, warm.config, f"run_dir={tmp_path}/run", "--run", "sft", *TWO_NODES, "--dry-run")
    assert done.returncode == 0 and done.stdout.startswith("#!/usr/bin/env bash\n#SBATCH --job-name=run\n")
    assert list(tmp_path.iterdir()) == [], "a dry run writes nothing"
    (tmp_path / "job.sbatch").write_text(done.stdout)
    assert cluster.run("sbatch", "--test-only", tmp_path / "job.sbatch").returncode == 0


def test_a_run_on_two_nodes_is_warned_then_loses_a_node_and_ends_as_if_undisturbed(
    cluster: Cluster, warm: Project, tmp_path: Path
) -> None:
    run_dir, rows = tmp_path / "run", tmp_path / "run/sft/metrics.jsonl"
    job = Job(cluster, warm.config, f"run_dir={run_dir}", "checkpoint.every=20", "--run", "sft", *TWO_NODES)
    job.until_step(rows, 5)
    assert cluster.run("scancel", "--batch", "--signal=USR1", job.number).returncode == 0
    job.until_requeued(1)
    saved = [int(path.name.removeprefix("step_")) for path in (run_dir / "sft/checkpoints").iterdir()]
    assert len(saved) == 1 and saved[0] % 20 and saved[0] >= 5
    job.until_step(rows, 45)
    job.kill_step_on("n1")
    job.until_requeued(2)
    assert job.end() == "COMPLETED", job.said()
    said = job.said()
    assert "nodes: 2 well, 2 ranks, " in said
    assert "sft: stopped by USR1; requeued, goes on with resume=auto" in said
    assert "error: rank 1: died by SIGKILL on node n1\n" in said
    assert re.search(r"error: rank 0: sft step \d+, [\w ]+: a collective lost a peer", said)
    assert "sft: fault 1 of at most 3; requeued, goes on with resume=auto" in said
    assert [f"sft: resumed after step {step} " in said for step in (saved[0], 40)] == [True, True]
    assert differences(run_dir / "sft", warm.run / "sft") == []
    assert not (Path(tempfile.gettempdir()) / f"megarl-{job.number}").exists()
