"""Run by the ranks of `test_fp8_layouts.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megarl.checkpoint import Checkpointer
from megarl.config.schema import Config, Model, Optimizer, Parallel
from megarl.data.packing import micro_batches
from megarl.learner.policy import Policy
from megarl.metrics import reduce_metrics
from megarl.parallel import Mesh
from tests.dist.learner_cases import fixed_batch, negative_log_likelihood


def step(path: str, parallel: dict[str, Any], save: str = "", load: str = "", **model: Any) -> dict[str, Any]:
    """Loss and gradient norm of one step, or of none after `load`; then the past amaxes by layer and weight."""
    cfg = Config(model=Model(path=path, **model), parallel=Parallel(**parallel))
    mesh = Mesh.build(cfg.parallel)
    policy = Policy.from_hf(path, cfg, mesh, optimizer=Optimizer(lr=1e-3), total_steps=10)
    out: dict[str, Any] = {}
    checkpointer = Checkpointer(Path(save or load), mesh, keep=1)
    checkpointer.register("policy", policy)
    if load:
        assert checkpointer.load_latest() == 1
    else:
        result = policy.train_step(micro_batches(fixed_batch(), 100, policy.layout), negative_log_likelihood)
        assert result.applied
        metrics = reduce_metrics(result.metrics, mesh.all_gather_object)
        out |= {"loss": metrics["loss"], "gradient": result.grad_norm}
    if save:
        checkpointer.save(1)
    layers = [layer for module in policy.modules for layer in module.decoder.layers]
    amaxes = {
        f"{layer.layer_number} {name}": buffer.tolist()
        for layer in layers
        for name, buffer in layer.named_buffers()
        if name.endswith("amax")
    }
    return out | {"amaxes": amaxes}
