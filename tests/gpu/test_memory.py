"""On CUDA: what a phase does not need is not on the device, and vLLM sleeps and wakes in stages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.dist.checkpoints import make
from tests.dist.harness import run_ranks
from tests.e2e.program import Project

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ONE = ["parallel.nproc=1", "parallel.ep=1", "checkpoint.every=0"]
LEARNER = ("policy_weights", "policy_gradients", "policy_optimizer", "critic", "reference")
MIB = 2**-10  # GiB
ADAM = dict(lr=3e-3, weight_decay=0.1, eps=1e-4, clip_grad=0.5, warmup_steps=5, schedule="linear")


@pytest.fixture(scope="module")
def on_device(tmp_path_factory) -> dict[str, dict[str, float]]:
    """Phase -> owner -> GiB on the device, of the last step of PPO with a critic and a reference, all of it offloaded."""
    project = Project.create(tmp_path_factory.mktemp("memory"))
    done = project.megarl("sft", project.config, *ONE)
    assert done.returncode == 0, done.stderr
    ppo = ["rl.algorithm={preset: ppo}", "memory.param_offload=true"]
    done = project.megarl("train", project.config, *ONE, *ppo)
    assert done.returncode == 0, done.stderr
    out: dict[str, dict[str, float]] = {}
    for key, value in project.rows()[-1].items():
        if key.startswith("memory/device/"):
            phase, owner = key.split("/")[2:]
            out.setdefault(phase, {})[owner] = value
    return out


@pytest.mark.parametrize("phase", ["rollout", "sync"])
def test_nothing_of_the_learner_is_there_while_the_engine_has_the_device(on_device, phase):
    assert [owner for owner in LEARNER if on_device[phase].get(owner, 0.0) > 0.0] == []
    assert on_device[phase]["engine_weights"] > 0


@pytest.mark.parametrize("phase", ["reference", "log_probs", "update"])
def test_nothing_of_the_engine_is_there_while_the_learner_works(on_device, phase):
    assert "engine_weights" not in on_device[phase] and "engine_kv_cache" not in on_device[phase]
    assert on_device[phase]["policy_weights"] > 0


def test_the_cache_wakes_after_the_sync(on_device):
    assert "engine_kv_cache" not in on_device["sync"] and on_device["rollout"]["engine_kv_cache"] > 0


def test_optimizers_are_there_for_the_update_only(on_device):
    assert [phase for phase, owners in on_device.items() if owners.get("policy_optimizer", 0.0) > MIB / 2] == ["update"]


@pytest.mark.parametrize("kind", ["te", "apex", "fused", "foreach"])
def test_adam_on_cuda_gives_the_weights_of_float64_adam(tmp_path: Path, kind: str):
    from megarl.platform.optimizers import FUSED, fused_adam

    if kind in FUSED:
        try:
            fused_adam(kind)
        except ImportError as error:
            pytest.skip(str(error))
    make(tmp_path, num_hidden_layers=2)
    ways = {"own": ADAM | {"implementation": kind}, "offloaded": ADAM | {"cpu_offload": True}}
    if kind in FUSED:  # one kind in a process; the offloaded one is PyTorch's whatever the others are
        ways["offloaded"] |= {"implementation": "auto"}
    found = run_ranks("tests.dist.optimizer_cases:against_float64", 1, str(tmp_path), ways, "float32", 20)[0]
    assert all(distance <= 1e-6 and apart <= 1e-6 for distance, apart in found.values()), found
