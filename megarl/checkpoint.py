"""Distributed checkpoints: written aside, made current by one rename, found again after an interruption.

A checkpoint folder `step_000123/` holds Megatron's sharded tensors (model and optimizer, keyed by role) under `shards/`,
everything else as JSON in `state.json`, and in `manifest.json`, written last, the size and checksum of each file. While it
is written it is called `.partial_step_000123`.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist

from megarl import __version__, manifest, platform
from megarl.async_save import BACKEND, SHARDS, Planner, Save
from megarl.errors import BadInput, RunFailed
from megarl.learner.optimizer import after_loading, init_state
from megarl.learner.policy import Policy, Role
from megarl.models.layers.fp8_layers import AMAX
from megarl.parallel import Mesh
from megarl.platform import features
from megarl.platform.safe_loading import check_shards

platform.setup()

from megatron.core import dist_checkpointing  # noqa: E402
from megatron.core.dist_checkpointing import ShardedTensor  # noqa: E402
from megatron.core.dist_checkpointing.core import (  # noqa: E402
    CheckpointingConfig,
    CheckpointingException,
    save_config,
)
from megatron.core.dist_checkpointing.dict_utils import nested_values  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory  # noqa: E402
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker  # noqa: E402
from torch.distributed.checkpoint.api import CheckpointException  # noqa: E402

STATE = "state.json"
LAYER_STATE = "._extra_state"
# fully reshardable: the optimizer loads under another tp, pp, ep or dp; names without the optimizer's index, which
# depends on whether experts have an optimizer of their own
OPTIMIZER_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
# settings that change no number of a step
ELSEWHERE = (
    "run_dir", "resume", "checkpoint", "export", "log", "study", "watchdog", "parallel.nproc", "parallel.timeout_minutes",
    "parallel.max_restarts",
)  # fmt: skip


class StateOwner(Protocol):
    """Something a checkpoint must hold: small, JSON-able state that is the same on every rank."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Checkpointer:
    """Saves and restores the policies and state owners registered with it, and keeps the newest `keep` checkpoints.

    `config`: the run's settings, kept in every checkpoint and compared with when one is restored. Made by all ranks
    together.
    """

    def __init__(self, folder: Path, mesh: Mesh, keep: int, config: dict[str, Any] | None = None) -> None:
        self.folder, self.mesh, self.keep, self.config = folder, mesh, keep, config or {}
        self.policies: dict[str, Policy] = {}
        self.owners: dict[str, StateOwner] = {}
        self.notes: list[str] = []  # one line each: what `load_latest` passed over, and what cannot be exact
        self._planner = Planner(mesh.dp_group)
        self._group = dist.new_group(backend="gloo")  # the writing thread's: its collectives meet no others
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def register(self, name: str, owner: Policy | StateOwner) -> None:
        if isinstance(owner, Policy):
            self.policies[name] = owner
        else:
            self.owners[name] = owner

    def save(self, step: int, wait: bool = True) -> None:
        """Write `step_<step>`; collective. Nothing that existed is touched before the new one is complete.

        Without `wait` it returns as soon as a copy of everything is taken, and a thread writes that; `poll` at the next
        step boundaries says how it went. Raises RunFailed on every rank when this save, or the one before, failed.
        """
        self.finish()
        save = self._begin(step, copy=not wait)
        if wait:
            self._write(save)
        else:
            self._pending = self._thread.submit(self._write, save)

    def poll(self) -> None:
        """Raise RunFailed on every rank when a save that nobody waited for has failed. Collective while there is one."""
        if self._pending is not None and not self.mesh.any(not self._pending.done()):
            self.finish()

    def finish(self) -> None:
        """Wait for the save that is being written, if there is one; as `poll` otherwise."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def settle(self, seconds: float) -> None:
        """Where a run ends early: give a save that is being written that long, however it goes."""
        if self._pending is not None:
            futures.wait([self._pending], seconds)

    def load_latest(self) -> int | None:
        """Restore the newest checkpoint that is whole and return its step; None when there is none at all. Collective.

        Those that are not are passed over, each with a line in `notes`. Raises BadInput when none is whole.
        """
        if self.mesh.is_main:
            for leftover in (*self.folder.glob(".partial_step_*"), *self.folder.glob(".replaced_step_*")):
                shutil.rmtree(leftover, ignore_errors=True)  # of a save that was killed
        found = self.mesh.broadcast_object(_steps(self.folder) if self.mesh.is_main else None)
        for path in reversed(found):
            why = _problem(path, self.mesh)
            if why is None:
                if not (path / manifest.MANIFEST).exists():
                    self.notes.append(f"note: {path} has no {manifest.MANIFEST}, an older megarl wrote it: not checked")
                return self._load(path)
            self.notes.append(f"warning: {path} is damaged and passed over: {why}")
        if not found:
            return None
        raise BadInput(
            f"{self.folder}: no checkpoint is whole ({'; '.join(note.removeprefix('warning: ') for note in self.notes)}); "
            "restore one, or move the folder away to start again"
        )

    def _load(self, path: Path) -> int:
        check_shards(path / SHARDS)
        with damaged(path):
            state = json.loads((path / STATE).read_text())
            sharded = self._sharded(is_loading=True)
            _check_amaxes(path, sharded)
            self._restore(path, state, dist_checkpointing.load(sharded, str(path / SHARDS)))
            return state["step"]

    def _restore(self, path: Path, state: dict[str, Any], loaded: dict[str, Any]) -> None:
        for name, policy in self.policies.items():
            _load_policy(policy, loaded[name])
            policy.updates = state["updates"][name]
            if policy.schedule is not None:
                policy.schedule.load_state_dict(state["schedules"][name])
        for name, owner in self.owners.items():
            if name not in state["owners"]:
                raise BadInput(f"{path}: holds no state of {name}; it was written by another command")
            owner.load_state_dict(state["owners"][name])
        layout = state.get("layout", {"world_size": state["world_size"]})
        now = {name: value for name, value in _layout(self.mesh).items() if name in layout}
        if layout == now:
            _set_rng_state(state["rng"][self.mesh.rank])
        else:
            changed = [name for name in layout if layout[name] != now[name]]
            was, becomes = (", ".join(f"{name} {of[name]}" for name in changed) for of in (layout, now))
            self.notes.append(
                f"note: the layout was {was} and is {becomes}: weights, optimizer, schedule and the order of the data go on "
                "as they were; sums over ranks are rounded in another order, and random generators start anew"
            )
        self.notes += _changes("settings", _leaves(state.get("config", {})), _leaves(self.config))
        self.notes += _changes("versions", state.get("versions", {}), _versions())

    def _begin(self, step: int, copy: bool) -> Save:
        """What is to be written, planned by all ranks together; with `copy` the caller may go on to change it."""
        save = Save(step, self.folder / f".partial_step_{step:06d}", self.folder / f"step_{step:06d}")
        with self._agreed(save):
            if self.mesh.is_main:
                shutil.rmtree(save.partial, ignore_errors=True)
                (save.partial / SHARDS).mkdir(parents=True)
        rng = self.mesh.all_gather_object(_rng_state())
        if self.mesh.is_main:
            save.state = json.dumps(
                {
                    "step": step,
                    "world_size": self.mesh.world_size,
                    "layout": _layout(self.mesh),
                    "updates": {name: policy.updates for name, policy in self.policies.items()},
                    "schedules": {
                        n: p.schedule.state_dict() for n, p in self.policies.items() if p.schedule is not None
                    },
                    "owners": {name: owner.state_dict() for name, owner in self.owners.items()},
                    "rng": rng,
                    "config": self.config,
                    "versions": _versions(),
                }
            )
        try:
            self._planner.plan(self._sharded(), save, copy)
        except (OSError, RuntimeError) as error:  # on the main rank alone, which writes a file here
            raise self._failed(save, _line(error)) from error
        return save

    def _write(self, save: Save) -> None:
        """Write what was planned, and make it current. Collective on the writing thread's own group."""
        results, files, why = None, {}, None
        try:
            results = save.write()
            files = manifest.entries(save.partial, save.names)
        except Exception as error:
            why = _line(error)
        parts: list[Any] = [None] * self.mesh.world_size
        dist.all_gather_object(parts, (results, files, why), group=self._group)
        why = next((why for _, _, why in parts if why), None)
        if self.mesh.is_main:
            try:
                if why is None:
                    self._publish(save, [results for results, _, _ in parts], [files for _, files, _ in parts])
                else:
                    shutil.rmtree(save.partial, ignore_errors=True)
            except Exception as error:
                why = _line(error)
                shutil.rmtree(save.partial, ignore_errors=True)
        box = [why]
        dist.broadcast_object_list(box, src=0, group=self._group)
        if box[0]:
            raise self._failed(save, box[0])

    def _publish(self, save: Save, results: list[Any], files: list[manifest.Entries]) -> None:
        save.writer.finish(save.metadata, results)
        save_config(CheckpointingConfig(*BACKEND), str(save.partial / SHARDS))
        manifest.write_synced(save.partial / STATE, save.state)
        written = {name: entry for part in files for name, entry in part.items()}
        others = [str(path.relative_to(save.partial)) for path in save.partial.rglob("*") if path.is_file()]
        written |= manifest.entries(save.partial, sorted(set(others) - set(written)))
        manifest.publish(save.partial, save.final, written)
        self._retain(save.final)

    def _retain(self, newest: Path) -> None:
        """Remove what is older than the newest `keep`, and what is not whole: `newest` is, so that it stays whatever is."""
        found = _steps(self.folder)
        whole = [path for path in found[: found.index(newest)] if _has_all(path)]
        kept = {newest, *whole[max(0, len(whole) - self.keep + 1) :]}
        for path in set(found) - kept:
            going = path.with_name(f".replaced_{path.name}")  # half deleted it must not be found
            with suppress(OSError):
                path.rename(going)
            shutil.rmtree(going, ignore_errors=True)

    @contextmanager
    def _agreed(self, save: Save) -> Iterator[None]:
        """Raises RunFailed on every rank when the main one fails inside. Collective."""
        why = None
        try:
            yield
        except OSError as error:
            why = _line(error)
        why = self.mesh.broadcast_object(why)
        if why:
            raise self._failed(save, why)

    def _failed(self, save: Save, why: str) -> RunFailed:
        whole = [path.name for path in _steps(self.folder) if _has_all(path)]
        last = f"{whole[-1]} is whole and stays" if whole else "there is none before it"
        return RunFailed(
            f"the checkpoint of step {save.step} cannot be written to {self.folder} ({why}); {last}; "
            "make room or set the folder's permissions, then set resume=auto"
        )

    def _sharded(self, is_loading: bool = False) -> dict[str, Any]:
        return {name: _sharded_policy(name, policy, is_loading) for name, policy in self.policies.items()}


def _line(error: BaseException) -> str:
    """What went wrong; of a chain of errors the system's own, which torch and Megatron hide behind theirs."""
    chain, last = [error], error
    while last := last.__cause__ or last.__context__:
        chain.append(last)
    error = next((one for one in chain if isinstance(one, OSError)), error)
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _layout(mesh: Mesh) -> dict[str, int]:
    degrees = ("world_size", "dp", "tp", "pp", "vpp", "cp", "ep", "etp")
    return {name: getattr(mesh, name) or 1 for name in degrees}


def _versions() -> dict[str, str]:
    required = {package.name: features.version(package) for package in features.PACKAGES if package.required}
    return {"megarl": __version__} | {name: version for name, version in required.items() if version}


def _leaves(tree: Any, name: str = "") -> dict[str, Any]:
    """The settings by their full names, without those that change no number of a step."""
    if name in ELSEWHERE:
        return {}
    if not isinstance(tree, dict) or not tree:
        return {name: tree} if name else {}
    return {k: v for key, value in tree.items() for k, v in _leaves(value, f"{name}.{key}" if name else key).items()}


def _changes(what: str, was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A line that says what differs from the checkpoint's; none when nothing does, or it does not know."""
    names = [name for name in sorted(was.keys() | now.keys()) if was.get(name) != now.get(name)] if was else []
    if not names:
        return []
    shown = [  # parameters of rewards can be secrets
        name if ".params." in name else f"{name} {was.get(name)!s:.60} -> {now.get(name)!s:.60}" for name in names[:5]
    ]
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return [f"note: other {what} than the checkpoint's, so that the run is another one: {', '.join(shown)}{more}"]


def _steps(folder: Path) -> list[Path]:
    """The `step_*` folders, whole or not, oldest first."""
    found = {path: path.name.removeprefix("step_") for path in folder.glob("step_*") if path.is_dir()}
    return sorted((path for path, number in found.items() if number.isdecimal()), key=lambda path: int(found[path]))


def _problem(path: Path, mesh: Mesh) -> str | None:
    """What is wrong with a checkpoint's files, of which every rank reads its share. Collective."""
    listed = manifest.listed(path)
    if isinstance(listed, str):
        why = listed
    elif listed is not None and STATE not in listed:
        why = f"{manifest.MANIFEST} lists no {STATE}"
    else:
        names = sorted(listed or {})[mesh.rank :: mesh.world_size]
        why = manifest.problem(path, {name: listed[name] for name in names})
        if why is None and not (path / STATE).is_file():
            why = f"no {STATE}"
    return next(filter(None, mesh.all_gather_object(why)), None)


def check_whole(path: Path, mesh: Mesh) -> None:
    """Raises BadInput when a file of a run's checkpoint is missing or not as it was written. Collective.

    What has no manifest (`megarl convert` writes none) is taken as it is.
    """
    why = _problem(path, mesh) if (path / manifest.MANIFEST).exists() else None
    if why:
        raise BadInput(f"{path}: damaged: {why}; give another one")


def _has_all(path: Path) -> bool:
    """Whether all files of a checkpoint are there with their sizes; of one without manifest, the file written last."""
    listed = manifest.listed(path)
    if listed is None:
        return (path / STATE).is_file()
    return not isinstance(listed, str) and manifest.problem(path, listed, checksums=False) is None


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints under `folder` with all their files, oldest first."""
    return [path for path in _steps(folder) if _has_all(path)]


def _sharded_policy(role: str, policy: Policy, is_loading: bool) -> dict[str, Any]:
    model = sharded_modules(role, policy.modules)
    out: dict[str, Any] = {"model": model}
    if policy.optimizer is not None:
        init_state(policy.optimizer)  # one that has not stepped yet, as the policy's while a critic warms up, has none
        # Megatron finds a parameter's state by its tensor in `model`
        out["optimizer"] = policy.optimizer.sharded_state_dict(model, is_loading, metadata=OPTIMIZER_FORMAT)
    _read_quantised(model)
    return out


def _read_quantised(model: dict[str, Any]) -> None:
    """Shards of quantised weights become those of the numbers that they stand for, in place: files hold no FP8, and the views
    that shards are cut by are refused."""
    for shard in nested_values(model):
        if isinstance(shard, (ShardedTensor, ShardedTensorFactory)):
            shard.data = platform.plain(shard.data)


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
        policy.fp8_params.renew(policy.optimizer, policy.chunks)


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
    check_shards(path)
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
    check_shards(path)
    with damaged(path):
        model = sharded_modules(role, modules)
        _read_quantised(model)
        loaded = dist_checkpointing.load({role: {"model": model}}, str(path))
    for index, module in enumerate(modules):
        module.load_state_dict(loaded[role]["model"][f"model{index}"], strict=False)


@contextmanager
def damaged(path: Path) -> Iterator[None]:
    """Raises BadInput when the shards at `path`, read inside it, are damaged or belong to another model."""
    try:
        yield
    except (
        CheckpointingException,
        CheckpointException,
        LookupError,
        OSError,
        RuntimeError,
        ValueError,
        TypeError,
        AttributeError,
    ) as error:
        causes = [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
        line = " ".join(str(causes[0]).split())[:300]
        raise BadInput(f"{path}: cannot be read as a checkpoint of this model ({line}); give another one") from None


def sharded_modules(role: str, modules: list[torch.nn.Module]) -> dict[str, Any]:
    """The shards of this rank's modules, named as in a run's checkpoint, by the same names from either layer provider."""
    out = {}
    for index, module in enumerate(modules):
        state = module.sharded_state_dict(prefix=f"{role}.")
        # pickled by a layer, empty but for the delayed FP8 scales of Transformer Engine
        delayed = module.config.fp8 is not None and module.config.fp8_recipe == "delayed"
        out[f"model{index}"] = {k: v for k, v in state.items() if delayed or not k.endswith(LAYER_STATE)}
    return out
