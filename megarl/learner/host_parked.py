"""`HostParked`: a model whose weights live on the host while others need the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from megarl import platform


class HostParked:
    """Keeps the tensors of `modules` on the host; `on_device()` brings them back for a while.

    On a CPU the host is the device and nothing is copied.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
        self.park()

    def park(self) -> None:
        self._move(torch.device("cpu"))

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """The tensors are on the compute device inside the block and on the host after it."""
        self._move(platform.device())
        try:
            yield
        finally:
            self.park()
            platform.empty_cache()

    def _move(self, device: torch.device) -> None:
        for tensor in self._tensors:
            tensor.data = tensor.data.to(device)
