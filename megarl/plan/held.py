"""What a rank's models hold, counted on the real modules: built on a simulated world, of tensors without data."""

from __future__ import annotations

from dataclasses import dataclass

from megarl.config.schema import Config, Optimizer
from megarl.learner.optimizer import init_state
from megarl.learner.policy import Policy, Role
from megarl.models.spec import ModelSpec
from megarl.parallel import Mesh
from megarl.platform.simulated import simulated


@dataclass(frozen=True)
class Held:
    """Bytes of one model on one rank, by what the memory ledger counts; `layers`: their numbers, by virtual stage."""

    weights: int
    gradients: int = 0
    optimizer: int = 0
    layers: tuple[tuple[int, ...], ...] = ()


def stage_ranks(cfg: Config, world: int) -> list[int]:
    """The first rank of every pipeline stage: tensor, expert and data parallelism give all ranks of a stage equal shares,
    and the distributed optimizer's last ones, which have the rest, no larger ones."""
    return [stage * (world // cfg.parallel.pp) for stage in range(cfg.parallel.pp)]


def held(cfg: Config, world: int, rank: int, models: dict[Role, tuple[ModelSpec, Optimizer | None]]) -> dict[Role, Held]:
    """Of each model, by role: its spec, and its optimizer if it is trained.

    Weights and gradients are those of Megatron's buffers, moments those after a first step. Raises BadInput for what a
    run would refuse.
    """
    cfg = _buildable(cfg)
    out: dict[Role, Held] = {}
    with simulated(), Mesh.simulated(cfg.parallel, rank, world) as mesh:
        for role, (spec, optimizer) in models.items():
            if optimizer is not None:  # its bytes are the same, wherever it is stepped and whosever kernel it is
                optimizer = optimizer.model_copy(update={"implementation": "auto", "cpu_offload": False})
            policy = Policy(spec, cfg, mesh, role, optimizer=optimizer)
            if optimizer is not None:
                init_state(policy.optimizer)
            sizes = {owner: sum(s.nbytes() for s in parked.storages) for owner, parked in policy.parked.items()}
            layers = tuple(tuple(layer.layer_number - 1 for layer in chunk.decoder.layers) for chunk in policy.modules)
            out[role] = Held(**sizes, layers=layers)
            del policy
    return out


def _buildable(cfg: Config) -> Config:
    """With PyTorch's layers, whose parameters are Transformer Engine's, without what FP8 adds to them, and without a gather
    of parameters that reading a model waits for."""
    parallel = cfg.parallel.model_copy(update={"overlap_param_gather": False})
    model = cfg.model.model_copy(update={"layers": "torch", "fp8": "none"})
    return cfg.model_copy(update={"model": model, "parallel": parallel})
