"""Tests that need an NVIDIA GPU. Everywhere else they are collected and skipped, each with what is missing.

`tools/gpu_smoke.sh` runs them, the quickstart's test before them, and writes a table.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker("gpu")


def missing() -> str | None:
    """What these tests miss on this machine; None: nothing."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device"
    return None


@pytest.fixture(scope="session", autouse=True)
def cuda() -> torch.device:
    """The device, which every test of this folder needs."""
    reason = missing()
    if reason:
        pytest.skip(reason)
    from megarl import platform

    platform.setup()
    platform.set_device(0)
    return platform.device()


@pytest.fixture(scope="session")
def fp8_products(cuda: torch.device) -> None:
    """A chip that multiplies FP8 matrices: compute capability 8.9 and above."""
    from megarl import platform

    if not platform.has_fp8_products():
        pytest.skip(f"{torch.cuda.get_device_name()} has no FP8 products")
