"""Every patch of vLLM: still needed (vLLM does what it undoes) and enough (nothing of it is left)."""

from __future__ import annotations

import pytest

from tests.dist.harness import run_ranks
from tests.dist.vllm_cases import make_checkpoint

EXPERTS = ["experts.gate_proj/up_proj/down_proj"]


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    path = make_checkpoint(str(tmp_path_factory.mktemp("vllm") / "model"))
    return run_ranks("tests.dist.vllm_cases:patches", 1, path, timeout=240)[0]


@pytest.mark.parametrize(
    "key, default",
    [
        ("VLLM_ENABLE_V1_MULTIPROCESSING", "True"),
        ("VLLM_NO_USAGE_STATS", "False"),
        ("VLLM_LOGGING_LEVEL", "INFO"),
        ("VLLM_CPU_OMP_THREADS_BIND", "auto"),
        ("VLLM_HOST_IP", ""),
    ],
)
def test_environment_is_needed(facts, key, default):
    assert facts["defaults"][key] == default


def test_environment_is_enough(facts):
    assert facts["client"] == "InprocClient"
    assert facts["usage_stats"] is False
    assert facts["ip"] == "127.0.0.1"
    assert facts["cores"][0] == facts["cores"][1]


def test_nothing_is_compiled_although_vllm_would(facts):
    assert facts["compiles"]
    assert facts["dynamo_disabled"] and facts["dynamo_frames"] == 0


@pytest.mark.parametrize("name", ["random", "numpy", "torch", "set_threads", "stream", "LOCAL_WORLD_SIZE", "LD_PRELOAD"])
def test_starting_puts_back_what_vllm_changes(facts, name):
    assert facts["inside"][name] != facts["before"][name]
    assert facts["after"][name] == facts["before"][name]


def test_starting_keeps_the_thread_count(facts):
    assert facts["after"]["threads"] == facts["before"]["threads"] == 1


def test_a_reload_without_the_patch_leaves_the_experts_wrong(facts):
    assert facts["synced"] == []
    assert facts["unpatched"] == EXPERTS
    assert facts["patched"] == []


def test_a_layer_that_was_not_reloaded_still_computes(facts):
    assert len(facts["partly"]) == 3 and all(value <= 0 for value in facts["partly"])
