"""Safetensors files written tensor by tensor: what each will hold is known before its first number is."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from megarl.convert.hf_io import INDEX, SINGLE, write_json
from megarl.convert.reader import DTYPES
from megarl.errors import RunFailed

NAMES = {dtype: name for name, dtype in DTYPES.items()}
PIECE = 8 << 20  # bytes of a tensor in another dtype or on a device that are held at once
SYNC = 64 << 20  # bytes after which the disk starts to work while the next tensors come

Layout = tuple[torch.dtype, tuple[int, ...]]  # of one tensor


class ShardedWriter:
    """Writes the named tensors, in any order, to files of at most `max_bytes` (but at least one tensor), with an index
    if there are several. Nothing is held in memory.

    A file gets its name when all its tensors are in it and on the disk: files with their names that are there from an
    earlier attempt at the same tensors are complete and stay (`finished`). `on_bytes` is told what has been written.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Mapping[str, Layout],
        max_bytes: int = 2 << 30,
        name: str | None = None,
        on_bytes: Callable[[int], None] = lambda count: None,
    ):
        self.folder, self.on_bytes = folder, on_bytes
        groups = _split(tensors, math.inf if name else max_bytes)
        self.files = dict(zip([name] if name else _file_names(len(groups)), groups))
        self.total_bytes = sum(_size(layout) for layout in tensors.values())
        self.finished = {t for name, group in self.files.items() if (folder / name).exists() for t in group}
        self._file_of = {tensor: name for name, group in self.files.items() for tensor in group}
        self._missing = {name: set(group) - self.finished for name, group in self.files.items()}
        self._starts: dict[str, int] = {}
        self._open: dict[str, BinaryIO] = {}
        self._disk = ThreadPoolExecutor(1)
        self._syncs: list[Future[None]] = []
        self._unsynced = 0
        on_bytes(sum(_size(tensors[tensor]) for tensor in self.finished))

    def add(self, name: str, tensor: Tensor) -> None:
        """Writes one tensor, in the dtype that was planned for it."""
        if name in self.finished:
            return
        file, (dtype, shape) = self._file(name), self.files[self._file_of[name]][name]
        if tuple(tensor.shape) != shape:
            raise RunFailed(f"export: {name} has shape {list(tensor.shape)}, not {list(shape)}")
        start = self._starts[name]
        for piece in _pieces(tensor.detach(), dtype):
            self._put(file, piece, start)
            start += piece.nbytes
        self._done(name)

    def add_rows(self, name: str, first: int, rows: Tensor, last: bool) -> None:
        """Writes some rows of a tensor; `last`: they are the last ones."""
        if name not in self.finished:
            step = _size(self.files[self._file_of[name]][name]) // self.files[self._file_of[name]][name][1][0]
            self._put(self._file(name), rows, self._starts[name] + first * step)
            if last:
                self._done(name)

    def close(self) -> None:
        """Writes the index. Raises RunFailed when a tensor never came."""
        for missing in self._missing.values():
            if missing:
                raise RunFailed(f"export: {min(missing)} was never written")
        if len(self.files) > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": self._file_of}
            write_json(self.folder / INDEX, index)

    def _file(self, tensor: str) -> BinaryIO:
        name = self._file_of[tensor]
        if name not in self._open:
            header, starts = _header(self.files[name])
            self._open[name] = (self.folder / f"{name}.part").open("wb", buffering=0)
            self._open[name].write(header)
            self._starts |= starts
        return self._open[name]

    def _put(self, file: BinaryIO, piece: Tensor, at: int) -> None:
        memory = memoryview(piece.reshape(-1).view(torch.uint8).numpy())
        while memory:
            count = os.pwrite(file.fileno(), memory, at)
            self.on_bytes(count)
            memory, at = memory[count:], at + count
            self._unsynced += count
        if self._unsynced > SYNC:
            self._sync(file)

    def _sync(self, file: BinaryIO) -> None:
        while self._syncs and (len(self._syncs) > 2 or self._syncs[0].done()):
            self._syncs.pop(0).result()
        self._syncs.append(self._disk.submit(os.fsync, file.fileno()))
        self._unsynced = 0

    def _done(self, tensor: str) -> None:
        name = self._file_of[tensor]
        self._missing[name].discard(tensor)
        if not self._missing[name]:
            with self._open.pop(name) as file:
                self._sync(file)
                while self._syncs:
                    self._syncs.pop(0).result()
            (self.folder / f"{name}.part").rename(self.folder / name)


def _file_names(count: int) -> list[str]:
    """The names transformers and vLLM look for."""
    return [SINGLE] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]


def _size(layout: Layout) -> int:
    dtype, shape = layout
    return math.prod(shape) * dtype.itemsize


def _split(tensors: Mapping[str, Layout], max_bytes: float) -> list[dict[str, Layout]]:
    groups: list[dict[str, Layout]] = [{}]
    room = max_bytes
    for name, layout in tensors.items():
        if groups[-1] and _size(layout) > room:
            groups.append({})
            room = max_bytes
        groups[-1][name] = layout
        room -= _size(layout)
    return groups


def _header(tensors: Mapping[str, Layout]) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a file, and where each tensor starts in it. Wide numbers come first, so that all are aligned."""
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    starts, at = {}, 0
    for name, layout in sorted(tensors.items(), key=lambda item: -item[1][0].itemsize):
        stop = at + _size(layout)
        entries[name] = {"dtype": NAMES[layout[0]], "shape": list(layout[1]), "data_offsets": [at, stop]}
        starts[name], at = at, stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, {name: 8 + len(text) + start for name, start in starts.items()}


def _pieces(tensor: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """The tensor's numbers in order, contiguous on the host: itself if it is so, otherwise some rows at a time."""
    if tensor.dtype == dtype and tensor.device.type == "cpu" and tensor.is_contiguous():
        yield tensor
        return
    rows = tensor if tensor.dim() else tensor[None]
    step = max(1, PIECE * len(rows) // max(1, rows.numel() * dtype.itemsize))
    for part in rows.split(step):
        yield part.to("cpu", dtype).contiguous()
