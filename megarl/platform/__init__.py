"""The device seam: CUDA or CPU, decided once, and the only place that patches torch, Megatron-core or vLLM.

`setup()` runs before megatron.core is imported, because Megatron binds names of `torch.cuda` at import time. Code above
this package asks `device()` and `backend()` and has no device branches of its own.
"""

from __future__ import annotations

import functools
import os
from types import ModuleType

import torch

_settled = False


@functools.cache
def _module() -> ModuleType:
    if torch.cuda.is_available():
        from megarl.platform import cuda as chosen
    else:
        from megarl.platform import cpu as chosen
    return chosen


def setup() -> None:
    """Make Megatron-core importable and runnable on this machine. Idempotent; call before importing megatron.core."""
    global _settled
    if _settled:
        return
    _settled = True
    _module().install()
    from megarl.platform import megatron_patches

    megatron_patches.install()


def name() -> str:
    """`cuda` or `cpu`."""
    return _module().NAME


def device() -> torch.device:
    """The device this process computes on."""
    return _module().device()


def backend() -> str:
    """The torch.distributed backend: `cpu:gloo,cuda:nccl` or `gloo`."""
    return _module().BACKEND


def set_device(local_rank: int) -> None:
    """Bind this process to its device; nothing to do on a CPU."""
    _module().set_device(local_rank)


def set_threads(count: int | None = None) -> None:
    """Set the number of CPU threads torch uses: `count`, or OMP_NUM_THREADS, or what torch chose.

    Called again after an engine started, because vLLM changes it.
    """
    count = count or int(os.environ.get("OMP_NUM_THREADS", "0"))
    if count:
        torch.set_num_threads(count)


def device_memory() -> dict[str, float]:
    """GiB on this rank's device and host: `rss`, `peak_rss`, and on CUDA `allocated`, `peak_allocated`."""
    return _module().device_memory()


def synchronize() -> None:
    """Wait until the device has done everything it was given, so that a clock reads the truth."""
    _module().synchronize()


def grouped_mm(x: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Rows `ends[e-1]:ends[e]` of `x [rows, K]` times `weights[e].T`, `weights [E, N, K]`, `ends [E]` int32: `[rows, N]`.

    The fastest grouped product of the device; differentiable in `x` and `weights`. A group may have no row.
    """
    return _module().grouped_mm(x, weights, ends)


def block_bytes() -> int:
    """How large a temporary is worth making at once, by an algorithm that can work in blocks."""
    return _module().BLOCK_BYTES


def empty_cache() -> None:
    """Return unused device memory to the driver; nothing to do on a CPU."""
    _module().empty_cache()


def profiler_activities() -> list:
    """What torch.profiler records here."""
    return _module().profiler_activities()
