"""Run by the ranks of `test_optimizer.py`: optimizers of the real learner, on a fixed batch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megarl.checkpoint import Checkpointer
from megarl.config.schema import Config, Model, Optimizer, Parallel
from megarl.data.packing import micro_batches
from megarl.errors import BadInput
from megarl.learner.policy import Policy
from megarl.parallel import Mesh
from tests.dist.learner_cases import fixed_batch, negative_log_likelihood


def make_policy(path: str, optimizer: dict[str, Any], dtype: str = "float32", mesh: Mesh | None = None) -> Policy:
    cfg = Config(model=Model(path=path, dtype=dtype), parallel=Parallel(ep=int(os.environ.get("WORLD_SIZE", "1"))))
    return Policy.from_hf(path, cfg, mesh or Mesh.build(cfg.parallel), optimizer=Optimizer(**optimizer), total_steps=40)


def step(policy: Policy) -> float:
    result = policy.train_step(micro_batches(fixed_batch(), 400, policy.layout), negative_log_likelihood)
    assert result.applied
    return result.grad_norm


def main_weights(policy: Policy) -> dict[str, Tensor]:
    """This rank's main weights, float64 copies, flat: whole without data parallelism, its shards otherwise."""
    out = {}
    for part in policy.optimizer.chained_optimizers:
        if not hasattr(part, "model_param_group_index_map"):  # the model's own parameters
            continue
        names = {parameter: name for name, parameter in policy.modules[0].named_parameters()}
        for parameter, (group, place) in part.model_param_group_index_map.items():
            main = part.optimizer.param_groups[group]["params"][place]
            main = getattr(part.optimizer, "param_to_inner_param", {}).get(main, main)  # the hybrid optimizer's
            out[names[parameter]] = main.detach().double().flatten().clone()
    return out or {name: p.detach().double().flatten().clone() for name, p in policy.modules[0].named_parameters()}


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Of the furthest tensor, relative to its norm."""
    assert found.keys() == expected.keys()
    return max(float((found[n] - expected[n]).norm() / expected[n].norm().clamp(min=1e-30)) for n in expected)


class Adam:
    """Adam (arXiv 1412.6980, algorithm 1) with either weight decay (arXiv 1711.05101, algorithm 2), in float64."""

    def __init__(self, weights: dict[str, Tensor], decayed: set[str], settings: Optimizer) -> None:
        self.weights, self.decayed, self.settings, self.t = weights, decayed, settings, 0
        self.m = {name: torch.zeros_like(w) for name, w in weights.items()}
        self.v = {name: torch.zeros_like(w) for name, w in weights.items()}

    def step(self, gradients: dict[str, Tensor], lr: float) -> None:
        s, self.t = self.settings, self.t + 1
        norm = sum(float(g.square().sum()) for g in gradients.values()) ** 0.5
        clip = min(1.0, s.clip_grad / (norm + 1e-6))  # as Megatron and torch.nn.utils.clip_grad_norm_
        (b1, b2), decoupled = s.betas, s.decoupled_weight_decay
        for name, w in self.weights.items():
            decay = s.weight_decay if name in self.decayed else 0.0
            g = gradients[name] * clip + (0.0 if decoupled else decay) * w
            self.m[name] = b1 * self.m[name] + (1 - b1) * g
            self.v[name] = b2 * self.v[name] + (1 - b2) * g * g
            m, v = self.m[name] / (1 - b1**self.t), self.v[name] / (1 - b2**self.t)
            self.weights[name] = w - lr * (m / (v.sqrt() + s.eps) + (decay if decoupled else 0.0) * w)


def against_float64(path: str, optimizer: dict[str, Any], dtype: str, steps: int) -> float:
    """How far the main weights are, after so many steps, from those of `Adam` on the learner's gradients."""
    policy = make_policy(path, optimizer, dtype)
    gradients: dict[str, Tensor] = {}
    plain = policy.optimizer.prepare_grads

    def prepare() -> bool:
        for name, p in policy.modules[0].named_parameters():
            gradients[name] = p.main_grad.detach().double().flatten().clone()
        return plain()

    policy.optimizer.prepare_grads = prepare
    decayed = {name for name, p in policy.modules[0].named_parameters() if p.dim() > 1}
    adam = Adam(main_weights(policy), decayed, Optimizer(**optimizer))
    for _ in range(steps):
        lr = policy.next_lr()
        step(policy)
        adam.step(gradients, lr)
    return distance(main_weights(policy), adam.weights)


def apart(path: str, optimizers: dict[str, dict[str, Any]], dtype: str, steps: int) -> dict[str, float]:
    """How far each one's main weights are from the first one's after so many steps."""
    found, mesh = {}, None
    for name, optimizer in optimizers.items():
        policy = make_policy(path, optimizer, dtype, mesh)
        mesh = policy.mesh
        for _ in range(steps):
            step(policy)
        found[name] = main_weights(policy)
    first = next(iter(found.values()))
    return {name: distance(weights, first) for name, weights in found.items()}


def resumed(path: str, folder: str, first: dict[str, Any], then: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Two steps, a checkpoint and two more; then a new learner that resumes, perhaps with another optimizer."""
    policy = make_policy(path, first, dtype)
    checkpointer = Checkpointer(Path(folder), policy.mesh, keep=1)
    checkpointer.register("policy", policy)
    step(policy), step(policy)
    checkpointer.save(2)
    norms = [step(policy), step(policy)]
    other = make_policy(path, then, dtype, policy.mesh)
    checkpointer = Checkpointer(Path(folder), other.mesh, keep=1)
    checkpointer.register("policy", other)
    assert checkpointer.load_latest() == 2
    again = [step(other), step(other)]
    return {"norms": norms, "again": again, "apart": distance(main_weights(other), main_weights(policy))}


def refusal(path: str, optimizer: dict[str, Any]) -> str:
    try:
        make_policy(path, optimizer)
    except BadInput as error:
        return str(error)
    return "nothing was refused"
