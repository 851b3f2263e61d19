"""Optimizer settings that cannot go together, or with the model and the layout."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

from megarl.config.schema import Config, Optimizer
from megarl.errors import BadInput

PYTORCH = ("fused", "foreach", "for-loop")
PACKAGES = {"te": ("transformer_engine", "Transformer Engine"), "apex": ("apex", "NVIDIA Apex")}


def optimizers(config: Config) -> Iterator[tuple[str, Optimizer]]:
    """(key, settings) of every optimizer of a configuration."""
    for name in ("sft", "reward_model", "rl"):
        section = getattr(config, name)
        if section is not None:
            yield f"{name}.optimizer", section.optimizer
    if config.rl is not None:
        yield "rl.critic.optimizer", config.rl.critic.optimizer


def check_optimizers(config: Config) -> None:
    """Raises BadInput for the first setting that cannot be."""
    for key, optimizer in optimizers(config):
        if max(optimizer.betas) >= 1:
            raise BadInput(f"{key}.betas = {list(optimizer.betas)}: each must be below 1; set [0.9, 0.95]")
        _check_implementation(key, optimizer)
        if optimizer.cpu_offload:
            _check_offload(config, key, optimizer)
        if optimizer.type == "muon":
            _check_muon(config, key)
    _check_one_kind(config)


def _check_implementation(key: str, optimizer: Optimizer) -> None:
    kind = optimizer.implementation
    if kind != "auto" and optimizer.type == "sgd":
        raise BadInput(f"{key}.implementation = {kind!r}: it chooses among Adams, and {key}.type is 'sgd'; set auto")
    if kind not in PACKAGES:
        return
    module, package = PACKAGES[kind]
    found = importlib.util.find_spec(module)
    if found is None:
        raise BadInput(f"{key}.implementation = {kind!r}: {package} is not installed; set auto or fused")
    folders = [Path(folder) for folder in found.submodule_search_locations or ()]
    if kind == "apex" and not any((folder / "optimizers" / "fused_adam.py").is_file() for folder in folders):
        raise BadInput(
            f"{key}.implementation = 'apex': the installed package apex is not NVIDIA's, which is built from source; "
            "set auto or fused"
        )


def _check_offload(config: Config, key: str, optimizer: Optimizer) -> None:
    reason = None
    if optimizer.type != "adam":
        reason = f"it is for Adam, and {key}.type is {optimizer.type!r}"
    elif not optimizer.decoupled_weight_decay:
        reason = f"it knows decoupled weight decay only; set {key}.decoupled_weight_decay: true"
    elif optimizer.implementation not in ("auto", "fused"):
        reason = f"the host steps with PyTorch's fused Adam; set {key}.implementation: auto"
    elif not config.parallel.distributed_optimizer:
        reason = "it is a part of Megatron's distributed optimizer; set parallel.distributed_optimizer: true"
    elif config.model.dtype == "float64":
        reason = "Megatron's distributed optimizer has no float64; set model.dtype: float32 or bfloat16"
    if reason is not None:
        raise BadInput(f"{key}.cpu_offload = true: {reason}, or cpu_offload: false")


def _check_muon(config: Config, key: str) -> None:
    if importlib.util.find_spec("emerging_optimizers") is None:
        raise BadInput(
            f"{key}.type = 'muon': megatron-core's Muon needs emerging_optimizers 0.1, which is not installed; "
            "set adam or sgd"
        )
    if config.parallel.overlap_param_gather:
        raise BadInput(
            f"{key}.type = 'muon': it is not sharded, so there are no parameters to gather; "
            "set parallel.overlap_param_gather: false"
        )


def _check_one_kind(config: Config) -> None:
    """Megatron writes step counts in checkpoints as one kind of Adam does, for all optimizers of a process."""
    if config.rl is None:
        return
    kinds = config.rl.optimizer.implementation, config.rl.critic.optimizer.implementation
    told = {kind if kind in PACKAGES else "torch" for kind in kinds if kind != "auto"}
    if len(told) > 1:
        raise BadInput(
            f"rl.critic.optimizer.implementation = {kinds[1]!r}: rl.optimizer.implementation is {kinds[0]!r}, and a process "
            "has one kind; set both to the same, or to auto"
        )
