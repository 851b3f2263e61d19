"""Run by the ranks of `test_checkpoint.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megarl.checkpoint import Checkpointer, checkpoints
from megarl.config.schema import Config, Model, Optimizer, Parallel
from megarl.data.packing import micro_batches
from megarl.learner.policy import Policy
from megarl.parallel import Mesh
from tests.dist.learner_cases import fixed_batch, negative_log_likelihood


def two_steps_each_side(path: str, folder: str, parallel: dict[str, Any], resume: bool) -> list[float]:
    """Gradient norms and learning rate of steps 3 and 4, with a checkpoint between step 2 and 3: written, or read."""
    cfg = Config(model=Model(path=path), parallel=Parallel(**parallel))
    mesh = Mesh.build(cfg.parallel)
    settings = Optimizer(lr=1e-2, schedule="linear", warmup_steps=2)
    policy = Policy.from_hf(path, cfg, mesh, optimizer=settings, total_steps=10)
    checkpointer = Checkpointer(Path(folder), mesh, keep=2)
    checkpointer.register("policy", policy)
    packed = micro_batches(fixed_batch(), 400, policy.layout)
    if resume:
        assert checkpointer.load_latest() == 2 and policy.updates == 2
    else:
        for step in range(1, 3):
            policy.train_step(packed, negative_log_likelihood)
            checkpointer.save(step)
    out = []
    for _ in range(2):
        out += [policy.next_lr(), policy.train_step(packed, negative_log_likelihood).grad_norm]
    if not resume:  # retention: the two newest of three
        checkpointer.save(3)
        assert [c.name for c in checkpoints(Path(folder))] == ["step_000002", "step_000003"]
        mesh.barrier()
        if mesh.is_main:
            import shutil

            shutil.rmtree(Path(folder) / "step_000003")
            (Path(folder) / "step_000009").mkdir()  # a save that was cut off before its last file
    return out
