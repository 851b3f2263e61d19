"""Whole checkpoints between Hugging Face folders and Megatron's distributed format, under any layout."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Literal

from megarl.checkpoint import load_model, model_role, save_model
from megarl.config import load_config
from megarl.config.schema import Model, Parallel
from megarl.convert import load_hf, read_spec, save_hf
from megarl.convert.hf_io import copy_side_files, new_folder, read_config
from megarl.errors import BadInput
from megarl.learner.policy import Role
from megarl.models.build import build_model
from megarl.parallel import Mesh

SHARDS, SIDE_FILES = "shards", "hf"


def convert_checkpoint(src: str | Path, dst: str | Path, to: Literal["hf", "megatron"], parallel: Parallel) -> None:
    """Write `src` as `dst` in the other format, in the precision it has. Collective over the ranks of `parallel`.

    A Megatron checkpoint is a folder with `shards/` and, in `hf/`, the config.json and tokenizer of its model; a
    checkpoint of a run may lack the latter and takes them from the model its run's config.yaml names. `dst` appears
    whole or not at all. Of a run's checkpoint the policy is converted, of `megarl reward-model`'s the reward model.
    Raises BadInput when `src` is not a checkpoint of the other format or `dst` cannot be written.
    """
    source, target = Path(src), Path(dst)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise BadInput(f"{target}: exists; give a folder that does not")
    model = model_of_folder(source) if to == "megatron" else model_of_checkpoint(source)
    side, spec = Path(model.path), read_spec(model.path)
    role: Role = "reward" if spec.head == "scalar" else "policy"
    mesh = Mesh.build(parallel)
    if to == "hf":
        role = model_role(source / SHARDS)
        spec = replace(spec, head="scalar" if role == "reward" else "lm")
    chunks = build_model(spec, model, mesh, parallel)
    if to == "hf":
        load_model(source / SHARDS, chunks, role)
        save_hf(target, chunks, spec, mesh, extra_from=side)
        return
    load_hf(source, chunks, spec, mesh)
    with ExitStack() as stack:
        folder = stack.enter_context(new_folder(target)) if mesh.is_main else None
        if folder is not None:
            (folder / SHARDS).mkdir()
            (folder / SIDE_FILES).mkdir()
            copy_side_files(source, folder / SIDE_FILES)
        folder = mesh.broadcast_object(folder)
        save_model(folder / SHARDS, chunks, role)
        mesh.barrier()


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
