"""Rows of the data sources, one dict each, with where they came from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megarl.errors import BadInput
from megarl.rewards.tasks import create_dataset

if TYPE_CHECKING:
    from megarl.config.schema import DataSource

# reasoning-gym makes row i from seed + i: neighbouring seeds would give the same rows, shifted by one.
SEED_STRIDE = 1_000_003
TEXT_FIELDS = ("text", "prompt", "response")


class Row(dict):
    """The fields of a row, and its `origin` ("FILE:LINE", ...) for error messages."""

    def __init__(self, fields: dict[str, Any], origin: str) -> None:
        super().__init__(fields)
        self.origin = origin


def label(source: DataSource) -> str:
    """A short name of the source, for metrics and prompt ids."""
    return source.task if source.type == "reasoning_gym" else Path(source.path or "").stem


def load_rows(source: DataSource) -> Iterator[Row]:
    """The rows of `source` in order.

    A reasoning-gym entry becomes `prompt`, `response` and `answer` (both its answer) and `entry` (all of it, for its
    own scorer); its generator's seed is `seed * SEED_STRIDE`. Raises BadInput with file and line for an empty or
    malformed row, and for a source without any.
    """
    readers = {"jsonl": _jsonl, "parquet": _parquet, "hf": _hf, "reasoning_gym": _reasoning_gym}
    needed = "task" if source.type == "reasoning_gym" else "path"
    if not getattr(source, needed):
        raise BadInput(f"data source of type {source.type} has no {needed}: set it")
    empty = True
    for row in readers[source.type](source):
        empty = False
        yield row
    if empty:
        raise BadInput(f"{source.path or source.task}: no rows; set a data source with at least one")


def load_texts(source: DataSource) -> Iterator[str]:
    """Every text of every row (messages, prompt, response, text): what a tokenizer is trained on."""
    for row in load_rows(source):
        for message in row.get("messages") or ():
            yield str(message.get("content", ""))
        for name in TEXT_FIELDS:
            if isinstance(row.get(name), str):
                yield row[name]


def _files(source: DataSource, suffix: str) -> list[Path]:
    path = Path(source.path)
    files = sorted(path.glob(f"*{suffix}")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise BadInput(f"{path}: no such file, or a folder without *{suffix}; set the path of the {source.type} data")
    return files


def _jsonl(source: DataSource) -> Iterator[Row]:
    for file in _files(source, ".jsonl"):
        with open(file, "rb") as stream:
            for number, line in enumerate(stream, start=1):
                origin = f"{file}:{number}"
                if not line.strip():
                    raise BadInput(f"{origin}: empty line; remove it")
                try:
                    fields = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise BadInput(f"{origin}: not a JSON object ({error}); write one object a line") from None
                if not isinstance(fields, dict):
                    raise BadInput(f"{origin}: {type(fields).__name__} instead of a JSON object; write one a line")
                if b"\\u" in line and not _is_text(fields):
                    raise BadInput(f"{origin}: half of a surrogate pair (\\ud8xx), which is no text; remove it")
                yield Row(fields, origin)


def _is_text(fields: dict[str, Any]) -> bool:
    try:
        json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _parquet(source: DataSource) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    for file in _files(source, ".parquet"):
        number = 0
        try:
            for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(fields, f"{file}: row {number}")
        except (pyarrow.ArrowException, OSError) as error:
            raise BadInput(f"{file}: cannot be read as Parquet after row {number}: {_line(error)}") from None


def _hf(source: DataSource) -> Iterator[Row]:
    import datasets

    try:
        if (Path(source.path) / "state.json").is_file() or (Path(source.path) / "dataset_dict.json").is_file():
            data = datasets.load_from_disk(source.path)
            data = data[source.split] if isinstance(data, datasets.DatasetDict) else data
        else:
            data = datasets.load_dataset(source.path, split=source.split)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise BadInput(f"{source.path}: cannot be read as a data set, split {source.split}: {_line(error)}") from None
    for number, fields in enumerate(data, start=1):
        yield Row(fields, f"{source.path}: row {number}")


def _reasoning_gym(source: DataSource) -> Iterator[Row]:
    data = create_dataset(source.task, size=source.size, seed=source.seed * SEED_STRIDE, **source.params)
    for number in range(source.size):
        entry = data[number]
        fields = {"prompt": entry["question"], "answer": entry["answer"], "response": entry["answer"], "entry": entry}
        yield Row(fields, f"{source.task}: entry {number + 1}")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
