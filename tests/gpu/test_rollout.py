"""vLLM on CUDA beside the learner: the weights it is given, and the log-probs it computes with them."""

from __future__ import annotations

import pytest

from megarl.rollout.weight_sync import THRESHOLDS
from tests.dist.harness import run_ranks
from tests.dist.vllm_cases import make_checkpoint

SYNC = "tests.gpu.engine_cases:sync"


@pytest.fixture(scope="module")
def checkpoint(cuda, tmp_path_factory):
    return make_checkpoint(str(tmp_path_factory.mktemp("rollout") / "model"))


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_syncs_make_learner_and_engine_agree(checkpoint, dtype, record_property):
    """Into vLLM's layers where they are known, and by its own reload; every weight's checksum is compared too."""
    found = run_ranks(SYNC, 1, checkpoint, dtype, timeout=1100)[0]
    record_property("written into the layers", found["reason"] or "yes")
    for way in {"direct", "reload"} & found.keys():
        record_property(f"log-prob gap, {way}", f"{found[way]['mean']:.1e} mean, {found[way]['max']:.1e} max")
        assert found[way]["mean"] <= THRESHOLDS[dtype]
    assert "reload" in found


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("degrees", "rollout"),
    [
        (dict(ep=2), {}),  # each GPU an engine of its own
        (dict(tp=2), dict(tensor_parallel=2)),
        (dict(pp=2), dict(data_parallel=2, expert_parallel=True)),  # replicas that share their experts
    ],
)
def test_syncs_over_nccl(checkpoint, degrees, rollout, record_property):
    for rank, found in enumerate(run_ranks(SYNC, 2, checkpoint, "float32", degrees, timeout=1100, **rollout)):
        gaps = {way: found[way]["mean"] for way in {"direct", "reload"} & found.keys()}
        record_property(f"rank {rank}", f"{gaps}")
        assert max(gaps.values()) <= THRESHOLDS["float32"]
