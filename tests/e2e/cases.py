"""What the end-to-end tests run inside ranks."""

from __future__ import annotations

from pathlib import Path


def learner_log_probs(config: str, checkpoint: str, sequences: list[list[int]]) -> list[list[float]]:
    """Log-probs of each token under the distributed checkpoint, in megarl's learner."""
    from megarl import platform

    platform.setup()
    from megarl.checkpoint import load_model
    from megarl.config import load_config
    from megarl.convert import read_spec
    from megarl.learner.policy import Policy
    from megarl.parallel import Mesh
    from megarl.trainers.rl import probe_log_probs

    cfg = load_config(config, ["parallel.ep=1", "parallel.nproc=1"])
    policy = Policy(read_spec(cfg.model.path), cfg, Mesh.build(cfg.parallel))
    load_model(Path(checkpoint) / "shards", policy.modules)
    return [log_probs.tolist() for log_probs in probe_log_probs(policy, sequences)]
