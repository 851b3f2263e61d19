"""Megarl's optimizer section as Megatron's optimizer and schedule."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from megarl import platform
from megarl.config.schema import Optimizer

platform.setup()

from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler  # noqa: E402


def build_optimizer(settings: Optimizer, dtype: torch.dtype, chunks: list[Any], distributed: bool) -> Any:
    """Megatron's optimizer over DDP-wrapped chunks; float32 main weights when `dtype` is bfloat16."""
    config = OptimizerConfig(
        optimizer=settings.type,
        sgd_momentum=0.0,
        lr=settings.lr,
        min_lr=settings.lr * settings.min_lr_ratio,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        adam_eps=settings.eps,
        clip_grad=settings.clip_grad,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        use_distributed_optimizer=distributed,
    )
    optimizer = get_megatron_optimizer(config, chunks)
    for inner in _torch_optimizers(optimizer):
        for group in inner.param_groups:
            group["fused"] = True  # one pass over the weights instead of one for each operator
    return optimizer


def build_schedule(settings: Optimizer, optimizer: Any, total_steps: int) -> OptimizerParamScheduler:
    """Linear warm-up, then `settings.schedule` down to `lr * min_lr_ratio` at `total_steps` optimizer steps."""
    warmup = min(settings.warmup_steps, total_steps - 1)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.lr * settings.min_lr_ratio,
        lr_warmup_steps=warmup,
        lr_decay_steps=max(total_steps, 1),
        lr_decay_style=settings.schedule,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        override_opt_param_scheduler=True,  # after a resume the config's schedule holds, the checkpoint's step counts
        use_checkpoint_opt_param_scheduler=False,
    )


@torch.no_grad()
def gradient_norm(optimizer: Any) -> float:
    """Euclidean norm of the whole model's gradient, every parameter counted once. Collective; after `prepare_grads`.

    Each parameter's norm is in its gradient's precision, their sum in float64; Megatron's is in float32 throughout.
    """
    total = 0.0
    for part in _parts(optimizer):
        squares = torch.zeros((), dtype=torch.float64, device=platform.device())
        gradients = part.get_main_grads_for_grad_norm() if _has_parameters(part) else []
        if gradients:
            squares += torch.stack(torch._foreach_norm(gradients)).double().square().sum()
        dist.all_reduce(squares, group=part.get_grad_stats_parallel_group())
        total += float(squares)
    return math.sqrt(total)


@torch.no_grad()
def clip_gradient(optimizer: Any, norm: float, largest: float) -> None:
    """Scale the gradient, whose norm is `norm`, down to the norm `largest`; 0 leaves it."""
    scale = largest / (norm + 1e-6)
    if largest <= 0 or scale >= 1:
        return
    for part in _parts(optimizer):
        gradients = [p.grad for p in part.get_parameters() if p.grad is not None] if _has_parameters(part) else []
        if gradients:
            torch._foreach_mul_(gradients, scale)


def _parts(optimizer: Any) -> list[Any]:
    """Dense parameters and experts have optimizers of their own; those of all virtual stages too."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _has_parameters(part: Any) -> bool:
    return not getattr(part, "is_stub_optimizer", False)


def init_state(optimizer: Any) -> None:
    """Give a fresh optimizer zero moments, so that a checkpoint can be loaded into it.

    Megatron's own initialiser leaves out torch Adam's step count and then fails on it.
    """
    for inner, p in _torch_parameters(optimizer):
        if not inner.state[p]:
            moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
            inner.state[p] |= {"step": torch.zeros(()), **moments}


def separate_steps(optimizer: Any) -> None:
    """After loading: one step count per parameter.

    Megatron puts the same tensor into every parameter's state; torch's Adam would count it up once per parameter.
    """
    for inner, p in _torch_parameters(optimizer):
        inner.state[p]["step"] = inner.state[p]["step"].clone()


def _torch_parameters(optimizer: Any) -> Iterator[tuple[torch.optim.Optimizer, torch.Tensor]]:
    for inner in _torch_optimizers(optimizer):
        for group in inner.param_groups:
            for p in group["params"]:
                yield inner, p


def _torch_optimizers(optimizer: Any) -> Iterator[torch.optim.Optimizer]:
    for part in _parts(optimizer):
        if isinstance(part.optimizer, torch.optim.Adam | torch.optim.AdamW):
            yield part.optimizer
