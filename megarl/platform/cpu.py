"""CPU: answer torch.cuda with the CPU, so that unmodified Megatron-core runs over gloo.

Megatron-core asks `torch.cuda` for its device in several hundred places. Each patch below says why it is there;
`tests/unit/test_platform.py` removes them one by one and sees Megatron fail without them.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._device

from megarl.platform.host import host_memory

NAME = "cpu"
BACKEND = "gloo"
CPU = torch.device("cpu")
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


def synchronize() -> None:
    """Work is done when a call returns."""


def empty_cache() -> None:
    """The C allocator gives pages back by itself."""


def profiler_activities() -> list:
    return [torch.profiler.ProfilerActivity.CPU]


class Stream:
    """A CUDA stream on a machine whose work is already done when a call returns."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, *args: Any) -> None: ...
    def wait_event(self, *args: Any) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self, *args: Any) -> Event:
        return Event()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *args: Any) -> None: ...
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream)

    def __hash__(self) -> int:
        return 0


class Event:
    """A CUDA event that has always happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record(self, *args: Any) -> None: ...
    def wait(self, *args: Any) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Event) -> float:
        return 0.0


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


def _get_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(state)


def _ignored() -> Callable:
    """A call that does nothing; a new function each time, because torch._dynamo keys its rules by identity."""
    return lambda *args, **kwargs: None


def _same(self: Any, *args: Any, **kwargs: Any) -> Any:
    return self


# why each name of torch.cuda is answered: Megatron calls it on a path that a CPU run takes
CUDA_ANSWERS: dict[str, Any] = {
    "current_device": lambda: CPU,  # where Megatron allocates parameters and buffers
    "device_count": lambda: 1,  # rank to device mapping
    "set_device": _ignored(),
    "synchronize": _ignored(),  # timers and dispatchers
    "empty_cache": _ignored(),
    "current_stream": lambda *a: Stream(),  # overlap of communication
    "default_stream": lambda *a: Stream(),
    "Stream": Stream,  # the all-to-all dispatcher's side stream
    "Event": Event,
    "stream": lambda s: contextlib.nullcontext(),
    "get_rng_state": _get_rng_state,  # Megatron's RNG tracker forks per parallel group
    "set_rng_state": _set_rng_state,
    "manual_seed": torch.manual_seed,
    "memory_allocated": lambda *a, **k: 0,
    "max_memory_allocated": lambda *a, **k: 0,
    "memory_reserved": lambda *a, **k: 0,
    "memory_stats": lambda *a, **k: {},
    "reset_peak_memory_stats": _ignored(),
    "default_generators": Generators(),
    "_lazy_call": lambda call, *a, **k: call(),  # torch defers it until CUDA is initialised, which never happens
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
        setattr(torch.cuda, attribute, answer)
    torch.cuda.random.get_rng_state = CUDA_ANSWERS["get_rng_state"]  # the RNG tracker imports it from there
    torch.cuda.nvtx.range_push, torch.cuda.nvtx.range_pop = _ignored(), _ignored()  # profiler ranges
    torch.Tensor.cuda = torch.nn.Module.cuda = _same  # `.cuda()` means "to where it already is"
    torch.Tensor.record_stream = _ignored()
    _patch_tensor_type()
    _patch_tensor_to()


def _patch_tensor_type() -> None:
    """Megatron's optimizers compare `tensor.type()` with 'torch.cuda.FloatTensor' and reject anything else."""
    plain = torch.Tensor.type

    @functools.wraps(plain)
    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        out = plain(self, *args, **kwargs)
        return out.replace("torch.", "torch.cuda.", 1) if isinstance(out, str) and not args and not kwargs else out

    torch.Tensor.type = type_


def _patch_tensor_to() -> None:
    """`tensor.to("cuda")` and `tensor.to(0)` mean the CPU."""
    plain = torch.Tensor.to

    @functools.wraps(plain)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and not isinstance(args[0], (torch.dtype, torch.Tensor)) and _is_cuda(args[0]):
            args = (CPU, *args[1:])
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return plain(self, *args, **kwargs)

    torch.Tensor.to = to
