"""Run by the ranks of `test_scalar_head.py`: a critic and a reward model, trained on a fixed batch in any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megarl import algorithms
from megarl.checkpoint import Checkpointer, checkpoints
from megarl.config.schema import Config, Model, Optimizer, Parallel
from megarl.data.packing import micro_batches
from megarl.learner.policy import Policy
from megarl.metrics import Mean, Sum, reduce_metrics
from megarl.parallel import Mesh
from megarl.types import Batch, SequenceShards
from tests.dist.learner_cases import fixed_batch

STEPS = 2
# Adam's step is the sign of a gradient far above eps, however small it is: with the usual eps rounding would show
OPTIMIZER = Optimizer(lr=1e-2, eps=1e-3, clip_grad=1.0, weight_decay=0.01)


def targets(batch: Batch) -> Tensor:
    """A number in [-1, 1] for every token that depends on nothing but the token."""
    return torch.cos(batch.tokens.double() * 1.7).float()


def value_loss(batch: Batch, values: Tensor, shards: SequenceShards) -> Any:
    """The values' squared distance from the tokens they come before."""
    loss = (batch.token_weights * (values - targets(batch)) ** 2).sum()
    return loss, {"loss": Sum(loss.detach()), "value": Mean.of(values, batch.response_mask)}


def score_loss(batch: Batch, scores: Tensor, shards: SequenceShards) -> Any:
    """The scores' squared distance from a number that depends on the sequence's first token."""
    wanted = targets(batch)[batch.offsets()[:-1]]
    loss = ((scores - wanted) ** 2).sum() / 8
    return loss, {"loss": Sum(loss.detach()), "score": Mean.of(scores, torch.ones_like(scores))}


def with_index(batch: Batch) -> Batch:
    """Every sequence knows its place, so that what the ranks computed can be put together again."""
    return batch.replace(group_index=torch.arange(len(batch)))


def collect(mesh: Mesh, packed: list, outputs: list[Tensor], per_token: bool) -> list[float]:
    """All sequences' outputs in order, from the ranks of the last stage; each must say what its tp peers say."""
    mine = {}
    for micro, out in zip(packed, outputs):
        pieces = out.split(micro.batch.lengths.tolist()) if per_token else out.split(1)
        for index, piece in zip(micro.batch.group_index.tolist(), pieces, strict=True):
            mine[index] = piece[1:].tolist() if per_token else piece.tolist()  # a sequence's first value means nothing
    found: dict[int, list[float]] = {}
    for rank in mesh.all_gather_object(mine):
        for index, values in rank.items():
            assert found.setdefault(index, values) == values, "tensor-parallel ranks disagree"
    assert sorted(found) == list(range(8))
    return [x for index in sorted(found) for x in found[index]]


def train(path: str, parallel: dict[str, Any], budget: int, role: str, folder: str) -> dict[str, Any]:
    """Values (or scores) before the first and after each optimizer step; loss, mean output and gradient norms.

    The first layout leaves a checkpoint in `folder`; a later one ends by reading it, and adds what that model says.
    """
    cfg = Config(model=Model(path=path), parallel=Parallel(**parallel))
    mesh = Mesh.build(cfg.parallel)
    policy = Policy.from_hf(path, cfg, mesh, role=role, optimizer=OPTIMIZER, total_steps=10)
    packed = micro_batches(with_index(fixed_batch()), budget, policy.layout)
    loss, read = (value_loss, policy.values) if role == "critic" else (score_loss, policy.scores)
    outputs, steps = [collect(mesh, packed, read(packed), role == "critic")], []
    for _ in range(STEPS):
        result = policy.train_step(packed, loss)
        metrics = reduce_metrics(result.metrics, mesh.all_gather_object)
        assert result.applied and f"{role}/lr" in metrics
        steps.append([metrics["loss"], metrics["value" if role == "critic" else "score"], metrics[f"{role}/grad_norm"]])
        outputs.append(collect(mesh, packed, read(packed), role == "critic"))
    validated = reduce_metrics(policy.validate(packed, loss), mesh.all_gather_object)
    head = [chunk.output_layer.weight for chunk in policy.modules if chunk.post_process]
    heads = [weight for weight in mesh.all_gather_object(head[0].flatten().tolist() if head else None) if weight]
    assert all(weight == heads[0] for weight in heads), "ranks disagree on the head"
    checkpointer = Checkpointer(Path(folder) / role, mesh, keep=1)
    checkpointer.register(role, policy)
    if not checkpoints(Path(folder) / role):
        checkpointer.save(STEPS)
    else:
        with torch.no_grad():
            for chunk in policy.modules:
                for parameter in chunk.parameters():
                    parameter.fill_(float("nan"))
        assert checkpointer.load_latest() == STEPS and policy.updates == STEPS
        outputs.append(collect(mesh, packed, read(packed), role == "critic"))
    return {"outputs": outputs, "steps": steps, "validated": validated["loss"], "head": heads[0]}


def train_all(cases: list[tuple[str, str, dict[str, Any], int]], folder: str) -> list[dict[str, Any]]:
    """`train` of each (checkpoint, role, layout, token budget) in turn."""
    from megatron.core import parallel_state

    out = []
    for path, role, parallel, budget in cases:
        out.append(train(path, parallel, budget, role, f"{folder}/{Path(path).name}"))
        dist.barrier()
        parallel_state.destroy_model_parallel()
    return out


def critic_on_a_fixed_batch(path: str) -> list[float]:
    """The clipped value loss of a fixed batch with returns that depend on its tokens, before each of some steps."""
    cfg = Config(model=Model(path=path))
    mesh = Mesh.build(cfg.parallel)
    critic = Policy.from_hf(path, cfg, mesh, role="critic", optimizer=Optimizer(lr=3e-3), total_steps=100)
    batch = fixed_batch()
    packed = micro_batches(batch.replace(returns=targets(batch)), 90, critic.layout)
    losses = []
    for _ in range(12):
        for micro, values in zip(packed, critic.values(packed), strict=True):
            micro.batch.values = values

        def loss(own: Batch, values: Tensor, shards: SequenceShards) -> Any:
            return algorithms.value_loss(
                algorithms.ValueLoss(0.2), values, own.values, own.returns, own.token_weights, own.response_mask
            )

        result = critic.train_step(packed, loss)
        losses.append(reduce_metrics(result.metrics, mesh.all_gather_object)["critic/loss"])
    return losses
