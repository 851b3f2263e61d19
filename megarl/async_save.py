"""A save of Megatron's shards in two halves: planned and copied by all ranks together, then written by any thread.

`dist_checkpointing.save` plans which rank writes what and, asked for an asynchronous save, hands the plan over instead of
writing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed import ProcessGroup

from megarl import platform

platform.setup()

from megatron.core import dist_checkpointing  # noqa: E402
from megatron.core.dist_checkpointing.dict_utils import nested_values  # noqa: E402
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest  # noqa: E402
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper  # noqa: E402
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy  # noqa: E402

SHARDS = "shards"
BACKEND = ("torch_dist", 1)


@dataclass
class Save:
    """A checkpoint that is being written: what this rank has to write, once `Planner.plan` was called with it."""

    step: int
    partial: Path
    final: Path
    state: str = ""  # the main rank's
    writer: Any = None
    metadata: Any = None  # the main rank's: where every rank's tensors will be

    @property
    def names(self) -> list[str]:
        """The files that this rank writes, in `partial`."""
        return [f"{SHARDS}/{name}" for _path, name, _data in self.writer.write_buckets]

    def write(self) -> list[Any]:
        """This rank's shards, to its files; Megatron's account of what is where in them. Raises OSError and what else
        writing raises."""
        run, _preload, arguments = self.writer.get_save_function_and_args()
        with _without_crc32():
            if run is not None:
                run(*arguments)
        results = self.writer.retrieve_write_results()
        if not isinstance(results, list):  # an exception, and where it was raised
            raise results[0]
        return results


class Planner:
    """Plans the saves of one run; the first one costs more than those after it, which have the same tensors.

    The ranks of `group`, which hold the same tensors, share the writing of them.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self._strategy = _Strategy(*BACKEND, thread_count=1, cached_metadata=True)
        self._shared = FullyParallelSaveStrategyWrapper(self._strategy, group, do_cache_distribution=True)

    def plan(self, shards: dict[str, Any], save: Save, copy: bool) -> None:
        """Fills `save` with what this rank is to write of `shards`, on the host; collective.

        With `copy` the caller may go on to change what it gave. Raises OSError or RuntimeError where the main rank cannot
        write what Megatron writes first.
        """
        live = {item.data.untyped_storage().data_ptr() for item in nested_values(shards) if _has_tensor(item)}
        unchecked = self._strategy.cached_central_plan is None
        folder = str(save.partial / SHARDS)
        dist_checkpointing.save(shards, folder, self._shared, None, unchecked, async_sharded_save=True)
        save.writer, save.metadata = self._strategy.planned()
        shared = live if copy else set()
        save.writer.write_buckets = [
            (path, name, (data, [(item, _on_host(tensor, shared)) for item, tensor in tensors]))
            for path, name, (data, tensors) in save.writer.write_buckets
        ]


class _Strategy(TorchDistSaveShardedStrategy):
    """Megatron's format, planned by `dist_checkpointing.save` and then written by whoever asks for the plan."""

    _planned: tuple[Any, Any] = (None, None)

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any) -> AsyncRequest:
        self._planned = (writer, planned[1])
        return AsyncRequest(None, (), [])

    def planned(self) -> tuple[Any, Any]:
        """The writer with its tensors, and on the main rank the metadata of all; to be asked for once."""
        planned, self._planned = self._planned, (None, None)
        return planned


@contextmanager
def _without_crc32() -> Iterator[None]:
    """A third of what writing costs, and the files have checksums of their own; a save of someone else's in the meantime
    is readable without them too."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _has_tensor(item: Any) -> bool:
    return isinstance(getattr(item, "data", None), torch.Tensor)


def _on_host(tensor: torch.Tensor, shared: set[int]) -> torch.Tensor:
    """On the host, and not in one of the `shared` memories: `Tensor.to("cpu")` copies nothing on a CPU, and Megatron copies
    views only, so that a step taken during the save would be in it."""
    if tensor.device.type == "cpu" and tensor.untyped_storage().data_ptr() not in shared:
        return tensor
    return tensor.to("cpu", copy=True)
