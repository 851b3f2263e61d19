"""The real commands on one GPU: a warm start, RL steps with vLLM beside the learner, and going on after a stop."""

from __future__ import annotations

import pytest
import torch

from megarl.rollout.weight_sync import THRESHOLDS
from tests.e2e.program import STEPS, Project

ONE = {"parallel": {"ep": 1, "nproc": 1}}


@pytest.mark.timeout(2400)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rl_steps_and_going_on(tmp_path, dtype, record_property):
    project = Project.create(tmp_path, **ONE)
    for command, *changes in (("sft",), ("train",), ("train", f"rl.steps={STEPS + 2}", "resume=auto")):
        done = project.megarl(command, project.config, f"model.dtype={dtype}", *changes)
        assert done.returncode == 0, done.stderr
    rows = [row for row in project.rows() if row["step"] > 0]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 3))
    assert max(row["sync/gap_mean"] for row in rows) <= THRESHOLDS[dtype]
    assert all(row["memory/device_peak_gib"] > 0 for row in rows)
    record_property("log-prob gap, mean", f"{max(row['sync/gap_mean'] for row in rows):.1e}")
    record_property("seconds a step", f"{min(row['time/step'] for row in rows):.2f}")


@pytest.mark.timeout(1000)
@pytest.mark.parametrize("command", ["sync", "routing", "precision", "conversion"])
def test_verifications(tmp_path, command, record_property):
    project = Project.create(tmp_path, **ONE)
    if command == "conversion":
        made = project.megarl("verify", "precision", project.config)  # any command makes the model
        assert made.returncode == 0, made.stderr
        done = project.megarl("verify", "conversion", project.model, "--nproc", 1)
    else:
        done = project.megarl("verify", command, project.config)
    record_property("last line", (done.stdout.splitlines() or [""])[-1])
    assert done.returncode == 0, done.stderr


@pytest.mark.timeout(600)
def test_more_ranks_than_gpus_are_refused(tmp_path):
    count = torch.cuda.device_count() + 1
    project = Project.create(tmp_path, parallel={"nproc": count})
    done = project.megarl("sft", project.config)
    assert done.returncode == 2 and f"there are {count - 1}" in done.stderr
