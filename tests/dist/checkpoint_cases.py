"""Run by the ranks of `test_checkpoint.py`."""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megarl import checkpoint, manifest
from megarl.checkpoint import Checkpointer, checkpoints
from megarl.config.schema import Config, Model, Optimizer, Parallel
from megarl.errors import BadInput, RunFailed
from megarl.data.packing import micro_batches
from megarl.learner.policy import Policy
from megarl.parallel import Mesh
from tests.dist.learner_cases import fixed_batch, negative_log_likelihood


def two_steps_each_side(path: str, folder: str, parallel: dict[str, Any], resume: bool) -> list[float]:
    """Gradient norms and learning rate of steps 3 and 4, with a checkpoint between step 2 and 3: written, or read."""
    cfg = Config(model=Model(path=path), parallel=Parallel(**parallel))
    mesh = Mesh.build(cfg.parallel)
    settings = Optimizer(lr=1e-2, schedule="linear", warmup_steps=2)
    policy = Policy.from_hf(path, cfg, mesh, optimizer=settings, total_steps=10)
    checkpointer = Checkpointer(Path(folder), mesh, keep=2)
    checkpointer.register("policy", policy)
    packed = micro_batches(fixed_batch(), 400, policy.layout)
    if resume:
        assert checkpointer.load_latest() == 2 and policy.updates == 2
    else:
        for step in range(1, 3):
            policy.train_step(packed, negative_log_likelihood)
            checkpointer.save(step)
    out = []
    for _ in range(2):
        out += [policy.next_lr(), policy.train_step(packed, negative_log_likelihood).grad_norm]
    if not resume:  # retention: the two newest of three
        checkpointer.save(3)
        assert [c.name for c in checkpoints(Path(folder))] == ["step_000002", "step_000003"]
        mesh.barrier()
        if mesh.is_main:
            shutil.rmtree(Path(folder) / "step_000003")
            (Path(folder) / "step_000009").mkdir()  # a save that was cut off before its last file
    return out


def _trained(path: str, parallel: dict[str, Any]) -> tuple[Policy, Mesh, Callable[[], None]]:
    """A policy after one step, and what takes another one."""
    cfg = Config(model=Model(path=path), parallel=Parallel(**parallel))
    mesh = Mesh.build(cfg.parallel)
    policy = Policy.from_hf(path, cfg, mesh, optimizer=Optimizer(lr=1e-2), total_steps=10)
    packed = micro_batches(fixed_batch(), 400, policy.layout)

    def step() -> None:
        policy.train_step(packed, negative_log_likelihood)

    step()
    return policy, mesh, step


def _checkpointer(folder: str, mesh: Mesh, policy: Policy, keep: int = 2, **config: Any) -> Checkpointer:
    out = Checkpointer(Path(folder), mesh, keep, config)
    out.register("policy", policy)
    return out


def digest(policy: Policy) -> str:
    """Of all that this rank holds of weights and optimizer."""
    found = hashlib.sha256()
    for module in policy.modules:
        for parameter in module.parameters():
            found.update(parameter.detach().numpy().tobytes())
    for part in getattr(policy.optimizer, "chained_optimizers", [policy.optimizer]):
        for group in part.optimizer.param_groups:
            for p in group["params"]:
                state = part.optimizer.state[p]
                for tensor in (p.detach(), state["exp_avg"], state["exp_avg_sq"], torch.as_tensor(state["step"])):
                    found.update(tensor.numpy().tobytes())
    return found.hexdigest()


def stepped_during_a_save(path: str, folder: str, parallel: dict[str, Any]) -> dict[str, Any]:
    """Digests before and after steps taken while a save waits to be written, and of what it then holds."""
    policy, mesh, step = _trained(path, parallel)
    checkpointer = _checkpointer(folder, mesh, policy)
    write, go = checkpoint.Save.write, threading.Event()
    checkpoint.Save.write = lambda save: (go.wait(60), write(save))[1]
    out: dict[str, Any] = {"saved": digest(policy)}
    try:
        checkpointer.save(1, wait=False)
        step()
        checkpointer.poll()  # nothing to say yet
        out["unfinished"] = [path.name for path in checkpoints(Path(folder))]
    finally:
        checkpoint.Save.write = write
        go.set()
    checkpointer.finish()
    out["written"] = sorted(file.stat().st_size for file in Path(folder).glob("step_*/shards/*.distcp"))
    out["stepped"] = digest(policy)
    checkpointer.load_latest()
    out["restored"] = digest(policy)
    return out


def failing_on_one_rank(path: str, folder: str, parallel: dict[str, Any]) -> dict[str, Any]:
    """What each rank says when rank 1 may write no file larger than 4 KiB, in the run and behind it; then what is left."""
    policy, mesh, step = _trained(path, parallel)
    checkpointer = _checkpointer(folder, mesh, policy)
    checkpointer.save(1)
    step()
    out: dict[str, Any] = {}
    free = resource.getrlimit(resource.RLIMIT_FSIZE)
    if mesh.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, free[1]))
    for name, wait in (("waiting", True), ("behind", False)):
        try:
            checkpointer.save(2, wait)
            while checkpointer._pending is not None:
                time.sleep(0.01)
                checkpointer.poll()
            out[name] = "nothing"
        except RunFailed as error:
            out[name] = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, free)
    mesh.barrier()
    out["left"] = sorted(path.name for path in Path(folder).iterdir())
    mesh.barrier()  # until every rank has looked
    checkpointer.save(3)
    out["then"] = [path.name for path in checkpoints(Path(folder))]
    return out


def _cut(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - 1)


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "truncated": lambda step: _cut(next((step / "shards").glob("__1_*"))),
    "flipped": lambda step: _flip(next((step / "shards").glob("__0_*"))),
    "metadata": lambda step: _flip(step / "shards" / ".metadata"),
    "missing": lambda step: next((step / "shards").glob("__1_*")).unlink(),
    "state": lambda step: (step / "state.json").unlink(),
    "manifest": lambda step: _cut(step / "manifest.json"),
    "outside": lambda step: (step / "manifest.json").write_text(
        json.dumps({"files": {"../step_000001/state.json": {"bytes": 1, "sha256": ""}}})
    ),
    "empty": lambda step: (shutil.rmtree(step), step.mkdir()),
}


def damaged_newest(path: str, folder: str, parallel: dict[str, Any]) -> dict[str, Any]:
    """What is found wrong with the newest of two checkpoints after each of `DAMAGE`.

    Then the step that is restored, whether it is the first one's state, and what is said: with the newest damaged, with
    both, without a manifest; and what retention leaves of the next save.
    """
    policy, mesh, step = _trained(path, parallel)
    good = Path(f"{folder}-good")
    checkpointer = _checkpointer(str(good), mesh, policy)
    first = digest(policy)
    checkpointer.save(1)
    step()
    checkpointer.save(2)
    out: dict[str, Any] = {}

    def copied(name: str, *changes: Callable[[Path], None]) -> str:
        own = Path(f"{folder}-{name}")
        if mesh.is_main:
            shutil.copytree(good, own)
            for change in changes:
                change(own)
        mesh.barrier()
        return str(own)

    def load(name: str, *changes: Callable[[Path], None]) -> Checkpointer:
        again = _checkpointer(copied(name, *changes), mesh, policy, keep=1)
        try:
            out[name] = [again.load_latest(), digest(policy) == first, again.notes]
        except BadInput as error:
            out[name] = [None, False, [str(error)]]
        return again

    def left_by(checkpointer: Checkpointer, step: int) -> list[str]:
        checkpointer.save(step)
        return sorted(path.name for path in checkpointer.folder.iterdir())

    for name, damage in DAMAGE.items():
        own = copied(name, lambda own, damage=damage: damage(own / "step_000002"))
        out[name] = checkpoint._problem(Path(own) / "step_000002", mesh)
    try:
        checkpoint.check_whole(Path(f"{folder}-flipped") / "step_000002", mesh)
    except BadInput as error:
        out["converted"] = str(error)
    both = [lambda own, step=step: DAMAGE["flipped"](own / f"step_00000{step}") for step in (1, 2)]
    load("both", *both)
    load("unlisted", lambda own: (own / "step_000002" / "manifest.json").unlink())
    out["newest then"] = left_by(load("newest", lambda own: DAMAGE["flipped"](own / "step_000002")), 2)
    later = lambda own: (own / "step_000002").rename(own / "step_000009")  # noqa: E731
    out["later then"] = left_by(load("later", later, lambda own: DAMAGE["missing"](own / "step_000009")), 3)
    return out


def notes_of(path: str, folder: str, parallel: dict[str, Any], first: bool) -> list[str]:
    """What is said of a checkpoint of other settings, versions and layout, which the `first` call writes."""
    policy, mesh, _ = _trained(path, parallel)
    if first:
        versions = checkpoint._versions
        checkpoint._versions = lambda: versions() | {"torch": "1.0"}
        _checkpointer(folder, mesh, policy, rl={"steps": 5, "optimizer": {"lr": 1.0}}, run_dir="a", seed=1).save(1)
        checkpoint._versions = versions
        return []
    again = _checkpointer(folder, mesh, policy, rl={"steps": 6, "optimizer": {"lr": 1.0}}, run_dir="b", seed=1)
    again.load_latest()
    return again.notes


def one_that_never_stepped(path: str, folder: str, parallel: dict[str, Any]) -> dict[str, Any]:
    """As the policy's while a critic warms up: the norm of a step after saving, and after restoring."""
    cfg = Config(model=Model(path=path), parallel=Parallel(**parallel))
    mesh = Mesh.build(cfg.parallel)
    norms = {}
    for name in ("undisturbed", "saved", "restored"):
        policy = Policy.from_hf(path, cfg, mesh, optimizer=Optimizer(lr=1e-2), total_steps=10)
        checkpointer = _checkpointer(folder, mesh, policy)
        if name == "saved":
            checkpointer.save(1)
        if name == "restored":
            assert checkpointer.load_latest() == 1
        packed = micro_batches(fixed_batch(), 400, policy.layout)
        norms[name] = [policy.train_step(packed, negative_log_likelihood).grad_norm for _ in range(2)] + [
            digest(policy)
        ]
    return norms
