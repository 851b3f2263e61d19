"""CUDA: torch, Megatron-core and vLLM run as they are."""

from __future__ import annotations

import torch

from megarl.platform.host import GIB, host_memory

NAME = "cuda"
BACKEND = "cpu:gloo,cuda:nccl"
BLOCK_BYTES = 256 << 20  # large enough that starting kernels costs nothing


def install() -> None:
    """Nothing to patch."""


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def set_device(local_rank: int) -> None:
    torch.cuda.set_device(local_rank)


def device_memory() -> dict[str, float]:
    return host_memory() | {
        "allocated": torch.cuda.memory_allocated() / GIB,
        "peak_allocated": torch.cuda.max_memory_allocated() / GIB,
    }


def synchronize() -> None:
    torch.cuda.synchronize()


def grouped_mm(x: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    if x.shape[0] == 0:  # no backward for zero rows, and every rank must still produce a gradient
        return x @ weights.sum(0).t()
    return torch.nn.functional.grouped_mm(x, weights.transpose(1, 2), offs=ends)


def empty_cache() -> None:
    torch.cuda.empty_cache()


def profiler_activities() -> list:
    return [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
