"""Distributed checkpoints without pickle's powers: what they may contain is listed, and seen before it is loaded.

torch.distributed.checkpoint keeps its table of contents (`.metadata`) and small objects beside the tensors as pickles,
and loads both without a limit on what they may call. A checkpoint is a folder that people pass around.
"""

from __future__ import annotations

import functools
import io
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, StorageMeta, TensorStorageMetadata

from megarl.bounds import bounded
from megarl.errors import BadInput

METADATA, COMMON = ".metadata", "common.pt"
LARGEST_METADATA = 1 << 30  # bytes; that of a model with 100,000 tensors has 50 MiB
SECONDS, SPARE, GROWTH = 600.0, 256 << 20, 64  # a table of contents takes some ten times its bytes in memory
_DCP = "torch.distributed.checkpoint"
# Every class that the table of contents of a checkpoint names: plain values, none of which does anything when it is made.
ALLOWED = {
    f"{_DCP}.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    f"{_DCP}.filesystem": {"_StorageInfo", "_StoragePrefix"},
    f"{_DCP}.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "torch": {"Size"} | {name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath"},
}


class NotPlain(ValueError):
    """Bytes that are no table of contents, or hold more than plain values."""


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to another place")


def load_metadata(data: bytes) -> Metadata:
    """The table of contents in `data`, with nothing but plain values in it. Raises NotPlain."""
    try:
        with bounded(SECONDS, SPARE + GROWTH * len(data)):  # one opcode can ask for a memo of 2^32 entries
            found = _Restricted(io.BytesIO(data)).load()
        if not isinstance(found, Metadata):
            raise TypeError(f"a {type(found).__name__}")
        for name, entry in found.state_dict_metadata.items():
            if not isinstance(name, str) or not isinstance(entry, TensorStorageMetadata | BytesStorageMetadata):
                raise TypeError(f"an entry {name!r:.60} of type {type(entry).__name__}")
            if isinstance(entry, TensorStorageMetadata):
                _check_sizes(name, entry)
        for where in (found.storage_data or {}).values():
            _check_place(where)
    except Exception as error:  # whatever bytes that are no pickle make of the machine that reads them
        raise NotPlain(" ".join(f"{METADATA}: {error or type(error).__name__}".split())[:300]) from None
    return found


def _check_sizes(name: str, entry: TensorStorageMetadata) -> None:
    if not isinstance(entry.properties.dtype, torch.dtype):
        raise TypeError(f"{name} has no dtype")
    for shape in (entry.size, *(chunk.sizes for chunk in entry.chunks), *(chunk.offsets for chunk in entry.chunks)):
        if not isinstance(shape, torch.Size) or any(length < 0 for length in shape) or len(shape) != len(entry.size):
            raise ValueError(f"{name} has the shape {shape!r:.60}")


def _check_place(where: Any) -> None:
    name = where.relative_path
    if not isinstance(name, str) or name in ("", ".", "..") or os.sep in name or "\0" in name:
        raise ValueError(f"a file {name!r:.80} that is not in its folder")
    if not all(isinstance(number, int) and number >= 0 for number in (where.offset, where.length)):
        raise ValueError(f"a place {where.offset!r}, {where.length!r} in {name}")
    if getattr(where, "transform_descriptors", None):
        raise ValueError(f"{name} is encoded ({where.transform_descriptors!r:.60})")


def check_shards(folder: str | Path) -> None:
    """Raises BadInput unless everything in a checkpoint's `shards/` that is a pickle holds plain values only, and its
    table of contents names places within the files of that folder. Nothing of it is run, and no tensor read."""
    folder = Path(folder)
    path = folder / METADATA
    try:
        if path.stat().st_size > LARGEST_METADATA:
            raise BadInput(f"{path}: {path.stat().st_size} bytes are no table of contents; give another checkpoint")
        metadata = load_metadata(path.read_bytes())
        path = folder / COMMON
        if path.exists():
            torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}; give the folder of a complete checkpoint") from None
    except BadInput:
        raise
    except Exception as error:  # a damaged zip file can raise anything
        line = " ".join(str(error).split())[:200]
        raise BadInput(f"{path}: refused ({line}); give a checkpoint that megarl wrote") from None
    sizes: dict[str, int] = {}
    for index, where in (metadata.storage_data or {}).items():
        name = where.relative_path
        if name not in sizes:
            file = folder / name
            if not file.resolve().is_relative_to(folder.resolve()) or not file.is_file():
                raise BadInput(f"{file}: no file in its folder, though {METADATA} names it; give another checkpoint")
            sizes[name] = file.stat().st_size
        if where.offset + where.length > sizes[name]:
            raise BadInput(
                f"{folder / name}: {sizes[name]} bytes, but {getattr(index, 'fqn', index)} should lie up to byte "
                f"{where.offset + where.length}; give another checkpoint"
            )


def install() -> None:
    """Makes torch read every checkpoint's table of contents and objects as `check_shards` does."""
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)

    @functools.wraps(FileSystemReader.read_metadata)
    def read_metadata(self: FileSystemReader, *args: Any, **kwargs: Any) -> Metadata:
        path = self._get_metadata_path(kwargs.get("rank"))
        with self.fs.create_stream(path, "rb") as stream:
            found = load_metadata(stream.read())
        if found.storage_meta is None:
            found.storage_meta = StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found

    @functools.wraps(DefaultLoadPlanner.load_bytes)
    def load_bytes(self: DefaultLoadPlanner, read_item: Any, value: io.BytesIO) -> None:
        loaded = torch.load(value, map_location="cpu", weights_only=True)
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[read_item.dest_index.fqn], loaded)
        else:
            self.state_dict[read_item.dest_index.fqn] = loaded

    FileSystemReader.read_metadata = read_metadata
    DefaultLoadPlanner.load_bytes = load_bytes
