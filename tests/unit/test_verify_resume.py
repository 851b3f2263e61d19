"""What `megarl verify resume` calls a difference, and what it makes of a config."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megarl.algorithms import PRESETS
from megarl.async_save import BACKEND
from megarl.checkpoint import CheckpointingConfig, save_config
from megarl.config import dump_config, load_config
from megarl.config.schema import Config
from megarl.errors import BadInput, RunFailed
from megarl.rewards.functions import by_checksum
from megarl.verify.resume import Arm, _compare, _expect, _rows, _smaller, verify_resume

QUICKSTART = Path(__file__).resolve().parents[2] / "configs/cpu/quickstart.yaml"
CONFIG = {
    "model": {"path": "none", "generate": {"num_layers": 1}},
    "sft": {"data": [{"type": "reasoning_gym", "task": "chain_sum"}], "batch_size": 64},
    "rl": {"data": [{"type": "reasoning_gym", "task": "chain_sum", "size": 12}], "samples_per_prompt": 2},
    "rollout": {"max_response_tokens": 5},
    "log": {"wandb": "mine"},
}


def test_the_first_leaf_that_differs_is_named(tmp_path):
    mine = {"rng": [{"torch": [1, 2, 3]}, {"torch": [4, 5, 6]}], "step": 3}
    other = json.loads(json.dumps(mine))
    _expect("state.json", mine, other, tmp_path)
    other["rng"][1]["torch"][2] = 7
    with pytest.raises(RunFailed, match=r"state.json: rng\[1\]: torch\[2\]: 6 without a stop, 7 resumed"):
        _expect("state.json", mine, other, tmp_path)
    with pytest.raises(RunFailed, match="state.json: {'step': 3} without a stop, {} resumed"):
        _expect("state.json", {"step": 3}, {}, tmp_path)


def test_clocks_do_not_count_and_the_last_digit_does(tmp_path):
    arms = [Arm(tmp_path / name, None).part("sft") for name in ("straight", "stopped")]
    for arm, seconds, loss in zip(arms, (1.0, 2.0), (0.5, 0.5000000000000001)):
        arm.mkdir(parents=True)
        row = {"step": 1, "unix_time": seconds, "time/update": seconds, "memory/rss_gib": seconds, "sft/loss": loss}
        (arm / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert _rows(arms[0] / "metrics.jsonl") == [{"step": 1, "sft/loss": 0.5}]
    with pytest.raises(RunFailed, match="step 1: sft/loss: 0.5 without a stop, 0.5000000000000001 resumed"):
        _compare(*arms)


def test_the_config_is_made_small_and_otherwise_left(tmp_path):
    cfg = Config.model_validate(CONFIG)
    small, _ = _smaller(cfg, 4, tmp_path)
    assert (small.sft.steps, small.sft.batch_size, small.sft.data[0].size) == (4, 16, 40)
    assert (small.rl.steps, small.rl.samples_per_prompt, small.rl.data[0].size) == (4, 2, 12)  # already smaller
    assert (small.rollout.max_response_tokens, small.log.wandb, small.eval.data) == (5, None, [])
    assert small.model == cfg.model and small.rl.algorithm == cfg.rl.algorithm and small.parallel == cfg.parallel


@pytest.mark.parametrize("preset", PRESETS)
def test_the_small_config_is_one_that_the_commands_take(tmp_path, preset):
    cfg = load_config(QUICKSTART, [f"rl.algorithm={{preset: {preset}}}"])
    small, _ = _smaller(cfg, 3, tmp_path)
    (tmp_path / "small.yaml").write_text(dump_config(small))
    for section in ("sft", "rl"):
        assert load_config(tmp_path / "small.yaml", require=section).rl.steps == 3


def test_responses_of_a_model_that_learned_nothing_have_different_rewards():
    scores = {by_checksum("", text, "") for text in ("", "a", "b", "12", "\ud800", "1 2 3 4 5")}
    assert len(scores) > 2 and all(0 <= score <= 1 for score in scores)


def part(folder, state=(1, 2), weights=(1.0, 2.0), answer="2", lr=0.1):
    """What a part of a run leaves, as far as it is compared."""
    (folder / "rollouts").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0}) + "\n")
    (folder / "rollouts" / "step_000001.jsonl").write_text(json.dumps({"response": answer}) + "\n")
    checkpoint = folder / "checkpoints" / "step_000001"
    tensors = {"policy.w": torch.tensor(weights), "policy.b": torch.ones(2, dtype=torch.bfloat16)}
    dcp.save(tensors, checkpoint_id=checkpoint / "shards", no_dist=True)
    torch.save({"policy": {"param_groups": [{"lr": lr}]}}, checkpoint / "shards" / "common.pt")
    save_config(CheckpointingConfig(*BACKEND), str(checkpoint / "shards"))
    owners = {"clock": {"seconds": hash(folder)}, "data": list(state)}
    (checkpoint / "state.json").write_text(json.dumps({"owners": owners, "config": {"run_dir": str(folder)}}))
    return folder


@pytest.mark.parametrize(
    "changed, said",
    [
        ({}, None),
        ({"state": (1, 3)}, r"state.json: owners: data\[1\]: 2 without a stop, 3 resumed"),
        ({"weights": (1.0, 2.0000002)}, "after the last step policy.w differs"),
        ({"lr": 0.2}, r"policy.param_groups.0.lr: 0.1 without a stop, 0.2 resumed"),
        ({"answer": "3"}, r"rollouts/step_000001.jsonl\[0\]: response: '2' without a stop, '3' resumed"),
    ],
)
def test_every_kind_of_difference_is_found(tmp_path, changed, said):
    straight, stopped = part(tmp_path / "a" / "run" / "rl"), part(tmp_path / "b" / "run" / "rl", **changed)
    if said is None:
        assert _compare(straight, stopped).startswith("1 steps of metrics, 2 tensors of weights and optimizer")
    else:
        with pytest.raises(RunFailed, match=said):
            _compare(straight, stopped)


def test_what_cannot_be_resumed_is_refused():
    with pytest.raises(BadInput, match="none of the sections"):
        verify_resume(Config.model_validate({"model": CONFIG["model"]}))
    with pytest.raises(BadInput, match="at least 2 steps"):
        verify_resume(Config.model_validate(CONFIG), steps=1)
