"""What is parked gives its bytes up, and comes back bit for bit, views and all."""

from __future__ import annotations

import pytest
import torch

from megarl import platform
from megarl.learner import host_parked
from megarl.learner.host_parked import HostParked, by_owner
from tests.dist.te_quantised import MXFP8Tensor, Quantizer


@pytest.fixture
def device_apart(monkeypatch):
    """What is on the host counts as on a device."""
    monkeypatch.setattr(host_parked, "_is_on_host", lambda storage: False)


def make() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A buffer, and views of it of several shapes and of another type."""
    buffer = torch.arange(24, dtype=torch.float32)
    views = {"rows": buffer[:12].view(3, 4), "columns": buffer[12:].view(4, 3).t(), "bits": buffer.view(torch.int32)}
    return buffer, views


def test_a_parked_buffer_has_no_bytes_and_comes_back_with_its_views(device_apart):
    buffer, views = make()
    expected = {name: view.clone() for name, view in views.items()}
    parked = HostParked(lambda: by_owner({"": [buffer, *views.values()]})[""])
    parked.park(), parked.park()
    assert buffer.untyped_storage().nbytes() == 0
    assert sum(storage.nbytes() for storage in parked.storages) == 96
    for name, view in views.items():
        assert torch.equal(parked.view(view), expected[name])
    parked.unpark(), parked.unpark()
    for name, view in views.items():
        assert torch.equal(view, expected[name])
    views["rows"].add_(1)
    assert torch.equal(buffer[:12].view(3, 4), expected["rows"] + 1)


def test_on_device_is_for_a_while_and_parks_only_what_was_parked(device_apart):
    buffer, _ = make()
    parked = HostParked(lambda: by_owner({"": [buffer]})[""])
    with parked.on_device():
        pass
    assert not parked.is_parked and buffer.sum() == 276
    parked.park()
    with parked.on_device():
        buffer.mul_(2)
    assert parked.is_parked and buffer.untyped_storage().nbytes() == 0
    parked.unpark()
    assert buffer.sum() == 552


def test_what_is_forgotten_comes_back_as_zeros_on_any_device():
    buffer, views = make()
    parked = HostParked(lambda: by_owner({"": [buffer]})[""], forgets=True)
    parked.park()
    assert parked.storages == [] and buffer.untyped_storage().nbytes() == 0
    parked.unpark()
    assert buffer.untyped_storage().nbytes() == 96 and not views["rows"].any()


def test_on_a_cpu_the_host_is_the_device():
    buffer, _ = make()
    parked = HostParked(lambda: by_owner({"": [buffer]})[""])
    before = buffer.data_ptr()
    parked.park()
    assert not parked.is_parked and buffer.data_ptr() == before and parked.view(buffer) is buffer


def test_a_storage_belongs_to_its_first_owner():
    buffer, views = make()
    found = by_owner({"first": [views["rows"]], "second": [buffer, torch.zeros(2)]})
    assert [storage.nbytes() for storage in found["first"]] == [96]
    assert [storage.nbytes() for storage in found["second"]] == [8]


def test_modules_are_parked_with_parameters_and_buffers(device_apart):
    module = torch.nn.BatchNorm1d(3)
    weight = module.weight.detach().clone()
    parked = HostParked.modules([module])
    assert module.weight.untyped_storage().nbytes() == module.running_mean.untyped_storage().nbytes() == 0
    copies = [storage.data_ptr() for storage in parked.storages]
    with parked.on_device():
        assert torch.equal(module.weight, weight)
        assert len(parked.storages) == 2 * len(copies)  # the copies stay
    assert [storage.data_ptr() for storage in parked.storages] == copies  # and are not made again


def test_the_parts_of_a_quantised_tensor_are_parked_and_shown(device_apart):
    values = torch.randn(64, 32).bfloat16()
    quantised = Quantizer(MXFP8Tensor, (1, 32), True)(values)
    numbers = quantised.dequantize()
    parked = HostParked(lambda: by_owner({"": [quantised]})[""])
    parked.park()
    assert sum(storage.nbytes() for storage in parked.storages) == 2 * values.numel() + 64 * 4  # by rows, columns; scales
    assert all(part.untyped_storage().nbytes() == 0 for part in platform.parts_of(quantised))
    assert torch.equal(parked.view(quantised).dequantize(), numbers)
    parked.unpark()
    assert torch.equal(quantised.dequantize(), numbers) and torch.equal(quantised.columns, quantised.codes.t())
