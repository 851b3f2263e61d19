"""Run by the ranks of `test_learner.py`: three optimizer steps on a fixed batch, whatever the layout."""

from __future__ import annotations

from typing import Any

import torch

from megarl.config.schema import Config, Model, Optimizer, Parallel
from megarl.data.packing import micro_batches
from megarl.learner.policy import Policy
from megarl.metrics import Mean, Sum, reduce_metrics
from megarl.parallel import Mesh
from megarl.types import Batch

SEQUENCES = 8


def fixed_batch(vocab: int = 120) -> Batch:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 40, (SEQUENCES,), generator=generator)
    count = int(lengths.sum())
    batch = Batch(
        tokens=torch.randint(4, vocab, (count,), generator=generator),
        lengths=lengths,
        response_mask=torch.ones(count),
        token_weights=torch.rand(count, generator=generator) / count,
    )
    first = batch.offsets()[:-1]
    batch.response_mask[first] = 0
    batch.token_weights[first] = 0
    return batch


def negative_log_likelihood(batch: Batch, log_probs: Any, entropy: Any, shards: Any) -> Any:
    loss = -(batch.token_weights * log_probs).sum()
    return loss, {"loss": Sum(loss.detach()), "entropy": Mean.of(entropy, batch.response_mask)}


def train(
    path: str, parallel: dict[str, Any], budget: int, dtype: str = "float32", steps: int = 3
) -> list[list[float]]:
    """[loss, entropy, gradient norm] of each step, then the sum of log-probs after the last one."""
    cfg = Config(model=Model(path=path, dtype=dtype), parallel=Parallel(**parallel))
    mesh = Mesh.build(cfg.parallel)
    settings = Optimizer(lr=1e-3, clip_grad=1.0, weight_decay=0.01)
    policy = Policy.from_hf(path, cfg, mesh, optimizer=settings, total_steps=10)
    batch = fixed_batch()
    packed = micro_batches(batch, budget, mesh.dp_rank, mesh.dp, 2 * mesh.tp)
    out = []
    for _ in range(steps):
        result = policy.train_step(packed, negative_log_likelihood)
        assert result.applied
        metrics = reduce_metrics(result.metrics, mesh.all_gather_object)
        out.append([metrics["loss"], metrics["entropy"], result.grad_norm])
    log_probs, _ = policy.log_probs(packed)
    own = sum(float((lp * m.batch.response_mask).sum()) for lp, m in zip(log_probs, packed))
    own = own if mesh.tp_rank == 0 else 0.0
    out.append([sum(mesh.all_gather_object(own))])
    return out
