"""One optimizer step of a Mixture-of-Experts model, whose experts have an optimizer of their own."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megarl import platform

platform.setup()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.distributed import DistributedDataParallel  # noqa: E402

from megarl.config.schema import RL, Config, Generate, Model, Parallel  # noqa: E402
from megarl.data import micro_batches  # noqa: E402
from megarl.learner.policy import Policy  # noqa: E402
from megarl.models.generate import spec_of  # noqa: E402
from megarl.parallel import Mesh  # noqa: E402
from megarl.types import Batch  # noqa: E402

SMALL = Generate(hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, num_experts=4, moe_intermediate_size=16)


@pytest.fixture
def mesh():
    yield Mesh.build(Parallel())
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_are_gathered_once_and_the_step_is_megatrons(mesh, monkeypatch, dtype):
    cfg = Config(model=Model(path="nowhere", dtype=dtype), rl=RL(data=[], micro_batch_tokens=64))
    gathers = []
    gather = DistributedDataParallel.start_param_sync
    monkeypatch.setattr(
        DistributedDataParallel, "start_param_sync", lambda self, *a, **k: (gathers.append(1), gather(self, *a, **k))
    )

    def stepped(by_megatron: bool) -> tuple[int, list[torch.Tensor]]:
        torch.manual_seed(0)
        policy = Policy(spec_of(SMALL), cfg, mesh, optimizer=cfg.rl.optimizer)
        with torch.no_grad():
            for parameter in (p for module in policy.modules for p in module.parameters()):
                parameter.copy_(torch.randn(parameter.shape) * 0.1)
        policy.optimizer.reload_model_params()
        batch = Batch(torch.arange(2, 42), torch.tensor([25, 15]), torch.ones(40))
        gathers.clear()
        with monkeypatch.context() as patch:
            if by_megatron:
                patch.setattr("megarl.learner.policy.step_optimizer", lambda optimizer, _: optimizer.step_with_ready_grads())
            for _ in range(2):
                loss = lambda own, log_probs, *_: (-log_probs.mean(), {})  # noqa: E731
                assert policy.train_step(micro_batches(batch, 64, policy.layout), loss).applied
        return len(gathers), [p.detach().clone() for module in policy.modules for p in module.parameters()]

    (ours, weights), (theirs, expected) = stepped(False), stepped(True)
    assert (ours, theirs) == (2, 4)
    assert all(map(torch.equal, weights, expected))
