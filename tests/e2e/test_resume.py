"""A run that is stopped and resumed after every step is the run that never stopped, for every preset."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megarl.algorithms import PRESETS
from megarl.config import load_config
from megarl.errors import RunFailed
from megarl.verify.resume import verify_resume
from tests.dist.harness import run_ranks
from tests.e2e.program import Project, sums, without_clocks

pytestmark = pytest.mark.slow
STEPS = 4
BAND = ["rl.algorithm.gate.low=0.01", "rl.algorithm.gate.high=0.013"]  # GSPO's, for responses of three tokens
OWN = {"gspo": BAND, "gspo_token": BAND}
# what presets leave out: a critic that warms up alone, recorded routing, groups that wait with their experts
RECORDED = "rollout.routed_experts=true"  # all have one engine, and it is the first one's
VARIANTS = {
    "ppo": ["rl.critic.warmup_steps=2", RECORDED],
    "dapo": ["rl.routing_replay=rollout", RECORDED],
    "grpo": ["rl.routing_replay=old", RECORDED],
}


@pytest.fixture(scope="module")
def config(warm: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    project = Project.create(tmp_path_factory.mktemp("resume"), model=warm.model)
    settings = yaml.safe_load(project.config.read_text())
    settings |= {"eval": {"data": []}, "log": {"tensorboard": False}, "checkpoint": {"every": 0}}
    settings["rl"] |= {"steps": STEPS, "init_from": "model", "prompts_per_step": 8, "data": [sums(size=20, seed=1)]}
    settings["rl"]["algorithm"] = {}
    settings["rl"]["optimizer"] = {"lr": 2e-4, "schedule": "linear", "warmup_steps": 3}
    settings["sft"] |= {"steps": 30}
    settings["model"] = {"path": str(warm.run / "sft" / "hf")}
    project.config.write_text(yaml.safe_dump(settings))
    return project.config


def assert_same(runs: list[Any]) -> None:
    (rows, sampled, digests), (again, resampled, redigests) = runs
    assert len(rows) == len(sampled) == STEPS
    for row, other in zip(rows, again, strict=True):
        assert without_clocks(row) == without_clocks(other)
    assert sampled == resampled
    assert digests == redigests


@pytest.fixture(scope="module")
def ranks(config: Path) -> list[dict[str, Any]]:
    presets = {name: OWN.get(name, []) for name in PRESETS}
    return run_ranks("tests.e2e.cases:resume_presets", 2, str(config), presets, timeout=1500)


@pytest.mark.timeout(1600)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_at_every_step_boundary(ranks, preset):
    for rank in ranks:
        assert_same(rank[preset])


@pytest.mark.timeout(700)
def test_variants_at_every_step_boundary(config):
    for rank in run_ranks("tests.e2e.cases:resume_presets", 2, str(config), VARIANTS, timeout=600):
        for preset in VARIANTS:
            assert_same(rank[preset])


@pytest.mark.timeout(900)
@pytest.mark.parametrize("preset", ["ppo", "dapo"])
def test_the_command_proves_it_in_new_processes(warm: Project, preset: str):
    done = warm.megarl("verify", "resume", warm.config, f"rl.algorithm={{preset: {preset}}}")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert done.stdout.splitlines()[-1] == "stopped and resumed is bit-identical to not stopped"
    assert done.stdout.count(": equal: 3 steps of metrics, ") == 2  # sft and rl


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "what, named",
    # an optimizer saves the rate of the step that follows with its moments
    [("data", "step 2: sft/"), ("adam", "step 3: sft/"), ("schedule", "step 3: sft/lr")],
)
def test_what_a_run_forgets_is_found(warm: Project, tmp_path: Path, what: str, named: str):
    settings = json.loads(json.dumps(warm.settings())) | {"rl": None, "parallel": {}}
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "tests.e2e.forgetful", what]
    with pytest.raises(RunFailed, match=f"verify resume: {named}"):
        verify_resume(load_config(tmp_path / "sft.yaml"), steps=3, command=command)
