"""CUDA: torch, Megatron-core and vLLM run as they are."""

from __future__ import annotations

import torch

from megarl.errors import BadInput
from megarl.platform.host import GIB, host_memory, resident_bytes
from megarl.platform.shared_memory import Gather, Mapped, SharedWindows

NAME = "cuda"
BACKEND = "cpu:gloo,cuda:nccl"
BLOCK_BYTES = 256 << 20  # large enough that starting kernels costs nothing


def install() -> None:
    """Nothing to patch."""


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def set_device(local_rank: int) -> None:
    """Raises BadInput when there are fewer devices than ranks: NCCL refuses two ranks on one."""
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise BadInput(
            f"rank {local_rank} of this machine has no device: there are {count}; start {count} ranks (--nproc {count}), with "
            "parallel.tp, pp, cp and ep to match"
        )
    torch.cuda.set_device(local_rank)


def device_memory() -> dict[str, float]:
    return host_memory() | {
        "allocated": torch.cuda.memory_allocated() / GIB,
        "peak_allocated": torch.cuda.max_memory_allocated() / GIB,
    }


def capacity() -> tuple[int | None, int, int]:
    return torch.cuda.device_count(), *torch.cuda.mem_get_info()


def used_bytes() -> tuple[int, int]:
    free, total = torch.cuda.mem_get_info()
    return total - free, resident_bytes()


def synchronize() -> None:
    torch.cuda.synchronize()


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(x, weight)


def has_fp8_products() -> bool:
    return torch.cuda.get_device_capability() >= (8, 9)


def gated_experts(
    x: torch.Tensor,
    weight1: torch.Tensor,
    weight2: torch.Tensor,
    ends: torch.Tensor,
    probs: torch.Tensor,
    rows: torch.Tensor | None,
) -> torch.Tensor:
    from megarl.platform import cuda_experts

    return cuda_experts.gated_experts(x, weight1, weight2, ends, probs, rows)


def take_rows(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return x[rows]  # its gradient sorts before it adds up, that of `index_select` adds in any order


def sum_rows(values: torch.Tensor, rows: torch.Tensor, count: int) -> torch.Tensor:
    return values.new_zeros(count, *values.shape[1:]).index_put((rows,), values, accumulate=True)


def grouped_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    from megarl.platform import cuda_experts

    return cuda_experts.grouped_linear(x, weight, bias, ends)


def sink_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, sinks: torch.Tensor
) -> torch.Tensor:
    from megarl.platform import cuda_sinks

    return cuda_sinks.sink_attention(query, key, value, mask, sinks)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)


def shared_windows(size: int, place: tuple[int, int], gather: Gather, topics: int, timeout: float) -> SharedWindows:
    """None: NCCL reaches a neighbour's memory directly."""
    return SharedWindows({}, {}, timeout)


def map_tensors(tensors: dict[str, torch.Tensor], place: tuple[int, int], gather: Gather) -> Mapped | None:
    return None


def empty_cache() -> None:
    torch.cuda.empty_cache()


def profiler_activities() -> list:
    return [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
