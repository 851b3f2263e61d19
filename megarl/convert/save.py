"""Export of a sharded model to a Hugging Face folder."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from megarl.convert.families import family
from megarl.convert.hf_io import (
    ShardedWriter,
    copy_side_files,
    new_folder,
    one_line,
    pad_token_id,
    read_config,
    write_json,
)
from megarl.convert.load import read_spec
from megarl.convert.stream import stream_hf
from megarl.errors import BadInput, RunFailed
from megarl.models.spec import ModelSpec


def save_hf(
    out_dir: str | Path,
    chunks: list[nn.Module],
    spec: ModelSpec,
    mesh,
    dtype: str | torch.dtype | None = None,
    extra_from: str | Path | None = None,
    max_file_bytes: int = 2 << 30,
) -> None:
    """Writes the model as a folder that transformers and vLLM load. Collective; rank 0 writes.

    `dtype`: precision of the weights, none: the learner's. `extra_from`: the checkpoint whose config.json, tokenizer
    and generation config go along (of a reward model: the language model it was made from, or itself); none: only a
    config.json made from `spec`. The folder appears whole or not at all,
    in one rename; an earlier export at the same place is replaced. Raises BadInput (on every rank) when `out_dir` holds
    something that is not an export or cannot be written, RunFailed when writing fails on the way.
    """
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    writer, problem = None, None
    with ExitStack() as stack:
        if mesh.is_main:
            problem, writer = _attempt(lambda: _open(Path(out_dir), spec, extra_from, max_file_bytes, stack))
        _agree(problem, mesh)
        written_dtype = None
        # After a failed write the stream still runs to its end, so that no rank waits in a collective.
        for name, tensor in stream_hf(chunks, spec, mesh):
            if writer is not None and problem is None:
                target = dtype if dtype is not None and tensor.is_floating_point() else None
                written_dtype = written_dtype or target or tensor.dtype
                problem, _ = _attempt(lambda name=name, tensor=tensor, target=target: writer.add(name, tensor, target))
        if writer is not None and problem is None:
            problem, _ = _attempt(lambda: _finish(writer, spec, extra_from, written_dtype, stack))
        _agree(problem, mesh)


def _open(out: Path, spec: ModelSpec, extra_from, max_bytes: int, stack: ExitStack) -> ShardedWriter:
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or (out / "config.json").exists())):
        raise BadInput(f"{out}: exists and is not an earlier export; give another folder")
    if extra_from is not None and replace(read_spec(extra_from), head=spec.head) != spec:
        raise BadInput(f"{extra_from}/config.json: describes another model than the one to export; give its own folder")
    return ShardedWriter(stack.enter_context(new_folder(out)), max_bytes)


def _finish(writer: ShardedWriter, spec: ModelSpec, extra_from, dtype: torch.dtype, stack: ExitStack) -> None:
    writer.close()
    config = family(spec.family).write_config(spec) if extra_from is None else read_config(extra_from)
    if extra_from is not None:
        if spec.head == "scalar":
            config |= family(spec.family).scorer_config() | {"pad_token_id": pad_token_id(extra_from)}
        copy_side_files(extra_from, writer.folder)
    write_json(writer.folder / "config.json", with_dtype(config, dtype))
    stack.close()


def with_dtype(config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """config.json naming the precision of the weights beside it, in the form it already uses."""
    name = str(dtype).removeprefix("torch.")
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    return config | dict.fromkeys(keys, name)


def _attempt(action) -> tuple[Exception | None, Any]:
    try:
        return None, action()
    except BadInput as error:
        return error, None
    except (OSError, SafetensorError) as error:
        return RunFailed(f"export: writing failed ({one_line(error)}); free some space or give another folder"), None


def _agree(problem: Exception | None, mesh) -> None:
    """Every rank raises what rank 0 met."""
    problem = mesh.broadcast_object(problem, src=0)
    if problem is not None:
        raise problem
