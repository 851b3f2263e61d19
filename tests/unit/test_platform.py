"""Each patch of the seam is needed, and all of them together are enough.

What only shows with several ranks is covered elsewhere: `synchronize` and numpy split sizes by the pp and the tp x ep
layouts of tests/dist/test_learner.py, that large blocks are given back by the streamed conversion's memory in
tests/dist/test_convert_layouts.py, vLLM's patches by test_vllm_patches.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NEEDED = {  # patch -> what is seen without it
    "factories": "Torch not compiled with CUDA enabled",
    "current_device": "Torch not compiled with CUDA enabled",
    "current_stream": "Torch not compiled with CUDA enabled",
    "Stream": "torch.cuda.Stream requires CUDA support",
    "random.get_rng_state": "Torch not compiled with CUDA enabled",
    "get_rng_state": "Torch not compiled with CUDA enabled",
    "manual_seed": "AssertionError",
    "default_generators": "TypeError",
    "_lazy_call": "AssertionError",
    "Tensor.type": "Wrapped parameters must be one of torch.cuda.FloatTensor",
    "Tensor.cuda": "Torch not compiled with CUDA enabled",
    "te_general_gemm": "te_general_gemm",
    "keep step": "this model ('step')",
    "te version": "'NoneType' and 'Version'",
    "offload on a CPU": "cpu_copys_map_gpu_param[param]",
    "offload in float32": "this model (tensor([",
    "Event.wait": "has no attribute 'wait'",
    "keep memory": "page faults",
    "writers": "the patched writer is in use",
}


def program(patches: list[str]) -> dict[str, tuple[int, str]]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.platform_program", *patches],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def outcomes():
    """(exit code, output) of every variant once, two at a time: nearly all of it is importing."""
    names = ["nothing", *NEEDED]
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(program, (names[::2], names[1::2]))
    return first | second


def test_with_every_patch_it_works(outcomes):
    code, output = outcomes["nothing"]
    assert code == 0, output[-2000:]


@pytest.mark.parametrize("patch", NEEDED)
def test_without_this_patch_it_does_not(outcomes, patch):
    code, output = outcomes[patch]
    assert code != 0, f"{patch} is no longer needed: remove it"
    assert NEEDED[patch] in output
