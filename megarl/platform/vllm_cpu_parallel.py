"""What vLLM's CPU build lacks for engines of several ranks: expert parallelism, and a name of its own in shared memory.

vLLM accepts `enable_expert_parallel` on a CPU and then reads past the end of a rank's experts.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

SHARED_MEMORY = Path("/dev/shm")


def install() -> None:
    """Idempotent; call after importing vllm."""
    from vllm.distributed.device_communicators import cpu_communicator
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    communicator, shared = cpu_communicator.CpuCommunicator, cpu_communicator._CPUSHMDistributed
    if communicator.all_gatherv is not _all_gatherv:
        CPUUnquantizedExperts.apply = _own_experts_only(CPUUnquantizedExperts.apply)
        communicator.all_gatherv, communicator.reduce_scatterv = _all_gatherv, _reduce_scatterv
        shared.make_group_name = staticmethod(_shared_memory_name)
        shared.all_gather_into_tensor = _all_gather_any_type(shared.all_gather_into_tensor)


def _own_experts_only(plain: Callable[..., None]) -> Callable[..., None]:
    """The kernel ignores `expert_map`, which is -1 for the experts of other ranks: give it only (token, expert) pairs of
    this rank, each as a token with one expert, and add them up."""

    def apply(self: Any, output: Tensor, hidden_states: Tensor, **arguments: Any) -> None:
        if arguments["expert_map"] is None:
            return plain(self, output=output, hidden_states=hidden_states, **arguments)
        weights, ids = arguments["topk_weights"], arguments["topk_ids"]
        own = arguments["expert_map"][ids]
        tokens, slots = (own >= 0).nonzero(as_tuple=True)
        output.zero_()
        if len(tokens):
            arguments["topk_weights"] = weights[tokens, slots].unsqueeze(1)
            arguments["topk_ids"] = own[tokens, slots].unsqueeze(1).to(ids.dtype)
            inputs = hidden_states[tokens]
            outputs = torch.empty_like(inputs)
            plain(self, output=outputs, hidden_states=inputs, **arguments)
            output.index_add_(0, tokens, outputs)

    return apply


def _all_gatherv(self: Any, input_: Tensor | list[Tensor], dim: int = 0, sizes: list[int] | None = None) -> Any:
    """Rows of every rank, of which rank i has `sizes[i]`; padded, since gloo gathers only equal sizes."""
    if isinstance(input_, list):
        return [_all_gatherv(self, tensor, dim, sizes) for tensor in input_]
    sizes = sizes or [len(input_)] * self.world_size
    padded = input_.new_zeros(max(sizes), *input_.shape[1:])
    padded[: len(input_)] = input_
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=self.device_group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def _reduce_scatterv(self: Any, input_: Tensor, dim: int = 0, sizes: list[int] | None = None) -> Tensor:
    """The sum over the ranks of this rank's `sizes[rank]` rows."""
    sizes = sizes or [len(input_) // self.world_size] * self.world_size
    total = input_.contiguous()
    dist.all_reduce(total, group=self.device_group)
    return total.split(sizes)[self.rank_in_group]


def _all_gather_any_type(plain: Callable[..., None]) -> Callable[..., None]:
    """Shared memory gathers floats only, and expert ids are gathered when routing is recorded."""

    def all_gather_into_tensor(self: Any, output: Tensor, input: Tensor, group: Any = None) -> None:
        gather = dist.all_gather_into_tensor if not input.is_floating_point() else partial(plain, self)
        gather(output, input, group=group)

    return all_gather_into_tensor


def _shared_memory_name(communicator: Any) -> str:
    """vLLM's name is the same in every job: two jobs on one machine would read each other's activations."""
    ranks = "-".join(map(str, communicator.ranks))
    return f"/megarl-{os.environ.get('MASTER_PORT')}-{communicator.unique_name}-{ranks}"


def shared_memory_file(communicator: Any) -> Path:
    """The segment that this rank of a tensor-parallel group writes."""
    return SHARED_MEMORY / f"{_shared_memory_name(communicator).removeprefix('/')}_{communicator.rank_in_group}"
