"""What each rank runs for the rollout-layout tests: the trainer's own sharing of prompts over a learner and an engine."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from megarl import platform
from megarl.config.schema import RL, Config, DataSource, Model, Parallel, Reward
from tests.dist.vllm_cases import prompts, start, swap_experts

SAMPLES, LENGTH, ROUND = 2, 20, 3


def layout(path: str, counts: list[int], parallel: dict[str, int], rollout: dict[str, Any]) -> dict:
    """A sync and its gaps; then for each of `counts` prompts what this rank sampled, what every rank gets, and how far
    the engine's log-probs of the sampled tokens are from the learner's; last, what two swapped experts are reported as."""
    platform.setup()
    from megarl.convert import stream_hf
    from megarl.learner.policy import Policy
    from megarl.learner.probes import probe_log_probs
    from megarl.rollout.weight_sync import WeightSync, compare_with_learner, make_probes, measure_gap

    degrees = Parallel(**parallel)
    engine, mesh = start(path, load=False, parallel=degrees, **rollout)
    rl = RL(data=[DataSource(type="reasoning_gym", task="chain_sum")], samples_per_prompt=SAMPLES)
    settings = engine.config.model_copy(update={"max_response_tokens": LENGTH})
    config = Config(model=Model(path=path), parallel=degrees, rollout=settings, rl=rl)
    policy = Policy.from_hf(path, config, mesh)
    sync = WeightSync(policy.spec, degrees, mesh, engine)
    for version in (1, 2):  # the second sync meets what the first has packed
        sync.run(policy.modules, version)
    probes = make_probes(policy.spec.vocab_size, 4, engine.probe_length)
    gap = measure_gap(engine, probes, probe_log_probs(policy, probes), mesh)
    families = compare_with_learner(engine, mesh, stream_hf(policy.modules, policy.spec, mesh))
    out: dict[str, Any] = _shared_memory() | {
        "replica": engine.layout.index,
        "gap": [gap.mean, gap.max],
        "differing": [str(item) for item in families if item.differs],
        "families": len(families),
        "scored": len(engine.score(probes[:2] if engine.layout.index == 0 else [])),
        "rounds": [],
    }
    for count in counts:
        asked, own, groups = _sample(config, mesh, engine, count)
        rows = [t for group in groups for t in group.trajectories]
        learner = probe_log_probs(policy, [row.prompt_ids + row.response_ids for row in rows])
        gaps = [
            np.abs(values[len(row.prompt_ids) :] - row.rollout_log_probs)
            for values, row in zip(learner, rows, strict=True)
        ]
        out["rounds"].append(
            {
                "asked": asked,
                "own": _tokens(own),
                "all": _tokens(groups),
                "gap": float(np.concatenate(gaps).mean()),
                "max_gap": float(np.concatenate(gaps).max()),
                "routed": [None if row.routed_experts is None else len(row.routed_experts) for row in rows],
                "lengths": [len(row.prompt_ids) + len(row.response_ids) for row in rows],
            }
        )
    weights = {name: tensor.clone() for name, tensor in stream_hf(policy.modules, policy.spec, mesh)}
    engine.load_weights(swap_experts(weights).items(), 3)
    families = compare_with_learner(engine, mesh, stream_hf(policy.modules, policy.spec, mesh))
    return out | {"swapped": [str(item) for item in families if item.differs]}


def _sample(config: Config, mesh: Any, engine: Any, count: int) -> tuple[list[str], list, list]:
    """(ids this rank's engine was asked for, its groups, the groups that the trainer then has) of `count` prompts."""
    from megarl.trainers.rl import RLTrainer

    asked: list[str] = []
    own: list = []

    def generate(share, sampling, round_id):
        asked.extend(prompt.prompt_id for prompt in share)
        own.extend(engine.generate(share, sampling, round_id))
        return list(own)

    trainer = SimpleNamespace(
        cfg=config.model_copy(update={"reward": Reward()}),
        mesh=mesh,
        loop=SimpleNamespace(phases=lambda name: nullcontext()),
        data=SimpleNamespace(next=prompts),
        engine=SimpleNamespace(layout=engine.layout, generate=generate),
        scorer=SimpleNamespace(score=lambda groups: None),
    )
    return asked, own, RLTrainer._sample(trainer, count, ROUND)


def _shared_memory() -> dict:
    """The name of the engine's segment, and the files that this process maps under /dev/shm and could be found there."""
    from vllm.distributed import get_tp_group

    shared = getattr(get_tp_group().device_communicator, "dist_module", None)
    with open("/proc/self/maps") as maps:
        mapped = {line.split(maxsplit=5)[5].strip() for line in maps if "/dev/shm/" in line}
    return {
        "segment": getattr(shared, "group_name", None),
        "segments": [name for name in mapped if Path(name).exists()],
        "port": os.environ["MASTER_PORT"],
    }


def _tokens(groups: list) -> list[dict]:
    return [
        {"prompt": group.prompt.prompt_id, "responses": [t.response_ids for t in group.trajectories]}
        for group in groups
    ]
