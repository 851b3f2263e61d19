"""Tensors without bytes in the place of the device's: modules, gradient buffers and optimizers of any size can be built and
counted on any machine."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

META = torch.device("meta")


@contextmanager
def simulated() -> Iterator[None]:
    """Inside the block the device is torch's `meta`, for Megatron too, and groups that ask for gloo get the world's backend.

    On the CPU platform only: what is simulated has no need of a CUDA device.
    """
    from megarl.platform import cpu

    current, plain, where, new_group = torch.cuda.current_device, torch.Tensor.type, cpu.CPU, dist.new_group

    @functools.wraps(plain)
    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        out = plain(self, *args, **kwargs)
        return out.replace(".meta.", ".", 1) if isinstance(out, str) else out  # Megatron compares with 'torch.cuda.FloatTensor'

    @functools.wraps(new_group)
    def group(*args: Any, **kwargs: Any) -> Any:
        return new_group(*args, **{key: value for key, value in kwargs.items() if key != "backend" or value != "gloo"})

    dist.new_group = group
    cpu.CPU, torch.cuda.current_device, torch.Tensor.type = META, lambda: META, type_
    try:
        yield
    finally:
        dist.new_group = new_group
        cpu.CPU, torch.cuda.current_device, torch.Tensor.type = where, current, plain
