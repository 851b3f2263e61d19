"""`megarl study drift` as a user runs it: two arms, their results, and what a second start makes again."""

from __future__ import annotations

import json
import math

import pytest

from megarl.study.statistics import column
from tests.e2e.program import Project

STUDY = [
    "study.methods={grpo: {preset: grpo, kl: {coef: 0}}}", "study.routing_replay=[none, rollout]", "rl.init_from=model",
    "rl.steps=2", "rl.optimizer_steps_per_rollout=4", "rollout.dtype=bfloat16",
    "rollout.sync_threshold=1", "log.tensorboard=false",
]  # fmt: skip
MEASURED = ["std_live", "std_replayed", "std_difference", "seq_std_live", "within_live"]


@pytest.mark.slow
def test_a_study_of_two_arms(tmp_path):
    project = Project.create(tmp_path)
    arguments = ("study", "drift", project.config, "--seeds", 1, *STUDY, f"study.results={tmp_path}/out")
    done = project.megarl(*arguments)
    assert done.returncode == 0, done.stderr
    assert "1 of 1 seeds" in done.stdout
    rows = {}
    for arm in ("grpo-none", "grpo-rollout"):
        lines = (project.run / arm / "seed_3" / "rl" / "metrics.jsonl").read_text().splitlines()
        rows[arm] = [row for row in map(json.loads, lines) if row["step"]]
        for name in MEASURED:
            assert len(column(rows[arm], f"routing/log_ratio_{name}")) == 2
        assert all(row["routing/log_ratio_std_live"] > 0 for row in rows[arm])
    assert "routing/live_fraction" in rows["grpo-rollout"][0]
    first = [rows[arm][0]["reward/score"] for arm in rows]
    assert first[0] == first[1], "the same start, prompts and samples"
    text = (tmp_path / "out" / "RESULTS.md").read_text()
    assert "| grpo-rollout |" in text and "learner float32, rollout bfloat16" in text
    assert math.isfinite(rows["grpo-none"][0]["routing/variance_share"])
    again = project.megarl(*arguments)
    assert again.returncode == 0
    assert again.stdout.strip().splitlines() == done.stdout.strip().splitlines()[-1:], "nothing was made again"
    assert project.processes() == []
