"""What of the CUDA platform can be seen without a device: its refusals, and the arguments that engines get on it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megarl import platform
from megarl.errors import BadInput
from megarl.platform import cuda, vllm_patches


def test_a_rank_without_a_device_is_refused(monkeypatch):
    bound = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", bound.append)
    cuda.set_device(1)
    with pytest.raises(BadInput, match="rank 2 of this machine has no device: there are 2; start 2 ranks"):
        cuda.set_device(2)
    assert bound == [1]


def test_replicas_that_share_experts_step_together(monkeypatch):
    """And float32 is float32 in vLLM's Triton kernels, whose own choice is TF32."""
    monkeypatch.setattr(platform, "name", lambda: "cuda")
    assert "async_scheduling" not in vllm_patches.engine_arguments(1.0, 0.4, 1)
    assert vllm_patches.engine_arguments(1.0, 0.4, 2)["async_scheduling"] is False
    assert vllm_patches.environment()["TRITON_F32_DEFAULT"] == "ieee"


def test_both_model_runners_say_what_they_record():
    """vLLM's runner on CUDA has a capturer that may be None, the other one, on a CPU, none before it records."""
    capturer = SimpleNamespace(get_device_buffer=lambda: torch.empty(16, 3, 2))
    assert vllm_patches.recorded_routing(SimpleNamespace(routed_experts_capturer=capturer)) == (3, 2)
    assert vllm_patches.recorded_routing(SimpleNamespace(routed_experts_capturer=None)) is None
    assert vllm_patches.recorded_routing(SimpleNamespace()) is None
