"""Run by the ranks of `test_scoring.py`: a weighted reward of a verifier and two reward models, in any layout."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch.distributed as dist

from megarl.config.schema import RL, Config, DataSource, Model, Parallel, Reward
from megarl.errors import BadInput
from megarl.parallel import Mesh
from megarl.rewards import RewardRunner
from megarl.trainers.scoring import Scorer, part_metrics
from megarl.types import Prompt, PromptGroup, Trajectory

FACTORS = {"right": 1.0, "quality": 0.1, "style": -2.0}
CONTEXT = 64
LONG = "g1/1"  # its prompt and response are longer than the reward models' context
JUDGED = "g3"  # its row names one reward model


def groups() -> list[PromptGroup]:
    """Five groups of three trajectories of 4 to 50 tokens, and one that no reward model can read."""
    rng, out = np.random.default_rng(0), []
    for g in range(5):
        prompt_ids = rng.integers(4, 120, rng.integers(2, 20)).tolist()
        prompt = Prompt(f"p{g}", tuple(prompt_ids), "7", "quality" if f"g{g}" == JUDGED else None)
        trajectories = []
        for i in range(3):
            n = CONTEXT if f"g{g}/{i}" == LONG else int(rng.integers(2, 30))
            zeros = np.zeros(n)
            ids = rng.integers(4, 120, n).tolist()
            text = "7" if (g + i) % 2 else "8"
            trajectories.append(
                Trajectory(
                    f"g{g}", i, prompt_ids, ids, zeros.astype(np.uint8), zeros, "stop", zeros.astype(np.int32), text
                )
            )
        out.append(PromptGroup(f"g{g}", prompt, trajectories))
    return out


def config(policy: str, quality: str, style: str, parallel: dict[str, Any]) -> Config:
    named = {
        "right": Reward(type="exact_match"),
        "quality": Reward(type="model", params={"path": quality}, failed_score=-3.0),
        "style": Reward(type="model", params={"path": style}),
    }
    return Config(
        model=Model(path=policy),
        parallel=Parallel(**parallel),
        rl=RL(data=[DataSource(type="jsonl", path="unused")], micro_batch_tokens=70),
        reward=Reward(type="weighted", params={"weights": FACTORS}, named=named, failed_score=-1.0),
    )


def score_and_refuse(
    policy: str, quality: str, style: str, layouts: list[dict[str, Any]], others: list[str]
) -> dict[str, Any]:
    """Both cases in one launch: starting two ranks costs more than all of it."""
    return {"scored": score(policy, quality, style, layouts), "refused": refused(policy, quality, others)}


def score(policy: str, quality: str, style: str, layouts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """In each layout: id -> [score, shaped reward, failed, parts] of this rank's trajectories, and the logged means.

    Where an engine spans two ranks only the first of them has groups, as in RL.
    """
    out = []
    for parallel in layouts:
        cfg = config(policy, quality, style, parallel)
        mesh = Mesh.build(cfg.parallel)
        with RewardRunner(cfg.reward) as verifiers:
            scorer = Scorer(cfg, mesh, verifiers, policy)
            engines = mesh.world_size // mesh.tp
            own = groups()[mesh.rank // mesh.tp :: engines] if mesh.tp_rank == 0 else []
            scorer.score(own)
        said = {
            f"{t.group_id}/{t.sample_index}": [t.score, t.shaped_reward, t.reward_failed, t.rewards]
            for group in own
            for t in group.trajectories
        }
        out.append({"said": said, "metrics": {name: metric.value() for name, metric in part_metrics(own).items()}})
        leave_layout()
    return out


def refused(policy: str, quality: str, styles: list[str]) -> list[str]:
    """What a `Scorer` says to each of these folders in place of the second reward model."""
    out = []
    for style in styles:
        cfg = config(policy, quality, style, {})
        mesh = Mesh.build(cfg.parallel)
        with RewardRunner(cfg.reward) as verifiers:
            try:
                Scorer(cfg, mesh, verifiers, policy)
            except BadInput as error:
                out.append(str(error))
        leave_layout()
    return out


def leave_layout() -> None:
    from megatron.core import parallel_state

    dist.barrier()
    parallel_state.destroy_model_parallel()
