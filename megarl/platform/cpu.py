"""CPU: answer torch.cuda with the CPU, so that unmodified Megatron-core runs over gloo.

Megatron-core asks `torch.cuda` for its device in several hundred places. Each patch below says why it is there;
`tests/unit/test_platform.py` removes them one by one and sees Megatron fail without them.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from typing import Any

import psutil
import torch
import torch.utils._device

from megarl.platform.host import host_memory, resident_bytes
from megarl.platform.shared_memory import Gather, SharedWindows, share
from megarl.platform.shared_memory import map_tensors as map_tensors

NAME = "cpu"
BACKEND = "gloo"
CPU = torch.device("cpu")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST_KEPT = 32 << 20  # bytes
BLOCK_BYTES = 16 << 20  # stays in the cache between two operators, and with the process, see `_keep_memory`
FACTORIES = [
    "tensor",
    "empty",
    "zeros",
    "ones",
    "full",
    "arange",
    "rand",
    "randn",
    "randint",
    "as_tensor",
    "eye",
    "linspace",
    "empty_like",
    "zeros_like",
    "ones_like",
    "full_like",
]


def device() -> torch.device:
    return CPU


def set_device(local_rank: int) -> None:
    """One CPU for all ranks."""


def device_memory() -> dict[str, float]:
    return host_memory()


def capacity() -> tuple[int | None, int, int]:
    memory = psutil.virtual_memory()
    return None, memory.available, memory.total


def used_bytes() -> tuple[int, int]:
    return 0, resident_bytes()


def synchronize() -> None:
    """Work is done when a call returns."""


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    from megarl.platform import cpu_products

    if cpu_products.suits(x, weight):
        return cpu_products.Linear.apply(x, weight)
    return torch.nn.functional.linear(x, weight)


def has_fp8_products() -> bool:
    return False  # PyTorch has one, and it is slow


def gated_experts(
    x: torch.Tensor,
    weight1: torch.Tensor,
    weight2: torch.Tensor,
    ends: torch.Tensor,
    probs: torch.Tensor,
    rows: torch.Tensor | None,
) -> torch.Tensor:
    from megarl.platform.cpu_products import GatedExperts

    rows = torch.arange(len(x)) if rows is None else rows
    return GatedExperts.apply(x, weight1, weight2, ends, probs, rows)


def take_rows(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return x.index_select(0, rows)


def sum_rows(values: torch.Tensor, rows: torch.Tensor, count: int) -> torch.Tensor:
    return values.new_zeros(count, *values.shape[1:]).index_add(0, rows, values)


def grouped_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    from megarl.platform.cpu_grouped import GroupedLinear

    return GroupedLinear.apply(x, weight, bias, ends.tolist())


def sink_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, sinks: torch.Tensor
) -> torch.Tensor:
    from megarl.platform.cpu_sinks import SinkAttention

    return SinkAttention.apply(query, key, value, mask, sinks)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    from megarl.platform.cpu_norm import RMSNorm

    return RMSNorm.apply(x, weight, eps)


def shared_windows(size: int, place: tuple[int, int], gather: Gather, topics: int, timeout: float) -> SharedWindows:
    return share(size, place, gather, topics, timeout)


def empty_cache() -> None:
    """Host memory is kept, see `_keep_memory`."""


def profiler_activities() -> list:
    return [torch.profiler.ProfilerActivity.CPU]


class Stream:
    """A CUDA stream on a machine whose work is already done when a call returns."""

    def wait_stream(self, *args: Any) -> None: ...
    def record_event(self, *args: Any) -> Event:
        return Event()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream)

    def __hash__(self) -> int:
        return 0


class Event:
    """What a stream records: it has always happened."""

    def synchronize(self) -> None: ...
    def wait(self, *args: Any) -> None: ...


class Generators:
    """`torch.cuda.default_generators`: every device has the CPU's."""

    def __getitem__(self, index: int) -> torch.Generator:
        return torch.default_generator


def _is_cuda(device: Any) -> bool:
    return device is not None and (isinstance(device, int) or torch.device(device).type == "cuda")


def _on_cpu(factory: Callable) -> Callable:
    @functools.wraps(factory)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return factory(*args, **kwargs)

    return wrapped


# why each name of torch.cuda is answered; `tests/unit/test_platform.py` leaves each one out and sees it missed
CUDA_ANSWERS: dict[str, Any] = {
    "current_device": lambda: CPU,  # where Megatron allocates parameters and buffers
    "current_stream": lambda *a: Stream(),  # what the token dispatcher's side stream waits for
    "Stream": Stream,  # the token dispatcher makes one
    "synchronize": lambda *a, **k: None,  # between pipeline stages
    "get_rng_state": lambda *a, **k: torch.get_rng_state(),  # Megatron's RNG tracker: one state per parallel group
    "random.get_rng_state": lambda *a, **k: torch.get_rng_state(),  # the same, by the other name Megatron uses
    "manual_seed": torch.manual_seed,  # how it makes those states
    "default_generators": Generators(),  # what it sets them in
    "_lazy_call": lambda call, *a, **k: call(),  # torch defers the setting until CUDA is initialised: never
}


def install() -> None:
    """Put every answer in place. Must run before megatron.core is imported."""
    # Megatron and vLLM wrap small functions in torch.compile; compiling them costs ten seconds a start and gains nothing
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # a `with torch.device(...)` block knows factories by identity, from a list cached at its first use: without this call it
    # would list the wrapped ones, and transformers would build its rotary tables in uninitialised memory
    torch.utils._device._device_constructors()
    for factory in FACTORIES:  # Megatron passes device="cuda" or current_device()
        setattr(torch, factory, _on_cpu(getattr(torch, factory)))
    for attribute, answer in CUDA_ANSWERS.items():
        owner, _, attribute = attribute.rpartition(".")
        setattr(getattr(torch.cuda, owner) if owner else torch.cuda, attribute, answer)
    torch.Tensor.cuda = lambda self, *a, **k: self  # a checkpoint is loaded through `.cuda()`
    _patch_tensor_type()
    _keep_memory()
    from megarl.platform.cpu_reduce import by_memory

    torch.distributed.all_reduce = by_memory(torch.distributed.all_reduce)


def _patch_tensor_type() -> None:
    """Megatron's optimizers compare `tensor.type()` with 'torch.cuda.FloatTensor' and reject anything else."""
    plain = torch.Tensor.type

    @functools.wraps(plain)
    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        out = plain(self, *args, **kwargs)
        return out.replace("torch.", "torch.cuda.", 1) if isinstance(out, str) and not args and not kwargs else out

    torch.Tensor.type = type_


def _keep_memory() -> None:
    """Freed blocks below `LARGEST_KEPT` stay with the process.

    By default glibc gives the activations back after every step and gets them again, page fault by page fault, in the
    next: a fifth of a step where faults are dear (virtual machines, containers). Larger blocks go back one by one, so
    that what is left between them does not add up: kept too, they made a streamed conversion hold the model twice.
    """
    library = ctypes.CDLL(None)
    for option, value in ((M_TRIM_THRESHOLD, 2**31 - 1), (M_MMAP_THRESHOLD, LARGEST_KEPT)):
        library.mallopt(option, value)
