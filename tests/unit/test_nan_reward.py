"""A verifier that says NaN: the trajectory is counted and left out, and the rest of its group is as if it were not there."""

from __future__ import annotations

import numpy as np
import pytest
import torch.distributed as dist

from megarl.algorithms import PRESETS
from megarl.config.schema import RL, Config, DataSource, Model, Parallel, Reward
from megarl.metrics import reduce_metrics
from megarl.parallel import Mesh
from megarl.rewards import RewardRunner
from megarl.trainers import rl_batch
from megarl.trainers.scoring import Scorer
from megarl.types import Prompt, PromptGroup, Trajectory


def group(texts: list[str]) -> PromptGroup:
    ones = np.ones(2)
    trajectories = [
        Trajectory("g", i, [5], [6, 7], ones.astype(np.uint8), -ones, "stop", np.zeros(2, np.int32), text)
        for i, text in enumerate(texts)
    ]
    return PromptGroup("g", Prompt("p", (5,), "4"), trajectories)


@pytest.fixture
def mesh():
    yield Mesh.build(Parallel())
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def test_it_is_counted_and_changes_nothing_for_the_others(tmp_path, monkeypatch, mesh):
    (tmp_path / "scores_or_nan.py").write_text(
        "def score(prompt, response, answer, **metadata):\n    return float(response)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    cfg = Config(
        model=Model(path="unused"),
        rl=RL(data=[DataSource(type="jsonl", path="unused")]),
        reward=Reward(type="scores_or_nan:score", failed_score=-5.0),
    )
    with_nan, without = group(["1", "nan", "0", "0.5"]), group(["1", "0", "0.5"])
    with RewardRunner(cfg.reward) as verifiers:
        Scorer(cfg, mesh, verifiers, "unused").score([with_nan, without])
    assert [t.score for t in with_nan.trajectories] == [1.0, None, 0.0, 0.5]
    assert [t.reward_failed for t in with_nan.trajectories] == [False, True, False, False]
    for preset in ("grpo", "rloo", "reinforce_pp_baseline"):
        algorithm, found = PRESETS[preset], []
        for one in (with_nan, without):
            batch = rl_batch.assemble([one], algorithm)
            if algorithm.needs_reference:
                batch = batch.replace(old_log_probs=batch.rollout_log_probs, ref_log_probs=batch.rollout_log_probs)
            batch, metrics = rl_batch.with_decisions(batch, [batch], algorithm)
            found.append(batch.advantages.view(-1, 3)[:, 1])
            unscored = reduce_metrics(metrics, lambda x: [x])["reward/unscored"]
            assert unscored == (1.0 if one is with_nan else 0.0)
        assert found[0][1] == 0.0
        assert found[0][[0, 2, 3]].tolist() == pytest.approx(found[1].tolist(), abs=1e-7)
