"""Distributed checkpoints: written aside, made current by one rename, found again after an interruption.

A checkpoint folder `step_000123/` holds Megatron's sharded tensors (model and optimizer, keyed by role) under
`shards/` and everything else as JSON in `state.json`, which is written last: a folder without it is not a checkpoint.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from megarl import platform
from megarl.errors import BadInput
from megarl.learner.optimizer import after_loading, init_state
from megarl.learner.policy import Policy, Role
from megarl.models.layers.fp8_layers import AMAX
from megarl.parallel import Mesh

platform.setup()

from megatron.core import dist_checkpointing  # noqa: E402
from megatron.core.dist_checkpointing import ShardedTensor  # noqa: E402
from megatron.core.dist_checkpointing.core import CheckpointingException  # noqa: E402
from megatron.core.dist_checkpointing.dict_utils import nested_values  # noqa: E402
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy  # noqa: E402
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker  # noqa: E402
from torch.distributed.checkpoint.api import CheckpointException  # noqa: E402

STATE = "state.json"
# fully reshardable: the optimizer loads under another tp, pp, ep or dp; names without the optimizer's index, which
# depends on whether experts have an optimizer of their own
OPTIMIZER_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


class StateOwner(Protocol):
    """Something a checkpoint must hold: small, JSON-able state that is the same on every rank."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Checkpointer:
    """Saves and restores the policies and state owners registered with it, and keeps the newest `keep` checkpoints."""

    def __init__(self, folder: Path, mesh: Mesh, keep: int) -> None:
        self.folder, self.mesh, self.keep = folder, mesh, keep
        self.policies: dict[str, Policy] = {}
        self.owners: dict[str, StateOwner] = {}

    def register(self, name: str, owner: Policy | StateOwner) -> None:
        if isinstance(owner, Policy):
            self.policies[name] = owner
        else:
            self.owners[name] = owner

    def save(self, step: int) -> Path:
        """Write `step_<step>`; collective. Nothing that existed is touched before the new one is complete."""
        final = self.folder / f"step_{step:06d}"
        partial = self.folder / f".partial_step_{step:06d}"
        if self.mesh.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            (partial / "shards").mkdir(parents=True)
        rng = self.mesh.all_gather_object(_rng_state())
        dist_checkpointing.save(
            self._sharded(), str(partial / "shards"), TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
        )
        if self.mesh.is_main:
            state = {
                "step": step,
                "world_size": self.mesh.world_size,
                "updates": {name: policy.updates for name, policy in self.policies.items()},
                "schedules": {n: p.schedule.state_dict() for n, p in self.policies.items() if p.schedule is not None},
                "owners": {name: owner.state_dict() for name, owner in self.owners.items()},
                "rng": rng,
            }
            (partial / STATE).write_text(json.dumps(state))
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            for old in checkpoints(self.folder)[: -self.keep]:
                shutil.rmtree(old)
        self.mesh.barrier()
        return final

    def load_latest(self) -> int | None:
        """Restore the newest complete checkpoint and return its step; None when there is none. Collective."""
        found = checkpoints(self.folder) if self.mesh.is_main else None
        found = self.mesh.broadcast_object(found)
        if not found:
            return None
        state = json.loads((found[-1] / STATE).read_text())
        sharded = self._sharded(is_loading=True)
        _check_amaxes(found[-1], sharded)
        loaded = dist_checkpointing.load(sharded, str(found[-1] / "shards"))
        for name, policy in self.policies.items():
            _load_policy(policy, loaded[name])
            policy.updates = state["updates"][name]
            if policy.schedule is not None:
                policy.schedule.load_state_dict(state["schedules"][name])
        for name, owner in self.owners.items():
            if name not in state["owners"]:
                raise BadInput(f"{found[-1]}: holds no state of {name}; it was written by another command")
            owner.load_state_dict(state["owners"][name])
        if state["world_size"] == self.mesh.world_size:
            _set_rng_state(state["rng"][self.mesh.rank])
        return state["step"]

    def _sharded(self, is_loading: bool = False) -> dict[str, Any]:
        return {name: _sharded_policy(name, policy, is_loading) for name, policy in self.policies.items()}


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints under `folder`, oldest first."""
    return sorted(path.parent for path in folder.glob(f"step_*/{STATE}"))


def _sharded_policy(role: str, policy: Policy, is_loading: bool) -> dict[str, Any]:
    model = sharded_modules(role, policy.modules)
    out: dict[str, Any] = {"model": model}
    if policy.optimizer is not None:
        if is_loading:
            init_state(policy.optimizer)
        out["optimizer"] = policy.optimizer.sharded_state_dict(model, is_loading, metadata=OPTIMIZER_FORMAT)
    return out


def _check_amaxes(checkpoint: Path, sharded: dict[str, Any]) -> None:
    """Raises BadInput where the past of delayed FP8 scales is not in a checkpoint, or is of another length."""
    amaxes = [x for x in nested_values(sharded) if isinstance(x, ShardedTensor) and x.key.endswith(AMAX)]
    if not amaxes:
        return
    saved = dist_checkpointing.load_tensors_metadata(str(checkpoint / "shards"))
    for amax in amaxes:
        if amax.key not in saved:
            raise BadInput(
                f"{checkpoint}: holds no past of model.fp8 = 'delayed'; resume with the model.fp8 that the run began with, or "
                "start a run from its weights"
            )
        there, wanted = saved[amax.key].global_shape[-1] - 1, amax.global_shape[-1] - 1
        if there != wanted:
            raise BadInput(f"model.fp8_history = {wanted}: {checkpoint} holds {there} steps; set {there}")


def _load_policy(policy: Policy, state: dict[str, Any]) -> None:
    for index, module in enumerate(policy.modules):
        module.load_state_dict(state["model"][f"model{index}"], strict=False)
    if policy.optimizer is not None:
        policy.optimizer.load_state_dict(state["optimizer"])
        after_loading(policy.optimizer)


def _rng_state() -> dict[str, Any]:
    kind, keys, position, has_gauss, cached = np.random.get_state()
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": [kind, keys.tolist(), position, has_gauss, cached],
        "python": [version, list(internal), gauss],
        "tracker": {name: state.tolist() for name, state in get_cuda_rng_tracker().get_states().items()},
    }


def _set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    tracker = {name: torch.tensor(value, dtype=torch.uint8) for name, value in state["tracker"].items()}
    get_cuda_rng_tracker().set_states(tracker)


def model_role(path: Path) -> Role:
    """Whose weights a checkpoint's shards are converted: the policy's, or a reward model's where there is no policy.

    Raises BadInput when the shards are damaged or hold neither.
    """
    with damaged(path):
        names = dist_checkpointing.load_tensors_metadata(str(path))
    found = {name.partition(".")[0] for name in names}
    for role in ("policy", "reward"):
        if role in found:
            return role
    raise BadInput(f"{path}: holds neither a policy nor a reward model; give a step_NNNNNN folder of a run")


def load_model(path: Path, modules: list[torch.nn.Module], role: str = "policy") -> None:
    """Fill this rank's modules with one role's weights of a checkpoint's shards. Collective.

    Raises BadInput when the shards are damaged or belong to another model.
    """
    with damaged(path):
        loaded = dist_checkpointing.load({role: {"model": sharded_modules(role, modules)}}, str(path))
    for index, module in enumerate(modules):
        module.load_state_dict(loaded[role]["model"][f"model{index}"], strict=False)


@contextmanager
def damaged(path: Path) -> Iterator[None]:
    """Raises BadInput when the shards at `path`, read inside it, are damaged or belong to another model."""
    try:
        yield
    except (CheckpointingException, CheckpointException, KeyError, OSError, RuntimeError, ValueError) as error:
        causes = [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
        line = " ".join(str(causes[0]).split())[:300]
        raise BadInput(f"{path}: cannot be read as a checkpoint of this model ({line}); give another one") from None


def sharded_modules(role: str, modules: list[torch.nn.Module]) -> dict[str, Any]:
    """The shards of this rank's modules, named as in a run's checkpoint."""
    return {f"model{index}": module.sharded_state_dict(prefix=f"{role}.") for index, module in enumerate(modules)}
