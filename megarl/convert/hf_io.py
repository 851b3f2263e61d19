"""Hugging Face folders on disk: lazy reading and sharded, atomic writing. Safetensors only; nothing is unpickled."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megarl.errors import BadInput

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PROVENANCE = "megarl_generate.json"  # the settings a checkpoint was generated from
FLOATS = ("F64", "F32", "F16", "BF16")


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The object in a JSON file. Raises BadInput when it is missing or malformed."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; {what}") from None
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: not readable as JSON ({one_line(error)}); {what}") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path}: must be a JSON object; {what}")
    return value


def read_config(path: str | Path) -> dict[str, Any]:
    """The config.json of a checkpoint folder. Raises BadInput."""
    return read_json(Path(path) / "config.json", "give the folder of a Hugging Face checkpoint")


def pad_token_id(path: str | Path) -> int | None:
    """The padding token of a checkpoint folder: of config.json, the generation config, or the tokenizer; None: none.

    transformers reads a reward model's score at the last token that is not this one.
    """
    folder = Path(path)
    for name in ("config.json", "generation_config.json"):
        if (folder / name).exists():
            found = read_json(folder / name, "restore the checkpoint").get("pad_token_id")
            if found is not None:
                return found
    if not (folder / "tokenizer_config.json").exists():
        return None
    token = read_json(folder / "tokenizer_config.json", "restore the tokenizer").get("pad_token")
    token = token["content"] if isinstance(token, dict) else token
    if token is None or not (folder / "tokenizer.json").exists():
        return None
    tokenizer = read_json(folder / "tokenizer.json", "restore the tokenizer")
    known = {entry["content"]: entry["id"] for entry in tokenizer.get("added_tokens") or []}
    return known.get(token)


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


class HFReader:
    """Tensors of a checkpoint folder, read by ranges; files are opened (memory-mapped) when first needed.

    Raises BadInput, in one line, for a missing or truncated file, a missing tensor, a shape other than expected, and
    numbers that are not plain floats.
    """

    def __init__(self, path: str | Path):
        self.folder = Path(path)
        self._open: dict[str, Any] = {}
        if (self.folder / INDEX).exists():
            weight_map = read_json(self.folder / INDEX, "download the checkpoint again").get("weight_map")
            if not isinstance(weight_map, dict):
                raise BadInput(f"{self.folder / INDEX}: weight_map is missing; download the checkpoint again")
            self.files: dict[str, str] = weight_map
        elif (self.folder / SINGLE).exists():
            self.files = dict.fromkeys(self._file(SINGLE).keys(), SINGLE)
        else:
            raise BadInput(
                f"{self.folder}: neither {SINGLE} nor {INDEX} is there; only safetensors weights are read, "
                "convert other formats with transformers' save_pretrained first"
            )

    def _file(self, name: str):
        if name not in self._open:
            try:
                self._open[name] = safe_open(self.folder / name, framework="pt")
            except FileNotFoundError:
                raise BadInput(
                    f"{self.folder / name}: no such file, though {INDEX} names it; download it again"
                ) from None
            except (SafetensorError, OSError) as error:
                raise BadInput(
                    f"{self.folder / name}: truncated or not a safetensors file ({one_line(error)}); download it again"
                ) from None
        return self._open[name]

    def _slice(self, name: str):
        if name not in self.files:
            raise BadInput(f"{self.folder}: tensor {name} is missing; the files do not fit config.json")
        try:
            return self._file(self.files[name]).get_slice(name)
        except SafetensorError as error:
            raise BadInput(
                f"{self.folder / self.files[name]}: no tensor {name}, though {INDEX} names it ({one_line(error)}); "
                "download it again"
            ) from None

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """The tensor is there, has this shape and holds floats. Raises BadInput otherwise."""
        entry = self._slice(name)
        if tuple(entry.get_shape()) != shape:
            raise BadInput(
                f"{self.folder / self.files[name]}: {name} has shape {list(entry.get_shape())} where config.json "
                f"makes it {list(shape)}; use the config.json that belongs to these weights"
            )
        if entry.get_dtype() not in FLOATS:
            raise BadInput(
                f"{self.folder / self.files[name]}: {name} is stored as {entry.get_dtype()}; only "
                f"{', '.join(FLOATS)} are read, give the unquantised checkpoint"
            )

    def read(self, name: str, index: tuple[slice, ...]) -> Tensor:
        """`tensor[index]` on the CPU, in the file's dtype; only these bytes are read."""
        return self._slice(name)[index]


def check_names(reader: HFReader, expected: set[str], harmless: tuple[str, ...]) -> None:
    """Raises BadInput when the file holds a tensor that this model would not use."""
    for name in sorted(reader.files):
        if name not in expected and not name.endswith(harmless):
            raise BadInput(
                f"{reader.folder}: tensor {name} belongs to no part of this model; "
                "use the config.json that belongs to these weights"
            )


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place when the block ends well and vanishes otherwise.

    Whatever stood at `path` is replaced in one rename. Raises BadInput when the place cannot be written.
    """
    target = Path(path)
    temporary, old = (target.parent / f".{target.name}.{kind}-{os.getpid()}" for kind in ("new", "old"))
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise BadInput(f"{target}: cannot be written ({error.strerror}); give a folder you can write to") from None
    try:
        yield temporary
        if target.exists():
            target.rename(old)
        temporary.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


class ShardedWriter:
    """Writes tensors to safetensors files of at most `max_bytes` (but at least one tensor), with an index if several.

    Holds copies of at most one file's tensors in host memory.
    """

    def __init__(self, folder: Path, max_bytes: int = 2 << 30):
        self.folder, self.max_bytes = folder, max_bytes
        self.pending: dict[str, Tensor] = {}
        self.pending_bytes = self.total_bytes = 0
        self.parts: list[list[str]] = []

    def add(self, name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> None:
        size = tensor.numel() * (dtype or tensor.dtype).itemsize
        if self.pending and self.pending_bytes + size > self.max_bytes:
            self._flush()
        self.pending[name] = torch.empty(tensor.shape, dtype=dtype or tensor.dtype).copy_(tensor.detach())
        self.pending_bytes += size

    def _flush(self) -> None:
        self.parts.append(list(self.pending))
        save_file(self.pending, self.folder / f"part-{len(self.parts)}", metadata={"format": "pt"})
        self.total_bytes += self.pending_bytes
        self.pending, self.pending_bytes = {}, 0

    def close(self) -> None:
        """Writes what is left, and gives the files the names transformers and vLLM look for."""
        self._flush()
        count = len(self.parts)
        names = [SINGLE] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        for i, name in enumerate(names):
            (self.folder / f"part-{i + 1}").rename(self.folder / name)
        if count > 1:
            weight_map = {tensor: name for name, part in zip(names, self.parts) for tensor in part}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            write_json(self.folder / INDEX, index)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def copy_side_files(source: str | Path, folder: Path) -> None:
    """What a checkpoint folder holds besides weights: config.json, tokenizer, generation config, chat template."""
    for file in sorted(Path(source).iterdir()):
        weights = file.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")
        if file.is_file() and not weights and not file.name.endswith(".index.json") and file.name != PROVENANCE:
            shutil.copyfile(file, folder / file.name)
