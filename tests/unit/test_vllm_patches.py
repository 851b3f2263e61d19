"""Every patch of vLLM: still needed (vLLM does what it undoes) and enough (nothing of it is left)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megarl.platform.vllm_sampler import uniforms
from megarl.rollout.engine import sample_seed
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


def test_vllm_rewinds_generators_and_a_cpus_cannot(facts):
    """Why requests carry no torch generator on a CPU: a prompt prefilled in two parts would end the run."""
    assert facts["rewinds"]
    with pytest.raises(RuntimeError):
        torch.Generator().get_offset()


@pytest.mark.parametrize("name", ["uses_expert_map", "gathers_uneven", "names_the_job"])
def test_vllm_still_lacks_what_engines_of_several_cpu_ranks_need(facts, name):
    """That the patches are enough is seen in tests/dist/test_rollout_layouts.py."""
    assert facts[name] is False


def test_uniforms_are_splitmix64():
    """First outputs of the reference implementation for seed 1234567 (prng.di.unimi.it, splitmix64.c)."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    found = uniforms(np.full(4, 1234567, np.uint64), np.arange(4))
    assert found.tolist() == [(value >> 11) * 2.0**-53 for value in expected]


def test_uniforms_of_different_seeds_are_uniform_and_unrelated():
    seeds = np.array([sample_seed(1, "p", i, 0) for i in range(4000)], np.uint64)
    first, second = uniforms(seeds, np.zeros(4000, np.int64)), uniforms(seeds, np.ones(4000, np.int64))
    counts = np.histogram(first, bins=20, range=(0, 1))[0]
    assert ((counts - 200) ** 2 / 200).sum() < 50  # chi-square, 19 degrees of freedom
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.06
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.06


@pytest.mark.parametrize(
    "name", ["random", "numpy", "torch", "set_threads", "stream", "LOCAL_WORLD_SIZE", "LD_PRELOAD"]
)
def test_starting_puts_back_what_vllm_changes(facts, name):
    assert facts["inside"][name] != facts["before"][name]
    assert facts["after"][name] == facts["before"][name]


def test_starting_keeps_the_thread_count(facts):
    assert facts["after"]["threads"] == facts["before"]["threads"] == 1


def test_a_reload_without_the_patch_leaves_the_experts_wrong(facts):
    assert facts["synced"] == []
    assert facts["unpatched"] == EXPERTS
    assert facts["patched"] == []


def test_weights_go_straight_into_the_layers(facts):
    assert facts["places"]  # every tensor of the checkpoint has one, and nothing else
    assert facts["direct"] == []


@pytest.mark.parametrize(
    "changed, reason",
    [
        ("nothing", "taken on"),
        ("parameter", "model.layers.0.self_attn (Qwen3MoeAttention): nothing is known of its sinks"),
        ("kernel", "model.layers.1.mlp.experts.routed_experts (RoutedExperts): its kernel is NoneType"),
        ("packing", "the packing of its kernel (vec) is not one of rows of a matrix"),
        ("operator", "vLLM is not as it was expected to be: AttributeError: '_OpNamespace' '_C' object has no attribute"),
        ("mapping", "model.other.weight is not there in vLLM, and in the plan (1,)"),
    ],
)
def test_a_model_with_anything_unknown_is_not_written_into(facts, changed, reason):
    """What writing relies on in vLLM, each missing once: then full tensors are reloaded, see test_weight_sync.py."""
    assert reason in facts["unknown"][changed]


def test_what_the_model_does_not_have_is_refused(facts):
    unknown, misshapen, partial = facts["refusals"]
    assert "the engine's model has no model.layers.0.bias" in unknown
    assert "model.layers.0.self_attn.q_proj.weight is (" in misshapen
    assert "the stream ended without model.layers.0.self_attn.k_proj.weight" in partial


def test_norms_have_a_kernel_that_vllm_does_not_use(facts):
    assert facts["norms"]["is_native"]
    assert facts["norms"]["gap"] < 1e-5


def test_a_layer_that_was_not_reloaded_still_computes(facts):
    assert len(facts["partly"]) == 3 and all(value <= 0 for value in facts["partly"])
