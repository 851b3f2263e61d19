"""The micro-batches of a failed optimizer step again, alone: where the first number that is not finite comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megarl import algorithms
from megarl.checkpoint import checkpoints, load_model
from megarl.config.schema import Config
from megarl.errors import BadInput
from megarl.learner.policy import Policy
from megarl.parallel import Mesh
from megarl.trainers.common import start_path, starting_checkpoint
from megarl.trainers.failed_step import load_micro_batches, role_of
from megarl.trainers.losses import critic_loss, rl_loss, token_mean_loss
from megarl.trainers.reward_model import preference_loss
from megarl.types import Batch


@dataclass(frozen=True)
class Replayed:
    """`first`: the first tensor that was not finite, in the order of the computation; None: all were."""

    loss: float  # these micro-batches' share of the step's
    grad_norm: float  # of their gradient alone
    first: str | None
    weights: str  # which were used

    def lines(self) -> list[str]:
        return [
            f"weights          {self.weights}",
            f"loss             {self.loss:.6g}",
            f"gradient norm    {self.grad_norm:.6g}",
            f"first not finite {self.first or 'none: every tensor is finite'}",
        ]


def replay(cfg: Config, path: Path) -> Replayed:
    """Forward and backward of `RUN_DIR/<part>/failed/step_<n>_rank<r>.safetensors` with the run's weights before step n.

    In one process; nothing is updated. Raises BadInput when the file is not one of them, or holds a share of a layout that
    one process cannot compute.
    """
    part, number, cfg = path.parent.parent.name, _step_of(path), _alone(cfg)
    micro_batches, role = load_micro_batches(path), role_of(path)
    mesh = Mesh.build(cfg.parallel)
    policy, weights = _policy(cfg, mesh, part, role, number, any(m.experts is not None for m in micro_batches))
    watch = _FirstNonFinite()
    watch.look(f"weight {name}" for name in _bad(policy.modules[0].named_parameters()))
    for place, micro in enumerate(micro_batches):
        values = ((item.name, getattr(micro.batch, item.name)) for item in fields(Batch))
        watch.look(f"micro-batch {place}, {name}" for name in _bad(values))
    watch.hook(policy.modules[0])
    shares: list[float] = []
    loss = _loss(cfg, part, role)

    def seen(*inputs: Any) -> Any:
        share, metrics = loss(*inputs)
        shares.append(float(share.detach()))
        watch.look(["the loss"] if not torch.isfinite(share) else [])
        return share, metrics

    result = policy.train_step(micro_batches, seen, {"grad_norm": -1.0})  # which no step has
    grads = ((name, getattr(p, "main_grad", None)) for name, p in policy.modules[0].named_parameters())
    watch.look(f"gradient of {name}" for name in _bad(grads))
    return Replayed(sum(shares), result.grad_norm, watch.found, weights)


def _step_of(path: Path) -> int:
    """The step in the name of a file of micro-batches. Raises BadInput when there is none."""
    number = path.name.removeprefix("step_").partition("_")[0]
    if not number.isdigit():
        raise BadInput(f"{path}: give a file RUN_DIR/rl/failed/step_NNNNNN_rankR.safetensors of a run")
    return int(number)


def _alone(cfg: Config) -> Config:
    """The run's config for one process. Raises BadInput when its micro-batches are not whole in it."""
    layout = cfg.parallel
    if layout.cp > 1:
        raise BadInput(f"parallel.cp = {layout.cp}: a file holds a part of each sequence; replay needs a run with cp=1")
    if cfg.rl is not None and cfg.rl.routing_replay != "none" and (layout.tp > 1 or layout.pp > 1):
        raise BadInput(
            f"parallel.tp = {layout.tp}, pp = {layout.pp}: a file holds the experts of some layers and rows; replay needs "
            "a run with tp=1 and pp=1, or rl.routing_replay=none"
        )
    return cfg.model_copy(update={"parallel": type(layout)()})


def _policy(cfg: Config, mesh: Mesh, part: str, role: str, number: int, routing: bool) -> tuple[Policy, str]:
    section = {"sft": cfg.sft, "rl": cfg.rl, "reward_model": cfg.reward_model}[part]
    start = starting_checkpoint(cfg, mesh) if part == "sft" else start_path(cfg, mesh, part, section.init_from)
    optimizer = section.critic.optimizer if role == "critic" else section.optimizer
    more: dict[str, Any] = {}
    if part == "rl" and role == "policy":
        more = {
            "temperature": cfg.rollout.temperature,
            "routing": routing,
            "freeze_router": section.freeze_router,
            "aux_loss_coef": section.router_aux_loss_coef,
        }
    elif part == "sft":
        more = {"aux_loss_coef": section.router_aux_loss_coef}
    if role == "critic":
        start = section.critic.init_from or start
    policy = Policy.from_hf(start, cfg, mesh, role=role, optimizer=optimizer, **more)
    before = [c for c in checkpoints(Path(cfg.run_dir) / part / "checkpoints") if int(c.name[5:]) < number]
    if not before:
        return policy, f"{start}, {number - 1} steps before step {number}"
    load_model(before[-1] / "shards", policy.modules, role)
    policy.optimizer.reload_model_params()
    missing = number - 1 - int(before[-1].name[5:])
    return policy, f"{before[-1]}" + (f", {missing} steps before step {number}" if missing else "")


def _loss(cfg: Config, part: str, role: str) -> Callable[..., Any]:
    if part == "sft":
        return token_mean_loss
    if part == "reward_model":
        return partial(preference_loss, pairs=cfg.reward_model.batch_size)
    algorithm = algorithms.from_config(cfg.rl.algorithm, cfg.rollout.max_response_tokens)
    return partial(critic_loss if role == "critic" else rl_loss, algorithm)


class _FirstNonFinite:
    """The first of the names it is shown, and of the outputs and gradients of the modules it hooks."""

    def __init__(self) -> None:
        self.found: str | None = None

    def look(self, names: Any) -> None:
        if self.found is None:
            self.found = next(iter(names), None)

    def hook(self, model: torch.nn.Module) -> None:
        for name, module in model.named_modules():
            module.register_forward_hook(partial(self._after, name or type(model).__name__))

    def _after(self, name: str, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        for tensor in output if isinstance(output, tuple | list) else (output,):
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                continue
            self.look(f"output of {name}" for _ in _bad([(name, tensor)]))
            if tensor.requires_grad:
                tensor.register_hook(partial(self._gradient, name))

    def _gradient(self, name: str, gradient: Tensor) -> None:
        self.look(f"gradient of the output of {name}" for _ in _bad([(name, gradient)]))


def _bad(tensors: Any) -> Iterator[str]:
    """Names of those that are not finite."""
    for name, tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            yield name
