"""The weights of Megatron's distributed checkpoints, one parameter or one layer at a time: no model is ever whole.

The model is built without memory (on torch's meta device). Its sharded state dict says what belongs where; a view of a
meta tensor is known by its storage, so that numbers are read when a file wants them and forgotten afterwards.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo, _StoragePrefix
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from megarl.checkpoint import damaged, sharded_modules
from megarl.convert.hf_io import write_json
from megarl.convert.load import matched
from megarl.convert.stream import Weights
from megarl.errors import BadInput, RunFailed
from megarl.models.spec import ModelSpec

from megatron.core import dist_checkpointing  # isort: skip
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory  # isort: skip
from megatron.core.dist_checkpointing.strategies.torch import (  # isort: skip
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)

Key = int  # of a storage


class WithoutMemory(TorchFunctionMode):
    """Inside it every new tensor is on the meta device, whatever device its maker asks for, and stays there."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _device_constructors():
            kwargs = kwargs | {"device": "meta"}
        elif func is Tensor.to and isinstance(args[0], Tensor) and args[0].is_meta:
            dtype = next((a for a in (*args[1:], *kwargs.values()) if isinstance(a, torch.dtype)), args[0].dtype)
            args, kwargs = (args[0], dtype), {}
        return func(*args, **kwargs)


def write_shards(
    folder: Path,
    chunks: list[nn.Module],
    spec: ModelSpec,
    role: str,
    fill: Callable[[str, Tensor], None],
    on_bytes: Callable[[int], None] = lambda count: None,
) -> None:
    """Write meta `chunks` as the shards of a checkpoint; `fill(name, tensor)` gives a parameter its numbers. Collective.

    Every block (layer) is a file of its own, and one that an earlier attempt completed in `folder` is not written again.
    Raises BadInput or RunFailed, on every rank.
    """
    state = {role: {"model": sharded_modules(role, chunks)}}
    try:
        dist_checkpointing.save(state, str(folder), _Strategy(_Parameters(chunks, spec, fill), on_bytes))
    except CheckpointException as error:
        raise _cause(error) from None


def checkpoint_weights(path: Path, chunks: list[nn.Module], spec: ModelSpec, role: str) -> Weights:
    """The weights of a checkpoint's shards in the layout of meta `chunks`, read a block at a time.

    Fetching raises BadInput when the shards are damaged or belong to another model.
    """
    names = _Parameters(chunks, spec, None).names
    entries: dict[str, tuple[str, str, Any]] = {}  # parameter -> model chunk, key in it, shard
    for chunk, tensors in sharded_modules(role, chunks).items():
        for key, shard in tensors.items():
            if isinstance(shard, (ShardedTensor, ShardedTensorFactory)) and _storage(shard.data) in names:
                entries[names[_storage(shard.data)]] = (chunk, key, shard)

    def fetch(block: list[str]) -> Mapping[str, Tensor]:
        wanted: dict[str, dict[str, Any]] = {chunk: {} for chunk, _, _ in entries.values()}
        mine = [name for name in block if name in entries]
        for name in mine:
            chunk, key, shard = entries[name]
            wanted[chunk][key] = replace(shard, data=torch.empty(shard.data.shape, dtype=shard.data.dtype))
        with damaged(path):
            found = dist_checkpointing.load({role: {"model": wanted}}, str(path))[role]["model"]
        return {name: found[entries[name][0]][entries[name][1]] for name in mine}

    dtypes = {name: tensor.dtype for name, (_, tensor) in matched(chunks, spec).items()}
    return Weights(dtypes, fetch)


def _storage(tensor: Tensor) -> Key:
    return tensor.untyped_storage()._cdata


class _Parameters:
    """The parameters behind views of meta tensors, given numbers one at a time."""

    def __init__(self, chunks: list[nn.Module], spec: ModelSpec, fill: Callable[[str, Tensor], None] | None) -> None:
        self.tensors = {name: tensor for name, (_, tensor) in matched(chunks, spec).items()}
        self.names = {_storage(tensor): name for name, tensor in self.tensors.items()}
        self._fill = fill
        self._last: tuple[str, Tensor] | None = None

    def block(self, view: Tensor) -> str:
        """The layer a view belongs to: "decoder.layers.7", or the first part of its name."""
        parts = self._name(view).split(".")
        return ".".join(parts[:3] if parts[1] == "layers" else parts[:1])

    def numbers(self, view: Tensor) -> Tensor:
        """The view with numbers in it."""
        name = self._name(view)
        if self._last is None or self._last[0] != name:
            self._last = None
            whole = torch.empty(self.tensors[name].shape, dtype=self.tensors[name].dtype)
            self._fill(name, whole)
            self._last = (name, whole)
        return self._last[1].as_strided(view.shape, view.stride(), view.storage_offset())

    def _name(self, view: Tensor) -> str:
        if _storage(view) not in self.names:
            raise RunFailed(f"conversion: the learner saves a tensor {list(view.shape)} that no rule of its table fills")
        return self.names[_storage(view)]


class _Strategy(TorchDistSaveShardedStrategy):
    """Megatron's format, written by torch itself, which asks for one tensor after the other."""

    def __init__(self, parameters: _Parameters, on_bytes: Callable[[int], None]) -> None:
        super().__init__("torch_dist", 1, thread_count=1)
        self._parameters, self._on_bytes = parameters, on_bytes

    def save(self, sharded_state_dict: dict, checkpoint_dir: str) -> None:
        shards, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        dcp.save(
            mcore_to_pyt_state_dict(shards, False),
            storage_writer=_Writer(checkpoint_dir, self._on_bytes),
            planner=_Planner(self._parameters),
        )


class _Planner(MCoreSavePlanner):
    def __init__(self, parameters: _Parameters) -> None:
        super().__init__(flatten_state_dict=False)
        self.parameters = parameters

    def transform_object(self, write_item: Any, object: Any) -> Any:
        return self.parameters.numbers(object) if isinstance(object, Tensor) else object

    def block(self, item: Any) -> str:
        found = self.lookup_object(item.index)
        return self.parameters.block(found) if isinstance(found, Tensor) else "objects"


class _Writer(dcp.FileSystemWriter):
    """One file for each block, and beside it, until all are there, what is in it."""

    def __init__(self, path: str, on_bytes: Callable[[int], None]) -> None:
        super().__init__(path)
        self._on_bytes = on_bytes

    def write_data(self, plan: dcp.SavePlan, planner: _Planner) -> Future[list[WriteResult]]:
        blocks: dict[str, list] = defaultdict(list)
        for item in plan.items:
            blocks[planner.block(item)].append(item)
        results: list[WriteResult] = []
        for block, items in blocks.items():
            prefix = f"{plan.storage_data.prefix}{block.replace('.', '_')}_"
            record = Path(self.path) / f"{prefix}0.json"
            if not record.exists():
                part = replace(plan, items=items, storage_data=_StoragePrefix(prefix))
                _write_record(record, super().write_data(part, planner).value())
            found = _read_record(record)
            self._on_bytes(sum(result.size_in_bytes for result in found))
            results += found
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: dcp.Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        for record in Path(self.path).glob("__*.json"):
            record.unlink()


def _write_record(path: Path, results: list[WriteResult]) -> None:
    rows = [
        [r.index.fqn, r.index.offset, r.index.index, r.size_in_bytes]
        + [r.storage_data.relative_path, r.storage_data.offset, r.storage_data.length]
        for r in results
    ]
    write_json(path.with_suffix(".new"), {"results": rows})
    os.replace(path.with_suffix(".new"), path)


def _read_record(path: Path) -> list[WriteResult]:
    return [
        WriteResult(MetadataIndex(name, offset and torch.Size(offset), index), size, _StorageInfo(*where))
        for name, offset, index, size, *where in json.loads(path.read_text())["results"]
    ]


def _cause(error: CheckpointException) -> Exception:
    """What made the first rank fail: our own error as it was raised, a full disk in one line."""
    causes = [failure[0] for _, failure in sorted(error.failures.items())]
    for kind in (BadInput, RunFailed):
        for cause in causes:
            if isinstance(cause, kind):
                return cause
    line = " ".join(str(causes[0]).split())[:300]
    return RunFailed(f"conversion: writing failed ({line}); free some space or give another folder")
