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
    from megarl.learner.probes import probe_log_probs
    from megarl.parallel import Mesh

    cfg = load_config(config, ["parallel.ep=1", "parallel.nproc=1"])
    policy = Policy(read_spec(cfg.model.path), cfg, Mesh.build(cfg.parallel))
    load_model(Path(checkpoint) / "shards", policy.modules)
    return [log_probs.tolist() for log_probs in probe_log_probs(policy, sequences)]


def train_with_broken_sync(config: str, layer_skipped: bool) -> str:
    """`megarl train` whose weight sync hands the engine two experts swapped, or an old layer; what it ends with."""
    from megarl import platform

    platform.setup()
    from megarl.config import load_config
    from megarl.errors import RunFailed
    from megarl.rollout import weight_sync
    from megarl.trainers import rl

    plain = weight_sync.stream_hf

    def swapped(*args):
        for name, tensor in plain(*args):
            if "layers.1.mlp.experts.2." in name:
                name = name.replace("experts.2.", "experts.5.")
            elif "layers.1.mlp.experts.5." in name:
                name = name.replace("experts.5.", "experts.2.")
            yield name, tensor

    def skipped(*args):
        for name, tensor in plain(*args):
            yield name, tensor * 0.5 if "layers.0.self_attn.o_proj" in name else tensor

    weight_sync.stream_hf = skipped if layer_skipped else swapped
    weight_sync.SyncPlan.follow = lambda self, stream: stream  # past the first guard, to the comparison of log-probs
    try:
        rl.run(load_config(config))
    except RunFailed as error:
        return str(error)
    return "nothing was noticed"
