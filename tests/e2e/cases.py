"""What the end-to-end tests run inside ranks."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch


def learner_log_probs(config: str, checkpoint: str, sequences: list[list[int]]) -> list[list[float]]:
    """Log-probs of each token under the distributed checkpoint, in megarl's learner."""
    from megarl import platform

    platform.setup()
    from megarl.checkpoint import load_model
    from megarl.config import load_config
    from megarl.convert import read_spec
    from megarl.learner.policy import Policy
    from megarl.learner.probes import probe_log_probs
    from megarl.parallel import Mesh

    cfg = load_config(config, ["parallel.ep=1", "parallel.nproc=1"])
    policy = Policy(read_spec(cfg.model.path), cfg, Mesh.build(cfg.parallel))
    load_model(Path(checkpoint) / "shards", policy.modules)
    return [log_probs.tolist() for log_probs in probe_log_probs(policy, sequences)]


def refusal(part: str, config: str, overrides: list[str] = [], rollouts: str | None = None) -> str:
    """What the ranks of a command refuse its input with; `part`: the trainer, `rollouts`: `--from-rollouts`."""
    from megarl import platform

    platform.setup()
    from megarl.config import load_config
    from megarl.errors import BadInput

    trainer = importlib.import_module(f"megarl.trainers.{part}")
    more = {"from_rollouts": Path(rollouts)} if rollouts else {}
    try:
        trainer.run(load_config(config, overrides), **more)
    except BadInput as error:
        return str(error)
    return "nothing was refused"


def converted(checkpoint: str, target: str) -> None:
    """`megarl convert CHECKPOINT TARGET --to hf`."""
    from megarl.config import Parallel
    from megarl.learner.convert_checkpoint import convert_checkpoint

    convert_checkpoint(checkpoint, target, "hf", Parallel())


def _one_engine(rl: Any) -> None:
    """All trainers of this process get the first one's engine."""
    engines, start = [], rl.VLLMEngine

    def one_engine(*args, **kwargs):
        if not engines:
            engines.append(start(*args, **kwargs))
        return engines[0]

    rl.VLLMEngine = one_engine


def _one_step(trainer: Any) -> dict[str, float]:
    try:
        trainer.prepare()
        return trainer.step(1)
    finally:
        trainer.loop.close()


# what becomes of an engine's record [tokens, layers, k] before the trainer sees it
RECORDS = {
    "good": lambda rows: rows,
    "shifted": lambda rows: np.roll(rows, 1, axis=0),
    "swapped": lambda rows: rows[:, ::-1],
    "outside": lambda rows: np.where(np.arange(rows[0].size).reshape(rows[0].shape) == 2, 8, rows),
    "twice": lambda rows: rows[:, :, :1].repeat(2, axis=2),
    "short": lambda rows: rows[:-1],
    "none": lambda rows: None,
}


def train_with_records(config: str, modes: list[str], rollouts: dict[str, str]) -> dict[str, Any]:
    """One step of `megarl train` that replays the engine's record, after each of `RECORDS`: its metrics, or its error.

    Then with each of the overrides in `modes`, and with the trajectories of each folder of `rollouts`.
    """
    from megarl import platform

    platform.setup()
    from megarl.config import load_config
    from megarl.errors import BadInput, RunFailed
    from megarl.parallel import Mesh
    from megarl.rewards import RewardRunner
    from megarl.rollout.vllm_engine import VLLMEngine
    from megarl.trainers import rl

    _one_engine(rl)
    out: dict[str, Any] = {}
    cfg, plain = load_config(config), VLLMEngine._moe_rows
    with RewardRunner(cfg.reward) as rewards:
        mesh = Mesh.build(cfg.parallel)

        def step(name: str, *overrides: str, folder: str | None = None) -> None:
            own = [f"run_dir={cfg.run_dir}-{len(out)}", "rl.routing_replay=rollout", *overrides]
            try:
                out[name] = _one_step(rl.RLTrainer(load_config(config, own), mesh, rewards, folder and Path(folder)))
            except (BadInput, RunFailed) as error:
                out[name] = str(error)

        for name, spoil in RECORDS.items():
            VLLMEngine._moe_rows = lambda self, pieces, spoil=spoil: spoil(plain(self, pieces))
            step(name)
        VLLMEngine._moe_rows = plain
        for override in modes:
            step(override, override)
        for name, folder in rollouts.items():
            step(name, folder=folder)
    return out


def train_presets(config: str, presets: dict[str, list[str]], resumed: list[str], parked: str) -> dict[str, Any]:
    """`megarl train` with each preset and its overrides, one after the other in the same ranks; the rows of metrics.jsonl.

    The mesh, the reward workers and vLLM start once; everything else is made anew for every preset. Those in `resumed`
    run a second time, stopped after step 3 and continued by a trainer made anew: rows under `<preset> resumed`. The preset
    `parked` does so with all of the learner off the device while the engine samples: `<preset> parked`, and `in place`.
    Under `left out`: those of a run whose third step an alarm leaves out.
    """
    from megarl import platform

    platform.setup()
    from megarl.config import load_config
    from megarl.metrics import read_jsonl
    from megarl.parallel import Mesh
    from megarl.rewards import RewardRunner
    from megarl.trainers import rl

    cfg = load_config(config)
    _one_engine(rl)
    rows = {}
    with RewardRunner(cfg.reward) as rewards:
        mesh = Mesh.build(cfg.parallel)

        def train(run_dir: str, overrides: list[str], stop_after: int | None = None) -> list[dict[str, float]]:
            trainer = rl.RLTrainer(load_config(config, [f"run_dir={run_dir}", *overrides]), mesh, rewards)
            trainer.loop.total = stop_after or trainer.loop.total  # the schedules go on to the configured end
            try:
                trainer.prepare()
                trainer.loop.run(trainer.step)
            finally:
                trainer.loop.close()
            return read_jsonl(Path(run_dir) / "rl" / "metrics.jsonl")

        for preset, overrides in presets.items():
            own = [f"rl.algorithm.preset={preset}", *overrides]
            rows[preset] = train(f"{cfg.run_dir}-{preset}", own)
            if preset in resumed:
                train(f"{cfg.run_dir}-{preset}-2", own, stop_after=3)
                rows[f"{preset} resumed"] = train(f"{cfg.run_dir}-{preset}-2", [*own, "resume=auto"])
        with _parking() as rows["in place"]:
            own = [f"rl.algorithm.preset={parked}", *presets[parked], "memory.param_offload=true", "memory.grad_offload=true"]
            train(f"{cfg.run_dir}-parked", own, stop_after=3)
            rows[f"{parked} parked"] = train(f"{cfg.run_dir}-parked", [*own, "resume=auto"])
        alarm = ["alarms.window=2", "alarms.length.above=0.01", "alarms.length.action=skip"]
        rows["left out"] = train(f"{cfg.run_dir}-left-out", ["rl.algorithm.preset=grpo", *alarm], stop_after=3)
        own = load_config(config, ["rl.algorithm.preset=grpo", f"run_dir={cfg.run_dir}-nan"])
        rows["nan"] = _train_to_nan(rl.RLTrainer(own, mesh, rewards))
        for name, (method, broken) in BROKEN.items():
            own = load_config(config, ["rl.algorithm.preset=grpo", f"run_dir={cfg.run_dir}-{name}"])
            rows[name] = _sync_with(rl.RLTrainer(own, mesh, rewards), method, broken)
    return rows


@contextlib.contextmanager
def _parking() -> Iterator[dict[str, dict[str, int]]]:
    """What is on the host counts as on a device. Gives phase -> model and owner -> bytes that are where they are computed
    with, most at any end of the phase."""
    from megarl.learner import host_parked
    from megarl.trainers import rl

    found: dict[str, dict[str, int]] = {}
    plain, is_on_host, turns = rl.MemoryLedger.record, host_parked._is_on_host, rl.Turns.__init__
    models: list[Any] = []

    def watched(self: Any, settings: Any, policies: list[Any]) -> None:
        models[:] = policies
        turns(self, settings, policies)

    def record(ledger: Any, phase: str, **other: Any) -> None:
        now = found.setdefault(phase, {})
        for model in models:
            for owner, storages in model._storages().items():
                name = f"{model.role} {owner}"
                now[name] = max(now.get(name, 0), sum(storage.nbytes() for storage in storages))
        plain(ledger, phase, **other)

    host_parked._is_on_host = lambda storage: False
    rl.MemoryLedger.record, rl.Turns.__init__ = record, watched
    try:
        yield found
    finally:
        host_parked._is_on_host, rl.MemoryLedger.record, rl.Turns.__init__ = is_on_host, plain, turns


def _swapped(stretches: Any, direct: Any, parts: list[tuple]) -> list[Any]:
    places = {"layers.1.mlp.experts.2.": "layers.1.mlp.experts.5.", "layers.1.mlp.experts.5.": "layers.1.mlp.experts.2."}
    found = [next((place for place in places if place in name), "") for name, *_ in parts]
    return stretches(
        direct, [(part[0].replace(place, places.get(place, "")), *part[1:]) for part, place in zip(parts, found)]
    )


def _scaled(write: Any, direct: Any, stretches: list[Any], values: torch.Tensor) -> None:
    names = {name for one in stretches for name in one.names}
    write(direct, stretches, values * 0.5 if "model.layers.0.self_attn.o_proj.weight" in names else values)


# how a weight sync writes into the engine: two experts swapped, or a matrix of other values
BROKEN = {"swapped": ("stretches", _swapped), "skipped": ("write_stretches", _scaled)}


def _sync_with(trainer: Any, method: str, broken: Any) -> str:
    """A run's first sync with a broken step inside, so that log-probs have to tell."""
    from megarl.errors import RunFailed
    from megarl.platform.vllm_direct import Direct
    from megarl.trainers import rl

    plain, engine = getattr(Direct, method), rl.VLLMEngine()  # of the runs before
    engine._stretches.clear()
    setattr(Direct, method, lambda direct, *arguments: broken(plain, direct, *arguments))
    try:
        trainer.prepare()
    except RunFailed as error:
        return str(error)
    finally:
        setattr(Direct, method, plain)
        engine._stretches.clear()
        trainer.loop.close()
    return "nothing was noticed"


def _train_to_nan(trainer: Any) -> dict[str, Any]:
    """A step whose loss is NaN on one rank: what the run says, and what it keeps."""
    from megarl.errors import RunFailed
    from megarl.trainers.failed_step import load_micro_batches

    plain = trainer.loss

    def not_a_number(*args):
        loss, metrics = plain(*args)
        return loss * (float("nan") if trainer.mesh.rank == 1 else 1.0), metrics

    trainer.prepare()
    before = [p.detach().clone() for p in trainer.policy.modules[0].parameters()]
    trainer.loss = not_a_number
    try:
        trainer.step(1)
        said = "nothing"
    except RunFailed as error:
        said = str(error)
    finally:
        trainer.loop.close()
    same = all(torch.equal(a, b) for a, b in zip(before, trainer.policy.modules[0].parameters(), strict=True))
    kept = trainer.loop.folder / "failed" / f"step_000001_rank{trainer.mesh.rank}.safetensors"
    batches = load_micro_batches(kept)
    replayed = trainer.policy.train_step(batches, plain)
    return {"said": said, "unchanged": same, "kept": str(kept), "tokens": sum(m.batch.tokens.numel() for m in batches),
            "replayed": replayed.applied}  # fmt: skip


def resume_presets(config: str, presets: dict[str, list[str]]) -> dict[str, Any]:
    """Each preset with its overrides without a stop, and stopped and resumed after every step by trainers made anew.

    By preset: the rows of metrics.jsonl, the trajectories and a digest of this rank's weights and optimizers, of both.
    """
    from megarl import platform

    platform.setup()
    from megarl.config import load_config
    from megarl.metrics import read_jsonl
    from megarl.parallel import Mesh
    from megarl.rewards import RewardRunner
    from megarl.trainers import rl
    from tests.dist.checkpoint_cases import digest

    cfg = load_config(config)
    _one_engine(rl)

    def train(run_dir: str, overrides: list[str], starts: int) -> list[Any]:
        each = ["checkpoint.stop_after=1"] if starts > 1 else []
        for start in range(starts):
            more = [*each, "resume=auto"] if start else each
            trainer = rl.RLTrainer(load_config(config, [f"run_dir={run_dir}", *overrides, *more]), mesh, rewards)
            try:
                trainer.prepare()
                ended = trainer.loop.run(trainer.step)
                assert ended == (start == starts - 1)
            finally:
                trainer.loop.close()
        folder = Path(run_dir) / "rl"
        sampled = {path.name: path.read_text() for path in sorted((folder / "rollouts").iterdir())}
        models = [trainer.policy, *([trainer.critic] if trainer.critic else [])]
        return [read_jsonl(folder / "metrics.jsonl"), sampled, [digest(model) for model in models]]

    out = {}
    with RewardRunner(cfg.reward) as rewards:
        mesh = Mesh.build(cfg.parallel)
        for preset, overrides in presets.items():
            own = [f"rl.algorithm.preset={preset}", *overrides]
            runs = [train(f"{cfg.run_dir}-{preset}-{starts}", own, starts) for starts in (1, cfg.rl.steps)]
            out[preset] = runs
    return out
