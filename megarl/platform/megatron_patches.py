"""Patches of Megatron-core 0.16.1, each with why; none changes a number on CUDA with Transformer Engine."""

from __future__ import annotations

import functools
import logging
import queue
import types
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from megarl import platform
from megarl.platform import optimizers


def install() -> None:
    """Patch after `torch.cuda` is settled; imports megatron.core."""
    warnings.filterwarnings("ignore", module=r"megatron\.core\..*")
    import megatron.core.tensor_parallel.layers as layers
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    # without Transformer Engine the router's matrix product reads this name, which is then never bound
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    token_dispatcher.maybe_move_tensor_to_cpu = _move_to_cpu(token_dispatcher.maybe_move_tensor_to_cpu)
    layers.linear_with_grad_accumulation_and_async_allreduce = _by_platform(
        layers.linear_with_grad_accumulation_and_async_allreduce
    )
    token_dispatcher.sort_chunks_by_idxs = _unless_sorted(token_dispatcher.sort_chunks_by_idxs)
    from megatron.core.transformer.moe import router

    router.router_gating_linear = _same_dtype_by_platform(router.router_gating_linear)
    router.topk_routing_with_score_function = _in_float64(router.topk_routing_with_score_function)
    import megatron.core.tensor_parallel.mappings as mappings
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput

    mappings._gather_along_first_dim = _gather_any(mappings._gather_along_first_dim)
    mappings._reduce_scatter_along_first_dim = _reduce_scatter_any(mappings._reduce_scatter_along_first_dim)
    CheckpointWithoutOutput.__init__ = _say_fp8(CheckpointWithoutOutput.__init__)
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async.FileSystemWriterAsync.write_preloaded_data_multiproc = staticmethod(_write_in_this_process)
    filesystem_async._results_queue = queue.Queue()
    from megarl.platform import safe_loading

    safe_loading.install()
    from megatron.core.optimizer import distrib_optimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    # it collects garbage after each part of an optimizer's state, in case Python does not; with torch and vLLM loaded that
    # takes tenths of a second of every save
    distrib_optimizer.gc = types.SimpleNamespace(collect=lambda: 0)
    plain = DistributedOptimizer._set_main_param_and_optimizer_states
    DistributedOptimizer._set_main_param_and_optimizer_states = _keep_step(plain)
    optimizers.install(on_cpu=platform.name() == "cpu")
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(_one_generator)
    logging.getLogger("megatron.core.dist_checkpointing.serialization").addFilter(_not_the_first)


def _move_to_cpu(plain: Any) -> Any:
    """Split sizes must be numpy for all_to_all_single; Megatron converts only tensors that say `is_cuda`."""

    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        if as_numpy and torch.is_tensor(tensor) and not tensor.is_cuda:
            return tensor.numpy()
        return plain(tensor, as_numpy=as_numpy, record_stream=record_stream)

    return move


def _by_platform(plain: Any) -> Any:
    """Without communication a parallel linear is a plain one, for which the platform has the fastest product."""

    @functools.wraps(plain)  # with the flag that it keeps on itself
    def linear(input: Any, weight: Any, bias: Any, **how: Any) -> Any:
        if hasattr(weight, "product"):
            return _around(input, weight, bias, how)
        alone = not (how["gradient_accumulation_fusion"] or how["allreduce_dgrad"] or how["sequence_parallel"])
        if alone and bias is None and how.get("grad_output_buffer") is None:
            return platform.linear(input, weight)
        return plain(input, weight, bias, **how)

    return linear


def _around(x: torch.Tensor, weight: Any, bias: Any, how: dict[str, Any]) -> torch.Tensor:
    """The same communication around a weight's own product, which sees the tokens of all ranks as Megatron's does."""
    from megatron.core.tensor_parallel import mappings

    if how["sequence_parallel"]:
        x = mappings.gather_from_sequence_parallel_region(x, group=how["tp_group"])
    elif how["allreduce_dgrad"]:
        x = mappings.copy_to_tensor_model_parallel_region(x, group=how["tp_group"])
    out = platform.linear(x, weight)
    return out if bias is None else out + bias


def _same_dtype_by_platform(plain: Any) -> Any:
    """The router's product saves memory when it is more precise than the layer; otherwise it is a plain one."""

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: Any, dtype: torch.dtype) -> torch.Tensor:
        alone = bias is None and x.dtype == weight.dtype == dtype
        return platform.linear(x, weight) if alone else plain(x, weight, bias, dtype)

    return linear


def _unless_sorted(plain: Any) -> Any:
    """Without expert parallelism the chunks are in order already, and Megatron copies every token four times a layer."""

    def sort(tokens: Any, sizes: Any, order: Any, probs: Any = None, fused: bool = False) -> tuple[Any, Any]:
        if not hasattr(order, "in_order"):  # one persistent tensor per layer
            order.in_order = bool((order == torch.arange(order.numel(), device=order.device)).all())
        return (tokens, probs) if order.in_order else plain(tokens, sizes, order, probs=probs, fused=fused)

    return sort


def _in_float64(plain: Any) -> Any:
    """The router's scores are float32 whatever `moe_router_dtype` says; float64 logits keep their precision."""

    def route(logits: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if logits.dtype is not torch.float64:
            return plain(logits, *args, **kwargs)
        with _NoFloat32():
            return plain(logits, *args, **kwargs)

    return route


class _NoFloat32(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is torch.Tensor.float:
            return args[0]
        wide = {"dtype": torch.float64} if function is torch.softmax else {}
        return function(*args, **{**(kwargs or {}), **wide})


def _is_gloo(group: Any, tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and dist.get_world_size(group) > 1


def _gather_any(plain: Any) -> Any:
    """gloo gathers equal sizes only; expert tensor parallelism gathers as many tokens as each rank has."""

    def gather(
        x: torch.Tensor, group: Any, output_split_sizes: list[int] | None = None, use_global_buffer: bool = False
    ) -> torch.Tensor:
        if output_split_sizes is None or not _is_gloo(group, x):
            return plain(x, group, output_split_sizes, use_global_buffer)
        most = max(output_split_sizes)
        padded = torch.cat([x, x.new_zeros(most - x.shape[0], *x.shape[1:])])
        out = x.new_empty(len(output_split_sizes) * most, *x.shape[1:])
        dist.all_gather_into_tensor(out, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(out.split(most), output_split_sizes, strict=True)])

    return gather


def _reduce_scatter_any(plain: Any) -> Any:
    """The backward of `_gather_any`: gloo scatters equal sizes only."""

    def reduce_scatter(
        x: torch.Tensor, group: Any, input_split_sizes: list[int] | None = None, use_global_buffer: bool = False
    ) -> torch.Tensor:
        if input_split_sizes is None or not _is_gloo(group, x):
            return plain(x, group, input_split_sizes, use_global_buffer)
        total = x.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total.split(input_split_sizes)[dist.get_rank(group)].clone()

    return reduce_scatter


def _say_fp8(plain: Any) -> Any:
    """Megatron takes `fp8=False`, its default, for true, and then asks Transformer Engine, which may not be there."""

    def init(self: Any, fp8: Any = False) -> None:
        plain(self, fp8 or None)

    return init


def _one_generator(record: logging.LogRecord) -> bool:
    """On a CPU both of Megatron's generators are the same object, so this one warning is expected at every fork."""
    return "CPU RNG state changed within GPU RNG context" not in record.getMessage()


def _not_the_first(record: logging.LogRecord) -> bool:
    """With plans kept from the save before no rank waits for another, and the main one may find a file of this save."""
    return "Overwriting old incomplete" not in record.getMessage()


class _NoCount:
    """The queue by which a forked writer says that it is done; here the call returns when it is."""

    def get(self) -> None: ...
    def task_done(self) -> None: ...


def _write_in_this_process(transforms: list, use_msc: bool, rank: int, buckets: list, results: queue.Queue) -> None:
    """Megatron forks writers and starts a manager by spawn: a fork of a process with gloo and vLLM threads can hang,
    and the spawned one imports the whole program again (seconds a save). A synchronous save needs neither."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    written: dict[int, Any] = {}
    for number, bucket in enumerate(buckets):
        local: queue.Queue = queue.Queue()
        FileSystemWriterAsync.write_preloaded_data(transforms, number, bucket, local, _NoCount(), True, use_msc=use_msc)
        _number, outcome = local.get()
        if isinstance(outcome, Exception):
            results.put(outcome)
            return
        written[number] = outcome
    results.put(written)


def _keep_step(plain: Any) -> Any:
    """Loading a fully reshardable checkpoint asks the file for every state of torch's Adam, but its step count is
    stored once beside the tensors and is already in place."""

    def set_states(self: Any, model_param: Any, tensors: dict) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        plain(self, model_param, {"step": state["step"], **tensors} if "step" in state else tensors)

    return set_states
