"""`megarl train` with an engine whose replicas share their experts: an odd number of prompts for two of them."""

from __future__ import annotations

import json

import pytest

from tests.e2e.program import Project


@pytest.mark.slow  # tests/dist/test_rollout_layouts.py has the trainer's own sampling, and the sync, in this layout
def test_replicas_that_decode_in_lock_step(branch: Project) -> None:
    layout = ["rollout.data_parallel=2", "rollout.expert_parallel=true"]
    size = ["rl.prompts_per_step=3", "rl.optimizer_steps_per_rollout=1", "rl.steps=2"]
    done = branch.megarl("train", branch.config, *layout, *size)
    assert done.returncode == 0, done.stderr
    for step, row in enumerate(branch.rows()[1:], start=1):
        assert row["sync/gap_mean"] <= 1e-5 and row["gap/logprob_mean"] <= 1e-5
        lines = (branch.run / f"rl/rollouts/step_{step:06d}.jsonl").read_text().splitlines()
        samples = [(one["group_id"], one["sample_index"]) for one in map(json.loads, lines)]
        assert len(set(samples)) == len(samples) == 3 * 4
