"""One optimizer step of every loss on CUDA: what the CPU's single process does, and in layouts what one GPU does."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from megarl.config import load_config
from megarl.verify.layouts.names import DEFAULT, parse
from megarl.verify.layouts.oracle import compare_layouts

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "cpu" / "quickstart.yaml"
ALONE = ["one+permuted", "one+unpacked"]  # one process, packed and in another order, and a sequence at a time


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_cuda_does_what_the_cpu_does(dtype, record_property):
    """Losses, every gradient and the weights after a step, to 1e-10 in float64 and 1e-5 in float32."""
    cfg = load_config(CONFIG, [], require="model")
    found = compare_layouts(cfg, ALONE, dtype, command=(sys.executable, "-m", "tests.gpu.reference_on_cpu"))
    record_property("worst gradient", found.summary())
    assert found.broken == {} and [row.line() for row in found.rows if row.misses] == []
    assert {row.layout.name for row in found.rows} == set(ALONE)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_layouts_over_nccl(dtype, record_property):
    """All layouts that the machine's GPUs hold against one of them."""
    count = torch.cuda.device_count()
    names = [name for name in DEFAULT if 1 < parse(name).world <= count]
    if not names:
        pytest.skip(f"needs 2 GPUs, there is {count}")
    found = compare_layouts(load_config(CONFIG, [], require="model"), [], dtype, nproc=count)
    record_property("worst gradient", found.summary())
    assert found.broken == {} and [row.line() for row in found.rows if row.misses] == []
    assert {row.layout.world for row in found.rows} == {parse(name).world for name in names} | {1}
