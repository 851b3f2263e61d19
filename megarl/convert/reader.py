"""The tensors of a Hugging Face folder, read by byte ranges into the memory they belong in. Safetensors only."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megarl.convert.encodings import Index, encoding_of
from megarl.convert.hf_io import INDEX, SINGLE, check_inside, one_line, read_config, read_json
from megarl.errors import BadInput

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
FLOATS = ("F64", "F32", "F16", "BF16")
PIECE = 8 << 20  # bytes held beside the target while reading
RUN = 4096  # bytes: a shorter stretch comes with its whole row, a disk would read it anyway


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies."""

    file: str
    dtype: str  # as safetensors names it
    shape: tuple[int, ...]
    start: int  # first byte in the file
    size: int  # bytes


class HFReader:
    """Tensors of a checkpoint folder. The headers of all its files are read at once, the data by ranges when asked for.

    `only`: this one file instead of those the folder's index names. Raises BadInput, in one line that names the tensor
    or the file, for what is missing, truncated, there twice or not where the index says, for a shape other than
    expected, for numbers that are no floats, and for floats that are not finite.
    """

    def __init__(self, path: str | Path, only: str | None = None):
        self.folder = Path(path)
        self.encoding = encoding_of(read_config(path), str(self.folder / "config.json"))
        self.tensors: dict[str, Stored] = {}
        self._files: dict[str, Any] = {}
        weight_map = {} if only else self._weight_map()
        for name in [only] if only else sorted(set(weight_map.values())) or [SINGLE]:
            for tensor, stored in self._header(name).items():
                if tensor in self.tensors:
                    raise BadInput(
                        f"{self.folder}: tensor {tensor} is in {self.tensors[tensor].file} and in {name}; keep one of them"
                    )
                self.tensors[tensor] = stored
        for tensor, name in weight_map.items():
            found = self.tensors.get(tensor)
            if found is None or found.file != name:
                where = f"it is in {found.file}" if found else "no file has it"
                raise BadInput(f"{self.folder / name}: no tensor {tensor}, though {INDEX} names it ({where}); download it again")

    def _weight_map(self) -> dict[str, str]:
        """Tensor -> file of the index; empty: a single file."""
        index, single = self.folder / INDEX, self.folder / SINGLE
        if index.exists() and single.exists():
            raise BadInput(f"{self.folder}: has {SINGLE} and {INDEX}, two sets of weights; keep one of them")
        if index.exists():
            weight_map = read_json(index, "download the checkpoint again").get("weight_map")
            names = weight_map.values() if isinstance(weight_map, dict) else [None]
            if not all(isinstance(name, str) and Path(name).name == name for name in names):
                raise BadInput(f"{index}: weight_map does not name a file for each tensor; download the checkpoint again")
            return weight_map
        if not single.exists():
            raise BadInput(
                f"{self.folder}: neither {SINGLE} nor {INDEX} is there; only safetensors weights are read, "
                "convert other formats with transformers' save_pretrained first"
            )
        return {}

    def _header(self, name: str) -> dict[str, Stored]:
        path = self.folder / name
        check_inside(self.folder, path)
        try:
            with safe_open(path, framework="pt"):  # checks that header and size agree
                pass
            self._files[name] = path.open("rb", buffering=0)
            length = int.from_bytes(self._files[name].read(8), "little")
            header = json.loads(self._files[name].read(length))
        except FileNotFoundError:
            raise BadInput(f"{path}: no such file, though {INDEX} names it; download it again") from None
        except (SafetensorError, OSError, ValueError) as error:
            raise BadInput(
                f"{path}: truncated or not a safetensors file ({one_line(error)}); download it again"
            ) from None
        out = {}
        for tensor, entry in header.items():
            if tensor != "__metadata__":
                if entry["dtype"] not in DTYPES:
                    raise BadInput(f"{path}: {tensor} is stored as {entry['dtype']}; only {', '.join(DTYPES)} are read")
                first, last = entry["data_offsets"]
                out[tensor] = Stored(name, entry["dtype"], tuple(entry["shape"]), 8 + length + first, last - first)
        return out

    def encoded(self, name: str) -> bool:
        """Whether `name` is stored as the folder's encoding says, rather than as plain floats."""
        return self.encoding is not None and all(part in self.tensors for part in self.encoding.parts(name))

    def parts(self, name: str) -> tuple[str, ...]:
        """The stored tensors that make up `name`."""
        return self.encoding.parts(name) if self.encoded(name) else (name,)

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """The tensor is there, has this shape and holds floats. Raises BadInput otherwise."""
        encoded = self.encoded(name)
        if not encoded and name not in self.tensors:
            raise BadInput(f"{self.folder}: tensor {name} is missing; the files do not fit config.json")
        stored = self.tensors[self.parts(name)[0]]
        found = self.encoding.shape(self, name) if encoded else stored.shape
        if found != shape:
            raise BadInput(
                f"{self.folder / stored.file}: {name} has shape {list(found)} where config.json "
                f"makes it {list(shape)}; use the config.json that belongs to these weights"
            )
        if not encoded and stored.dtype not in FLOATS:
            raise BadInput(
                f"{self.folder / stored.file}: {name} is stored as {stored.dtype}; only "
                f"{', '.join(FLOATS)} are read, give the unquantised checkpoint"
            )

    def read_into(self, target: Tensor, name: str, index: Index) -> None:
        """`target[...] = name[index]` in the target's dtype; reads these bytes only and holds a few MiB beside it.

        The target has the numbers in the same order, with dimensions behind the first perhaps cut in two.
        Raises BadInput when a number is not finite.
        """
        encoded = self.encoded(name)
        stored = self.tensors[self.parts(name)[0]]
        for first, rows in _row_pieces(index, stored):
            part = target[first : first + rows[0].stop - rows[0].start] if rows else target
            if encoded:
                numbers = self.encoding.decode(self, name, rows)
                part.copy_(numbers.reshape(part.shape))
            elif part.dtype == DTYPES[stored.dtype] and part.device.type == "cpu" and part.is_contiguous():
                self._fill(part, stored, rows)
                numbers = part
            else:
                numbers = self.stored(name, rows)
                part.copy_(numbers.view(part.shape))
            # a sum is the cheapest pass that no nan or inf survives; one of float16 may overflow without them
            if not torch.isfinite(numbers.sum()) and not torch.isfinite(numbers).all():
                raise BadInput(
                    f"{self.folder / stored.file}: {name} holds a nan or an infinite number; download it again, or train "
                    "from an earlier checkpoint"
                )

    def read(self, name: str, index: Index) -> Tensor:
        """`name[index]` on the CPU: in the file's dtype, or float32 when encoded."""
        dtype = torch.float32 if self.encoded(name) else DTYPES[self.tensors[name].dtype]
        out = torch.empty([s.stop - s.start for s in index], dtype=dtype)
        self.read_into(out, name, index)
        return out

    def stored(self, name: str, index: Index | None = None) -> Tensor:
        """`name[index]` (none: all of it) as it is stored, encoded or not."""
        entry = self.tensors[name]
        index = tuple(slice(0, n) for n in entry.shape) if index is None else index
        out = torch.empty([s.stop - s.start for s in index], dtype=DTYPES[entry.dtype])
        self._fill(out, entry, index)
        return out

    def _fill(self, out: Tensor, entry: Stored, index: Index) -> None:
        """The bytes of `index` into contiguous memory."""
        width = DTYPES[entry.dtype].itemsize
        cut = max((d for d, s in enumerate(index) if s.stop - s.start < entry.shape[d]), default=0)
        run = math.prod(s.stop - s.start for s in index[cut:]) * width  # bytes that lie together
        count = math.prod(s.stop - s.start for s in index[:cut])
        if count > 1 and run < RUN:
            whole = (*index[:cut], slice(0, entry.shape[cut]), *index[cut + 1 :])
            wide = torch.empty([s.stop - s.start for s in whole], dtype=out.dtype)
            self._fill(wide, entry, whole)
            out.copy_(wide[(slice(None),) * cut + (index[cut],)])
            return
        memory = memoryview(out.reshape(-1).view(torch.uint8).numpy())
        steps = [math.prod(entry.shape[d + 1 :]) * width for d in range(len(index))]
        tail = sum(s.start * step for s, step in zip(index[cut:], steps[cut:]))
        for i in range(count):
            at, rest = entry.start + tail, i
            for s, step in zip(reversed(index[:cut]), reversed(steps[:cut])):
                rest, digit = divmod(rest, s.stop - s.start)
                at += (s.start + digit) * step
            self._read(memory[i * run : (i + 1) * run], entry.file, at)

    def _read(self, memory: memoryview, file: str, at: int) -> None:
        while memory:
            try:
                count = os.preadv(self._files[file].fileno(), [memory], at)
            except OSError as error:
                raise BadInput(f"{self.folder / file}: cannot be read ({one_line(error)}); download it again") from None
            if not count:
                raise BadInput(f"{self.folder / file}: was cut while it was read; download it again")
            memory, at = memory[count:], at + count


def _row_pieces(index: Index, stored: Stored) -> Iterator[tuple[int, Index]]:
    """(first row in the target, index) of stretches of the first dimension of at most `PIECE` bytes."""
    if not index:
        yield 0, index
        return
    rows, rest = index[0], index[1:]
    step = max(1, PIECE * max(1, stored.shape[0]) // max(1, stored.size))
    for first in range(rows.start, rows.stop, step):
        yield first - rows.start, (slice(first, min(first + step, rows.stop)), *rest)


def check_names(reader: HFReader, expected: set[str], harmless: tuple[str, ...], aside: tuple[str, ...] = ()) -> None:
    """Raises BadInput when the files hold a tensor that this model would not use.

    `harmless`: endings of names that may be there; `aside`: beginnings of names that an export writes back.
    """
    used = {part for name in expected for part in reader.parts(name)}
    for name in sorted(reader.tensors):
        if name not in used and not name.endswith(harmless) and not (aside and name.startswith(aside)):
            raise BadInput(
                f"{reader.folder}: tensor {name} belongs to no part of this model; "
                "use the config.json that belongs to these weights"
            )
