"""What `megarl verify resume` calls a difference, and what it makes of a config."""

from __future__ import annotations

import json

import pytest

from megarl.config.schema import Config
from megarl.errors import BadInput, RunFailed
from megarl.verify.resume import Arm, _compare, _expect, _rows, _smaller, verify_resume

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


def test_what_cannot_be_resumed_is_refused():
    with pytest.raises(BadInput, match="none of the sections"):
        verify_resume(Config.model_validate({"model": CONFIG["model"]}))
    with pytest.raises(BadInput, match="at least 2 steps"):
        verify_resume(Config.model_validate(CONFIG), steps=1)
