"""Megarl's optimizer section as Megatron's optimizer and schedule."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from megarl import platform
from megarl.config.schema import Optimizer
from megarl.errors import BadInput
from megarl.platform.optimizers import FUSED, WAYS, fused_adam, muon_problem, use_adam

platform.setup()

from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer  # noqa: E402
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler  # noqa: E402

HYBRID = {"cpu_optimizer_cls", "gpu_optimizer_cls", "offload_fraction", "param_update_in_fp32", "pin_cpu_grads"}
HYBRID |= {"pin_cpu_params", "overlap_cpu_optimizer_d2h_h2d", "bias_correction"}  # settings of the hybrid optimizer


def build_optimizer(
    settings: Optimizer, dtype: torch.dtype, chunks: list[Any], distributed: bool, fp8_params: str | None = None
) -> Any:
    """Megatron's optimizer over DDP-wrapped chunks; float32 main weights when `dtype` is bfloat16.

    `fp8_params`: the recipe by which the model's weights are kept in FP8. Raises BadInput when what it needs is not installed.
    """
    kind = adam_implementation(settings, dtype)
    try:
        use_adam(kind)
    except (ImportError, ValueError) as error:
        raise BadInput(f"optimizer.implementation = {kind!r}: {error}; set auto") from error
    config = OptimizerConfig(
        optimizer="sgd" if settings.type == "sgd" else "adam",
        sgd_momentum=0.0,
        lr=settings.lr,
        min_lr=settings.lr * settings.min_lr_ratio,
        weight_decay=settings.weight_decay,
        decoupled_weight_decay=settings.decoupled_weight_decay,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        adam_eps=settings.eps,
        muon_momentum=settings.muon_momentum,
        muon_num_ns_steps=settings.muon_ns_steps,
        muon_scale_mode=settings.muon_scale,
        clip_grad=settings.clip_grad,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        use_distributed_optimizer=distributed,
        fp8_recipe=fp8_params,
        reuse_grad_buf_for_mxfp8_param_ag=fp8_params == "mxfp8",
        optimizer_cpu_offload=settings.cpu_offload,
        optimizer_offload_fraction=float(settings.cpu_offload),
        # the hybrid optimizer has the main weights, and gradients reach it as this one's do
        use_precision_aware_optimizer=settings.cpu_offload,
        store_param_remainders=False,
        overlap_cpu_optimizer_d2h_h2d=settings.cpu_offload,
        pin_cpu_grads=platform.name() == "cuda",
    )
    with torch.no_grad():  # shards of float32 parameters are then leaves, which the hybrid optimizer insists on
        optimizer = _muon(config, chunks) if settings.type == "muon" else get_megatron_optimizer(config, chunks)
    for part in _parts(optimizer):  # plain gradient descent has none, and Megatron calls it to load a checkpoint
        part.init_state_fn = part.init_state_fn or (lambda *_: None)
    for hybrid in _hybrid_optimizers(optimizer):
        for group in hybrid.param_groups:  # a checkpoint's groups are those of any Adam, and hold no classes
            for name in HYBRID & group.keys():
                del group[name]
    for inner in _torch_optimizers(optimizer):
        inner.defaults |= WAYS.get(kind, WAYS["fused"])  # the hybrid optimizer's are PyTorch's, whatever the kind
    _set_ways(optimizer)
    return optimizer


def adam_implementation(settings: Optimizer, dtype: torch.dtype) -> str:
    """What `auto` stands for on this machine; other values as they are. Raises BadInput when it cannot be here."""
    kind = settings.implementation
    if kind not in FUSED and kind != "auto":
        return kind
    problem = None
    if platform.name() != "cuda":
        problem = "it has CUDA kernels only, and this machine has no CUDA device"
    elif dtype is torch.float64:
        problem = "it has no kernel for model.dtype = 'float64'"
    if kind in FUSED:
        if problem:
            raise BadInput(f"optimizer.implementation = {kind!r}: {problem}; set auto or fused")
        return kind
    for name in [] if problem else FUSED:
        with contextlib.suppress(ImportError):
            fused_adam(name)
            return name
    return "fused"


def _muon(config: OptimizerConfig, chunks: list[Any]) -> Any:
    problem = muon_problem()
    if problem:
        raise BadInput(f"optimizer.type = 'muon': {problem}; otherwise set adam or sgd")
    from megatron.core.optimizer.muon import get_megatron_muon_optimizer

    return get_megatron_muon_optimizer(config, chunks)


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
        parameters = part.get_parameters() if _has_parameters(part) else []
        gradients = [g for p in parameters if (g := getattr(p, "decoupled_grad", p.grad)) is not None]
        if gradients:
            torch._foreach_mul_(gradients, scale)


@torch.no_grad()
def step_optimizer(optimizer: Any, chunks: list[Any]) -> None:
    """`step_with_ready_grads`, after which parameters are gathered once.

    Megatron gathers all of them after the step of the dense ones and again after that of the experts: half of it for nothing,
    and where parameters are gathered in the gradients' memory (mxfp8) the experts' gradients are gone by their step.
    """
    parts = list(filter(_has_parameters, _parts(optimizer)))
    ddp = getattr(parts[0], "ddp_config", None) if len(parts) > 1 else None  # of a distributed optimizer
    if ddp is None or ddp.overlap_param_gather:
        optimizer.step_with_ready_grads()
        return
    for chunk in chunks:
        chunk.start_param_sync = lambda **_: None
    try:
        optimizer.step_with_ready_grads()
    finally:
        for chunk in chunks:
            del chunk.start_param_sync
    for chunk in chunks:
        chunk.start_param_sync()


def _parts(optimizer: Any) -> list[Any]:
    """Dense parameters and experts have optimizers of their own; those of all virtual stages too."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _has_parameters(part: Any) -> bool:
    return not getattr(part, "is_stub_optimizer", False)


def main_weight(optimizer: Any, parameter: torch.Tensor) -> tuple[torch.Tensor, slice] | None:
    """This rank's part of a parameter's main weight, and the elements of the flat parameter that it is of.

    Of a distributed optimizer; None when all of it is on other ranks.
    """
    for part in _parts(optimizer):
        if _has_parameters(part) and parameter in part.model_param_gbuf_map:
            place = part._get_model_param_range_map(parameter)["param"]
            return parameter.main_param, slice(place.start, place.end)
    return None


@torch.no_grad()
def renew_weights(optimizer: Any, chunks: list[Any]) -> None:
    """The model's weights anew from a distributed optimizer's main weights, as after a step. Collective."""
    for part in filter(_has_parameters, _parts(optimizer)):
        if part.config.reuse_grad_buf_for_mxfp8_param_ag:
            part._copy_main_params_to_param_buffer()
        else:
            part._copy_main_params_to_model_params()
    for chunk in chunks:
        chunk.start_param_sync(force_sync=True)


def init_state(optimizer: Any) -> None:
    """Give a fresh optimizer zero moments, so that a checkpoint can be loaded into it.

    Megatron's own initialiser leaves out torch Adam's step count and then fails on it, or steps with random gradients.
    """
    for inner, p in _torch_parameters(optimizer):
        if not inner.state[p]:
            moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
            inner.state[p] |= {"step": torch.zeros(()), **moments}
    for hybrid in _hybrid_optimizers(optimizer):
        hybrid._sync_sub_optimizers_state_to_hdo()


def _set_ways(optimizer: Any) -> None:
    for inner in _torch_optimizers(optimizer):
        for group in inner.param_groups:
            group |= {name: inner.defaults[name] for name in WAYS["fused"]}


def after_loading(optimizer: Any) -> None:
    """Settle what loading a checkpoint leaves: one step count per parameter, the hybrid optimizer's copies, and PyTorch's
    way of computing Adam, which is that of this run.

    Megatron puts the same tensor into every parameter's state; torch's Adam would count it up once per parameter.
    """
    for hybrid in _hybrid_optimizers(optimizer):
        hybrid._sync_hdo_state_to_sub_optimizers()
    for inner, p in _torch_parameters(optimizer):  # a fused kernel reads the count where the parameter is
        where = p.device if inner.defaults["fused"] else "cpu"
        inner.state[p]["step"] = inner.state[p]["step"].to(where, copy=True)
    _set_ways(optimizer)


def state_tensors(optimizer: Any) -> Iterator[torch.Tensor]:
    """Main weights, moments and what else an optimizer keeps, on whatever device; views of the model's parameters too."""
    inner = [part.optimizer for part in _parts(optimizer) if _has_parameters(part)]
    for one in inner + [sub for hybrid in _hybrid_optimizers(optimizer) for sub in hybrid.sub_optimizers]:
        yield from (p for group in one.param_groups for p in group["params"])
        for state in (*one.state.values(), *getattr(one, "_scales", {}).values()):
            yield from (value for value in state.values() if torch.is_tensor(value))
    for hybrid in _hybrid_optimizers(optimizer):
        yield from hybrid.cpu_copy_map_grad.values()


def _torch_parameters(optimizer: Any) -> Iterator[tuple[torch.optim.Optimizer, torch.Tensor]]:
    for inner in _torch_optimizers(optimizer):
        for group in inner.param_groups:
            for p in group["params"]:
                yield inner, p


def _torch_optimizers(optimizer: Any) -> Iterator[torch.optim.Optimizer]:
    """PyTorch's Adams, those inside of a hybrid optimizer too."""
    inner = [part.optimizer for part in _parts(optimizer)]
    for hybrid in _hybrid_optimizers(optimizer):
        inner += hybrid.sub_optimizers
    yield from (one for one in inner if isinstance(one, torch.optim.Adam | torch.optim.AdamW))


def _hybrid_optimizers(optimizer: Any) -> list[HybridDeviceOptimizer]:
    return [part.optimizer for part in _parts(optimizer) if isinstance(part.optimizer, HybridDeviceOptimizer)]
