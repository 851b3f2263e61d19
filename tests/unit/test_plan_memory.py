"""The planner's bytes against real modules and real steps, and what it does with the settings of `memory`."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megarl import platform

platform.setup()

from megarl.config.schema import RL, Config, Generate, Memory, Model, Optimizer, Parallel, Rollout  # noqa: E402
from megarl.convert import read_spec  # noqa: E402
from megarl.data import micro_batches  # noqa: E402
from megarl.learner.optimizer import init_state  # noqa: E402
from megarl.learner.policy import Policy  # noqa: E402
from megarl.models.generate import spec_of  # noqa: E402
from megarl.parallel import Mesh  # noqa: E402
from megarl.plan.activations import Activations, Row, in_flight, most_kept  # noqa: E402
from megarl.plan.hardware import GIB, named  # noqa: E402
from megarl.plan.held import held, stage_ranks  # noqa: E402
from megarl.plan.memory import OWNERS, plan_memory  # noqa: E402
from megarl.plan.seconds import PHASES  # noqa: E402
from megarl.report.panels import OWNERS as LEDGER  # noqa: E402
from megarl.types import Batch  # noqa: E402
from tests.families import all_cases  # noqa: E402
from tools.bench.plan_side import Kept  # noqa: E402

SMALL = Generate(hidden_size=64, num_layers=4, num_heads=8, num_kv_heads=4, head_dim=16, num_experts=8, moe_intermediate_size=32)
LENGTHS = (3, 5, 70, 17, 64, 9, 41, 28)


def config(parallel=None, dtype="float32", gen=SMALL, **sections) -> Config:
    rl = RL(data=[], micro_batch_tokens=512, max_prompt_tokens=64)
    given = dict(model=Model(path="nowhere", generate=gen, dtype=dtype), parallel=parallel or Parallel(), rl=rl)
    return Config(**given | {"rollout": Rollout(max_response_tokens=128)} | sections)


def policy_of(cfg, world=1, rank=0):
    return held(cfg, world, rank, {"policy": (spec_of(cfg.model.generate), cfg.rl.optimizer)})["policy"]


def end_world():
    from megatron.core import parallel_state

    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


@pytest.fixture
def alone():
    yield Mesh.build(Parallel())
    end_world()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("distributed", [True, False])
def test_bytes_without_data_are_those_of_the_real_model(alone, dtype, distributed):
    cfg = config(Parallel(distributed_optimizer=distributed), dtype)
    real = Policy(spec_of(SMALL), cfg, alone, optimizer=cfg.rl.optimizer)
    init_state(real.optimizer)
    sizes = {owner: sum(s.nbytes() for s in parked.storages) for owner, parked in real.parked.items()}
    end_world()
    found = policy_of(cfg)
    assert {"weights": found.weights, "gradients": found.gradients, "optimizer": found.optimizer} == sizes
    assert found.layers == ((0, 1, 2, 3),)


def test_twice_the_expert_parallelism_halves_experts_alone():
    spec = spec_of(SMALL)
    experts = spec.num_layers * spec.num_experts * 3 * spec.hidden_size * spec.moe_intermediate_size * 4
    found = [policy_of(config(Parallel(ep=ep)), world=4) for ep in (1, 2, 4)]
    for ep, one, more in zip((1, 2), found, found[1:], strict=False):
        assert one.weights - more.weights == pytest.approx(experts / ep / 2, rel=2e-3)
        assert one.gradients - more.gradients == pytest.approx(experts / ep / 2, rel=2e-3)
    assert found[0].optimizer == pytest.approx(found[2].optimizer, rel=2e-2)  # all of it is shared out in any case


def test_data_parallel_ranks_share_the_optimizer_and_nothing_else():
    one, four = (policy_of(config(), world=world) for world in (1, 4))
    assert four.weights == pytest.approx(one.weights, rel=2e-3)
    assert four.optimizer == pytest.approx(one.optimizer / 4, rel=2e-2)


def test_stages_have_all_layers_once_and_the_ends_what_is_theirs():
    cfg = config(Parallel(pp=4))
    found = [policy_of(cfg, 4, rank) for rank in stage_ranks(cfg, 4)]
    assert [one.layers for one in found] == [((0,),), ((1,),), ((2,),), ((3,),)]
    assert found[0].weights > found[1].weights == found[2].weights < found[3].weights
    virtual = policy_of(config(Parallel(pp=2, vpp=2)), 2, 1)
    assert virtual.layers == ((1,), (3,))


@pytest.mark.parametrize(
    "pp, chunks, stage, rows, flying",
    [
        (1, 1, 0, 9, [1]),
        (4, 1, 0, 9, [4]),
        (4, 1, 3, 9, [1]),
        (4, 1, 0, 2, [2]),
        (2, 2, 0, 8, [3, 2]),  # warm-up of 2 (pp - 1) + (vpp - 1) pp = 4 chunk-rows, and the one at work
        (2, 2, 1, 8, [2, 1]),
    ],
)
def test_rows_in_flight_are_those_of_megatrons_schedules(pp, chunks, stage, rows, flying):
    assert in_flight(pp, chunks, stage, rows) == flying


def _spec(name, folder):
    if name in ("qwen3_moe", "qwen3"):
        return spec_of(SMALL.model_copy(update={"family": name}))
    import json

    case = all_cases()[name]
    case.configuration(vocab_size=256, max_position_embeddings=512).save_pretrained(folder)
    path = Path(folder) / "config.json"
    given = {"architectures": [case.config.removesuffix("Config") + "ForCausalLM"]}
    path.write_text(json.dumps(given | json.loads(path.read_text())))
    return read_spec(folder)


@pytest.mark.parametrize(
    "family, recompute",
    [("qwen3_moe", kind) for kind in ("none", "selective", "full")]
    + [(name, "none") for name in ("qwen3", "deepseek_v3", "gpt_oss", "qwen2_moe", "olmoe")],
)
def test_the_formula_of_kept_activations_is_what_a_step_keeps(alone, family, recompute):
    with tempfile.TemporaryDirectory() as folder:
        spec = replace(_spec(family, folder), max_position_embeddings=512)
    cfg = config(Parallel(recompute=recompute, distributed_optimizer=False))
    policy = Policy(spec, cfg, alone, optimizer=Optimizer())
    torch.manual_seed(3)
    for parameter in (p for module in policy.modules for p in module.parameters()):
        torch.nn.init.normal_(parameter.data, std=0.1)
    tokens = sum(LENGTHS)
    batch = Batch(torch.randint(2, 120, (tokens,)), torch.tensor(LENGTHS), torch.ones(tokens))
    (row,) = micro_batches(batch, 512, policy.layout)
    kept = Kept({s._cdata for parked in policy.parked.values() for s in parked.storages})

    def loss(own, log_probs, _entropy, _shards):
        return -log_probs.mean(), {}

    with torch.autograd.graph.saved_tensors_hooks(kept.pack, kept.unpack):
        assert policy.train_step([row], loss).applied
    shape = Row.of(LENGTHS, cfg.parallel, tokens - len(LENGTHS), spec.windows)
    predicted = most_kept([Activations(spec, cfg.parallel, shape, 4, "torch", True)], [range(spec.num_layers)], 0)
    assert predicted == pytest.approx(kept.most, rel=0.05)


H100 = named("h100")


def _plan(**sections):
    return plan_memory(config(Parallel(ep=2), "bfloat16", **sections), 2, H100).ranks[0].phases


def test_owners_are_those_of_a_runs_ledger():
    assert set(LEDGER) - {"rest"} <= set(OWNERS)
    plan = plan_memory(config(Parallel(ep=2)), 2, H100)
    assert set(plan.ranks[0].phases) == set(PHASES)
    assert {owner for phase in plan.ranks[0].phases.values() for owner in phase} <= set(OWNERS)


def test_what_memory_parks_is_on_the_host_between_updates():
    for phase in ("rollout", "sync", "old_log_probs"):
        found = _plan()[phase]
        assert "policy_gradients" not in found  # forgotten, not copied
        assert found["policy_optimizer"][0] == 0 < found["policy_optimizer"][1]
        kept = _plan(memory=Memory(optimizer_offload=False, grad_offload=False))[phase]
        assert kept["policy_optimizer"][0] > 0 and kept["policy_gradients"][0] > 0
    assert _plan()["update"]["policy_optimizer"][0] > 0 < _plan()["update"]["policy_gradients"][0]
    away = _plan(memory=Memory(param_offload=True))
    assert away["rollout"]["policy_weights"][0] == 0 < away["update"]["policy_weights"][0]


def test_vllm_sleeps_as_deep_as_it_is_told():
    for level, here in ((2, set()), (1, {"engine_weights"}), (0, {"engine_weights", "engine_kv_cache", "engine_workspace"})):
        found = _plan(memory=Memory(sleep_level=level))["update"]
        assert {owner for owner in found if owner.startswith("engine")} == here
        assert found.get("engine_weights", (0, 0))[0] == (found["engine_weights"][0] if level == 0 else 0)


def test_vllm_has_its_share_of_the_device_and_no_more():
    found = _plan(rollout=Rollout(max_response_tokens=128, gpu_memory_utilization=0.5))["rollout"]
    taken = sum(here for owner, (here, _) in found.items() if owner.startswith("engine"))
    assert taken == pytest.approx(0.5 * H100.memory_bytes, rel=1e-6)


def test_on_a_cpu_the_host_is_the_device():
    plan = plan_memory(config(Parallel(ep=2)), 2, named("cpu"))
    assert all(amounts[0] == 0 for rank in plan.ranks for phase in rank.phases.values() for amounts in phase.values())
    assert plan.ranks[0].phases["rollout"]["engine_kv_cache"][1] == int(0.25 * GIB)


def test_a_critic_and_a_reference_are_owners_of_their_own():
    from megarl.config.schema import Algorithm

    rl = RL(data=[], algorithm=Algorithm(preset="ppo"), max_prompt_tokens=64)
    found = _plan(rl=rl)
    assert found["update"]["critic"][0] > found["rollout"]["critic"][0] > 0
    assert found["old_log_probs"]["reference"][0] > 0 == found["update"]["reference"][0]
