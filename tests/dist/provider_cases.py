"""Both layer providers from one checkpoint, on one layout: what each rank runs for `test_te_provider.py`.

Of tests/dist on a stand-in (`te_cases`), of tests/gpu on Transformer Engine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megarl.checkpoint import Checkpointer
from megarl.config.schema import Config, Model, Optimizer, Parallel
from megarl.convert import save_hf, stream_gradients, stream_hf
from megarl.convert.load import matched
from megarl.data.packing import micro_batches
from megarl.learner.optimizer import gradient_norm
from megarl.learner.policy import Policy
from megarl.parallel import Mesh
from tests.dist.convert_cases import same
from tests.dist.learner_cases import fixed_batch, negative_log_likelihood


def policy_of(path: str, layers: str, degrees: dict[str, Any], train: bool = True, **model: Any) -> Policy:
    parallel = Parallel(**({"distributed_optimizer": False} | degrees))
    cfg = Config(model=Model(path=path, layers=layers, **model), parallel=parallel)
    mesh = Mesh.build(cfg.parallel)
    settings = Optimizer(lr=1e-2, weight_decay=0.1) if train else None
    return Policy.from_hf(path, cfg, mesh, optimizer=settings, total_steps=10)


def torn_down() -> None:
    from megatron.core import parallel_state

    dist.barrier()
    parallel_state.destroy_model_parallel()


def agree(path: str, out: str, degrees: dict[str, Any]) -> dict[str, Any]:
    """Both providers from one checkpoint: log-probs, gradients and their norm; names, and the bits of an export."""
    found: dict[str, dict[str, Any]] = {}
    for layers in ("torch", "te"):
        policy = policy_of(path, layers, degrees)
        packed = micro_batches(fixed_batch(), 400, policy.layout)
        streamed = {name: tensor.clone() for name, tensor in stream_hf(policy.modules, policy.spec, policy.mesh)}
        held = {name: list(tensor.shape) for name, (_, tensor) in matched(policy.modules, policy.spec).items()}
        log_probs, _ = policy.log_probs(packed)
        norm = _without_step(policy, packed)
        gradients = {n: g.clone() for n, g in stream_gradients(policy.chunks, policy.spec, policy.mesh)}
        save_hf(f"{out}-{layers}", policy.modules, policy.spec, policy.mesh, extra_from=path)
        found[layers] = dict(
            streamed=streamed, held=held, log_probs=log_probs, norm=norm, gradients=gradients,
            own=sorted(name for module in policy.modules for name, _ in module.named_parameters()),
            kinds={type(m).__name__ for module in policy.modules for m in module.modules()},
        )  # fmt: skip
        torn_down()
    a, b = found["torch"], found["te"]
    reference = load_file(Path(path) / "model.safetensors")
    return {
        "bits": same(b["streamed"], reference) and same(load_file(f"{out}-te/model.safetensors"), reference),
        "shapes": a["held"] == b["held"],
        "log_probs": max((_gap(x, y) for x, y in zip(a["log_probs"], b["log_probs"], strict=True)), default=0.0),
        "gradients": {name: _relative(b["gradients"][name], g) for name, g in a["gradients"].items()},
        "names": a["gradients"].keys() == b["gradients"].keys(),
        "norms": [a["norm"], b["norm"]],
        "own": b["own"],
        "kinds": sorted(b["kinds"]),
    }


def _without_step(policy: Policy, packed: list) -> float:
    """The gradient's norm, leaving the weights."""
    policy._apply = lambda: (False, 0.0)
    policy.train_step(packed, negative_log_likelihood)
    del policy._apply
    policy.optimizer.prepare_grads()
    return gradient_norm(policy.optimizer)


def _gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp(min=1e-12))


def cross_load(path: str, folder: str, degrees: dict[str, Any]) -> dict[str, list[float]]:
    """A checkpoint of each provider in the other: gradient norms of the step after it, as without a checkpoint."""
    out: dict[str, list[float]] = {}
    for written, read in (("torch", "te"), ("te", "torch")):
        for layers, is_new in ((written, True), (read, False)):
            policy = policy_of(path, layers, degrees | {"distributed_optimizer": True})
            checkpointer = Checkpointer(Path(folder) / written, policy.mesh, keep=1)
            checkpointer.register("policy", policy)
            packed = micro_batches(fixed_batch(), 400, policy.layout)
            if is_new:
                policy.train_step(packed, negative_log_likelihood)
                checkpointer.save(1)
            else:
                assert checkpointer.load_latest() == 1
            steps = [policy.train_step(packed, negative_log_likelihood).grad_norm for _ in range(2)]
            out.setdefault(written, []).extend(steps)
            torn_down()
    return out
