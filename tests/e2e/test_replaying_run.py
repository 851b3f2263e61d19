"""RL that replays routing: what a step measures, and how it ends when the engine's record is not of its tokens."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import pytest
import yaml

from tests.dist.harness import run_ranks
from tests.e2e.program import Project

OLD, PPO = "rl.routing_replay=old", "rl.algorithm.preset=ppo"


@pytest.fixture(scope="module")
def ranks(trained: Project, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("replay")
    project = Project.create(folder, model=trained.model)
    settings = yaml.safe_load(project.config.read_text())
    settings |= {"eval": {"data": []}, "log": {"tensorboard": False, "rollouts_every": 0}, "checkpoint": {"every": 0}}
    settings["rl"] |= {"steps": 1, "init_from": "model", "prompts_per_step": 8}
    settings["rl"]["algorithm"] = {"preset": "gspo", "gate": {"low": 0.01, "high": 0.013}}
    settings["rl"]["optimizer"] |= {"warmup_steps": 0, "lr": 5e-3}  # so that one step moves routing
    settings["model"] = {"path": str(trained.run / "sft" / "hf")}
    project.config.write_text(yaml.safe_dump(settings))
    rollouts = {"without": str(trained.run / "rl" / "rollouts"), "of three layers": str(folder / "rollouts")}
    (folder / "rollouts").mkdir()
    rows = [json.loads(line) for line in (trained.run / "rl/rollouts/step_000001.jsonl").open()]
    for row in rows:
        count = len(row["prompt_ids"]) + len(row["response_ids"]) - 1
        experts = base64.b64encode(np.zeros((count, 3, 2), np.uint8)).decode()
        row["routed_experts"] = {"dtype": "uint8", "shape": [count, 3, 2], "base64": experts}
    (folder / "rollouts" / "step_000001.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run_ranks("tests.e2e.cases:train_with_records", 2, str(project.config), [OLD, PPO], rollouts, timeout=290)


def test_a_step_measures_its_routing(ranks):
    for rank in ranks:
        metrics = rank["good"]
        assert metrics["routing/engine_changed"] == metrics["routing/noise_changed"] == 0.0
        assert 0.0 < metrics["routing/live_fraction"] < 0.2  # last tokens
        assert 0.0 < metrics["routing/update_changed"] < 0.5
        assert rank[PPO]["routing/live_fraction"] == metrics["routing/live_fraction"]  # the critic chooses for itself
        assert rank[OLD]["routing/live_fraction"] == 0.0


@pytest.mark.parametrize(
    "record, said",
    [
        ("shifted", "chooses too many differently (layer 0: "),
        ("swapped", "chooses too many differently (layer 0: "),
        ("outside", "routing: layer 1: expert 8 is recorded, and the policy has 8"),
        ("twice", "routing: layer 0: an expert is recorded twice for one token: ["),
        ("short", "the engine recorded experts of"),
        ("none", "there are no recorded experts for the policy to replay"),
        ("without", "step_000001.jsonl: no experts recorded, and the model has 2 MoE layers with 2; set rl.routing_replay"),
        ("of three layers", "step_000001.jsonl: 3 MoE layers with 2 experts a token recorded, and the model has 2 MoE layers"),
    ],
)
def test_a_record_that_is_not_of_the_tokens_ends_the_run(ranks, record, said):
    for rank in ranks:
        assert isinstance(rank[record], str), "nothing was noticed"
        assert said in rank[record] and "\n" not in rank[record]
        if record == "swapped":
            assert "layer 1: " in rank[record]
