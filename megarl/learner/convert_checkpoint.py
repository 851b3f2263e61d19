"""Whole checkpoints between Hugging Face folders and Megatron's distributed format, under any layout, by streaming."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megarl import __version__
from megarl.checkpoint import check_whole, model_role
from megarl.config import load_config
from megarl.config.schema import Model, Parallel
from megarl.convert import family, read_spec
from megarl.convert.hf_io import copy_side_files, fingerprint, new_folder, read_config
from megarl.convert.load import layout_problem, load_parameter, matched, open_weights
from megarl.convert.rules import Shard
from megarl.convert.save import FP8, Export, aside_layouts, copy_aside, export_weights, on_main
from megarl.errors import BadInput
from megarl.learner.policy import Role
from megarl.learner.shards import WithoutMemory, checkpoint_weights, write_shards
from megarl.models.build import build_model
from megarl.models.spec import ModelSpec
from megarl.parallel import Mesh

SHARDS, SIDE_FILES = "shards", "hf"
DTYPES = {"bf16": "bfloat16", "fp32": "float32", "fp8": FP8}


@dataclass(frozen=True)
class Progress:
    """Who is told how far a conversion is, on the first rank: its bytes in all, its bytes just done, a remark."""

    start: Callable[[int], None] = lambda total: None
    add: Callable[[int], None] = lambda count: None
    note: Callable[[str], None] = lambda text: None


def convert_checkpoint(
    src: str | Path,
    dst: str | Path,
    to: Literal["hf", "megatron"],
    parallel: Parallel,
    dtype: Literal["bf16", "fp32", "fp8"] | None = None,
    progress: Progress = Progress(),
) -> None:
    """Write `src` as `dst` in the other format, in `dtype` or the precision it has. Collective over `parallel`'s ranks.

    A Megatron checkpoint is a folder with `shards/` and, in `hf/`, the config.json and tokenizer of its model; a
    checkpoint of a run may lack the latter and takes them from the model its run's config.yaml names. Of a run's
    checkpoint the policy is converted, of `megarl reward-model`'s the reward model. A rank holds one layer of its share
    at a time. `dst` appears whole or not at all; an attempt that was cut goes on where it was.
    Raises BadInput when `src` is not a checkpoint of the other format, is damaged, or `dst` cannot be written, and
    RunFailed when writing fails on the way.
    """
    source, target = Path(src), Path(dst)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise BadInput(f"{target}: exists; give a folder that does not")
    if dtype == "fp8" and to == "megatron":
        raise BadInput("--dtype fp8: the learner computes in bf16 or fp32; set one of them, or --to hf")
    job = _Job(source, target, parallel, dtype, progress)
    job.to_hf() if to == "hf" else job.to_megatron()


@dataclass(frozen=True)
class _Job:
    source: Path
    target: Path
    parallel: Parallel
    dtype: str | None
    progress: Progress

    def to_hf(self) -> None:
        model = model_of_checkpoint(self.source)
        side, spec = Path(model.path), read_spec(model.path)
        mesh = Mesh.build(self.parallel)
        check_whole(self.source, mesh)
        role = model_role(self.source / SHARDS)
        spec = replace(spec, head="scalar" if role == "reward" else "lm")
        weights = checkpoint_weights(self.source / SHARDS, self._empty(spec, model, mesh), spec, role)
        self._tell_aside(side, spec, mesh)
        read = fingerprint(self.source / SHARDS) | fingerprint(side)
        export = Export(
            DTYPES[self.dtype] if self.dtype else None,
            side,
            settings=self._settings("hf", spec, read),
            start=self.progress.start,
            on_bytes=self.progress.add,
        )
        export_weights(self.target, weights, spec, mesh, export)

    def to_megatron(self) -> None:
        model, spec = model_of_folder(self.source), read_spec(self.source)
        if self.dtype:
            model = model.model_copy(update={"dtype": DTYPES[self.dtype]})
        mesh = Mesh.build(self.parallel)
        chunks = self._empty(spec, model, mesh)
        fill = _reading(self.source, spec, chunks, mesh)
        self._tell_aside(self.source, spec, mesh)
        with ExitStack() as stack:
            settings = self._settings("megatron", spec, fingerprint(self.source))
            folder = on_main(lambda: self._open(stack, settings, chunks, spec), mesh)
            role: Role = "reward" if spec.head == "scalar" else "policy"
            write_shards(folder / SHARDS, chunks, spec, role, fill, self.progress.add)
            on_main(lambda: self._write_side_files(folder / SIDE_FILES, spec), mesh)

    def _empty(self, spec: ModelSpec, model: Model, mesh: Mesh) -> list[torch.nn.Module]:
        problem = layout_problem(spec, self.parallel)
        if problem:
            raise BadInput(f"--parallel: {problem}; give other degrees")
        # shards are the same from either layer provider, and Transformer Engine's want their device
        with WithoutMemory():
            return build_model(spec, model.model_copy(update={"layers": "torch"}), mesh, self.parallel)

    def _settings(self, to: str, spec: ModelSpec, read: dict[str, list[int]]) -> dict[str, Any]:
        """All that the bytes written depend on."""
        layout = self.parallel.model_dump(mode="json")
        return {"megarl": __version__, "to": to, "dtype": self.dtype, "parallel": layout, "spec": repr(spec), "read": read}

    def _tell_aside(self, folder: Path, spec: ModelSpec, mesh: Mesh) -> None:
        aside = aside_layouts(folder, spec) if mesh.is_main else {}
        if aside:
            self.progress.note(
                f"note: {len(aside)} tensors, {next(iter(aside))} first, are no part of what is trained (multi-token "
                "prediction): kept aside and written back unchanged"
            )

    def _open(self, stack: ExitStack, settings: dict[str, Any], chunks: list[torch.nn.Module], spec: ModelSpec) -> Path:
        folder = stack.enter_context(new_folder(self.target, settings))
        (folder / SHARDS).mkdir(exist_ok=True)
        self.progress.start(sum(tensor.nbytes for _, tensor in matched(chunks, spec).values()))
        return folder

    def _write_side_files(self, folder: Path, spec: ModelSpec) -> None:
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier attempt
        folder.mkdir()
        copy_side_files(self.source, folder)
        copy_aside(self.source, folder, spec)


def _reading(
    source: Path, spec: ModelSpec, chunks: list[torch.nn.Module], mesh: Mesh
) -> Callable[[str, Tensor], None]:
    """Fills a parameter of this rank from a folder, all of whose tensors are there with the right shapes."""
    reader, shard = open_weights(source, spec), Shard.of(mesh)
    for name, size in family(spec.family).hf_shapes(spec).items():
        reader.check(name, size)
    rules = {name: rule for name, (rule, _) in matched(chunks, spec).items()}
    return lambda name, tensor: load_parameter(reader, rules[name], spec, shard, tensor)


def model_of_checkpoint(checkpoint: Path) -> Model:
    """The folder with a Megatron checkpoint's config.json and tokenizer, and its precision. Raises BadInput."""
    if not (checkpoint / SHARDS).is_dir():
        raise BadInput(
            f"{checkpoint}: no {SHARDS}/ in it; give a step_NNNNNN folder of a run or a converted checkpoint"
        )
    if (checkpoint / SIDE_FILES / "config.json").exists():
        return model_of_folder(checkpoint / SIDE_FILES)
    config = next((p / "config.yaml" for p in checkpoint.resolve().parents[:3] if (p / "config.yaml").exists()), None)
    if config is None:
        raise BadInput(
            f"{checkpoint}: neither {SIDE_FILES}/config.json in it nor a run's config.yaml above it; "
            f"put the model's config.json and tokenizer into {checkpoint / SIDE_FILES}"
        )
    return load_config(config).model


def model_of_folder(folder: Path) -> Model:
    """A Hugging Face folder in the learner's precision that holds its weights exactly."""
    config = read_config(folder)
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return Model(path=str(folder), dtype="bfloat16" if name.removeprefix("torch.") == "bfloat16" else "float32")
