"""`HostParked`: tensors that live on the host while others need the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, UntypedStorage, nn

from megarl import platform


class HostParked:
    """Keeps what `find` gives on the host; `on_device()` brings it back for a while.

    What moves are storages, each as a whole: a tensor, and every view of it, stays the object that it is and has its
    bytes again afterwards, so Megatron's parameters remain views of its buffers. While it is parked a storage has no bytes
    and nothing may compute with its tensors; `view` shows where they are. On a CPU the host is the device and nothing is
    copied. `forgets`: the contents need not come back, only the memory, which is then zero; a CPU gives it up too.
    `frozen`: they never change, so they are copied to the host once and stay there.
    """

    def __init__(self, find: Callable[[], Iterable[UntypedStorage]], forgets: bool = False, frozen: bool = False) -> None:
        self._find, self._forgets, self._frozen = find, forgets, frozen
        self._parked: list[tuple[UntypedStorage, int, Tensor | None]] = []  # storage, bytes, its contents on the host
        self._places: dict[int, Tensor] = {}  # of parked storages, their contents on the host
        self._kept: dict[int, Tensor] = {}  # contents of frozen storages

    @classmethod
    def modules(cls, modules: Sequence[nn.Module]) -> HostParked:
        """The parameters and buffers of `modules`, which nobody trains, parked at once."""
        parked = cls(lambda: by_owner({"": tensors_of(modules)})[""], frozen=True)
        parked.park()
        return parked

    @property
    def is_parked(self) -> bool:
        return bool(self._parked)

    @property
    def storages(self) -> list[UntypedStorage]:
        """Where the bytes are now."""
        copies = [copy for _, _, copy in self._parked if copy is not None and not self._frozen]
        on_host = [copy.untyped_storage() for copy in (*copies, *self._kept.values())]
        return [storage for storage in self._find() if storage.nbytes()] + on_host

    @torch.no_grad()
    def park(self) -> None:
        """Idempotent, as is `unpark`."""
        for storage in self._find():
            size = storage.nbytes()
            # a storage of fixed size (numpy's, or one that other processes map), which only a CPU has, stays
            if size and storage.resizable() and (self._forgets or not _is_on_host(storage)):
                self._parked.append((storage, size, None if self._forgets else self._copy(storage)))
        platform.synchronize()  # the copies are complete
        self._places = {storage._cdata: copy for storage, _, copy in self._parked if copy is not None}
        for storage, _, _ in self._parked:
            storage.resize_(0)
        platform.empty_cache()

    def _copy(self, storage: UntypedStorage) -> Tensor:
        copy = self._kept.get(storage._cdata)
        copy = _host_copy(storage) if copy is None else copy
        if self._frozen:
            self._kept[storage._cdata] = copy
        return copy

    @torch.no_grad()
    def unpark(self) -> None:
        for storage, size, copy in self._parked:
            storage.resize_(size)
            if copy is None:
                _bytes(storage).zero_()
            else:
                _bytes(storage).copy_(copy, non_blocking=True)
        platform.synchronize()
        self._parked.clear(), self._places.clear()

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """The tensors are on the compute device inside the block; after it they are where they were before."""
        was_parked = self.is_parked
        self.unpark()
        try:
            yield
        finally:
            if was_parked:
                self.park()

    def view(self, tensor: Tensor) -> Tensor:
        """The tensor's values to read, on the host while it is parked; a quantised one's codes, on the device."""
        if platform.is_quantised(tensor):
            return platform.rebuilt(tensor, lambda part: self.view(part).to(platform.device())) if self._places else tensor
        copy = self._places.get(tensor.untyped_storage()._cdata)
        if copy is None:
            return tensor
        place = tensor.storage_offset(), tensor.shape, tensor.stride()
        return tensor.new_empty(0, device=copy.device).set_(copy.untyped_storage(), *place)


def tensors_of(modules: Iterable[nn.Module]) -> list[Tensor]:
    """All parameters and buffers."""
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]


def by_owner(owners: Mapping[str, Iterable[Tensor]]) -> dict[str, list[UntypedStorage]]:
    """The distinct storages of each owner's tensors; one that several have is the first one's."""
    seen: set[int] = set()
    out: dict[str, list[UntypedStorage]] = {}
    for name, tensors in owners.items():
        out[name] = []
        for tensor in (part for whole in tensors for part in platform.parts_of(whole)):
            storage = tensor.untyped_storage()
            if storage._cdata not in seen:
                seen.add(storage._cdata)
                out[name].append(storage)
    return out


def _is_on_host(storage: UntypedStorage) -> bool:
    return storage.device.type == "cpu"


def _bytes(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _host_copy(storage: UntypedStorage) -> Tensor:
    """[bytes] uint8, in pinned memory where there is a device to copy from."""
    pinned = storage.device.type != "cpu"
    copy = torch.empty(storage.nbytes(), dtype=torch.uint8, device="cpu", pin_memory=pinned)
    return copy.copy_(_bytes(storage), non_blocking=True)
