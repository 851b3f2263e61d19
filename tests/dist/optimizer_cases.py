"""Run by the ranks of `test_optimizer.py`: optimizers of the real learner, on a fixed batch."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megarl.checkpoint import Checkpointer
from megarl.config.schema import Config, Model, Optimizer, Parallel
from megarl.data.packing import micro_batches
from megarl.errors import BadInput
from megarl.learner import optimizer as learner_optimizer
from megarl.learner.policy import Policy
from megarl.parallel import Mesh
from megarl.platform import optimizers
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


def against_float64(path: str, ways: dict[str, dict[str, Any]], dtype: str, steps: int) -> dict[str, list[float]]:
    """How far each one's main weights are, after so many steps, from those of `Adam` on its gradients, and from the first
    one's."""
    out, first, mesh = {}, None, None
    for name, settings in ways.items():
        policy = make_policy(path, settings, dtype, mesh)
        mesh = policy.mesh
        gradients = _watched(policy)
        decayed = {name for name, p in policy.modules[0].named_parameters() if p.dim() > 1}
        adam = Adam(main_weights(policy), decayed, Optimizer(**settings))
        for _ in range(steps):
            lr = policy.next_lr()
            step(policy)
            adam.step(gradients, lr)
        found = main_weights(policy)
        first = first or found
        out[name] = [distance(found, adam.weights), distance(found, first)]
    return out


def _watched(policy: Policy) -> dict[str, Tensor]:
    """The gradients of the last step, as they are before clipping."""
    gradients: dict[str, Tensor] = {}
    plain = policy.optimizer.prepare_grads

    def prepare() -> bool:
        for name, p in policy.modules[0].named_parameters():
            gradients[name] = p.main_grad.detach().double().flatten().clone()
        return plain()

    policy.optimizer.prepare_grads = prepare
    return gradients


def resumed(
    path: str, folder: str, first: dict[str, Any], then: dict[str, Any], dtype: str, kinds: list[str] = ["torch", "torch"]
) -> dict[str, Any]:
    """Two steps, a checkpoint and two more; then a new learner that resumes, perhaps with another optimizer.

    The gradient norms of both, how far their main weights are apart, and which of PyTorch's ways the second one goes.
    """
    with fused_adam_of(kinds[0]):
        policy = make_policy(path, first, dtype)
        checkpointer = Checkpointer(Path(folder), policy.mesh, keep=1)
        checkpointer.register("policy", policy)
        step(policy), step(policy)
        checkpointer.save(2)
        norms = [step(policy), step(policy)]
    with fused_adam_of(kinds[1]):
        other = make_policy(path, then, dtype, policy.mesh)
        checkpointer = Checkpointer(Path(folder), other.mesh, keep=1)
        checkpointer.register("policy", other)
        assert checkpointer.load_latest() == 2
        again = [step(other), step(other)]
    ways = {group.get("fused") for part in other.optimizer.chained_optimizers for group in part.optimizer.param_groups}
    apart = distance(main_weights(other), main_weights(policy))
    return {"norms": norms, "again": again, "apart": apart, "fused": ways.pop()}


def parked(path: str, optimizer: dict[str, Any], dtype: str, kind: str = "torch") -> dict[str, Any]:
    """Two learners, of which one leaves the device, which here is the host too, between its steps."""
    from megarl.learner import host_parked

    norms, found, mesh, out = [], [], None, {}
    with fused_adam_of(kind):
        for leaves in (False, True):
            policy = make_policy(path, optimizer, dtype, mesh)
            mesh = policy.mesh
            own = [step(policy)]
            if leaves:
                before = _contents(policy)
                is_on_host, host_parked._is_on_host = host_parked._is_on_host, lambda storage: False
                for one in policy.parked.values():
                    one.park()
                out["left"] = {owner: sum(s.nbytes() for s in found) for owner, found in policy._storages().items()}
                out["refused"] = _refusal(policy)
                for one in policy.parked.values():
                    one.unpark()
                host_parked._is_on_host = is_on_host
                after = _contents(policy)
                out["sizes"] = {owner: sum(map(len, parts)) for owner, parts in after.items()}
                out["same"] = {owner: before[owner] == after[owner] for owner in ("weights", "optimizer")}
                out["gradients"] = any(any(part) for part in after["gradients"])
            own.append(step(policy))
            norms.append(own)
            found.append(main_weights(policy))
    return out | {"norms": norms, "apart": distance(*found)}


def _contents(policy: Policy) -> dict[str, list[bytes]]:
    """Owner -> the bytes of each of its storages."""
    from megarl.learner.host_parked import _bytes

    return {owner: [_bytes(one).numpy().tobytes() for one in found] for owner, found in policy._storages().items()}


def _refusal(policy: Policy) -> str:
    try:
        step(policy)
    except RuntimeError as error:
        return str(error)
    return "nothing was refused"


def refusals(path: str) -> dict[str, str]:
    """What a learner says to Adams that this machine cannot run."""
    out, mesh = {}, Mesh.build(Parallel(ep=int(os.environ.get("WORLD_SIZE", "1"))))
    for kind in ("te", "apex"):
        try:
            make_policy(path, {"implementation": kind}, mesh=mesh)
            out[kind] = "nothing was refused"
        except BadInput as error:
            out[kind] = str(error)
    return out


@contextlib.contextmanager
def fused_adam_of(kind: str) -> Iterator[None]:
    """Learners get the FusedAdam of `te` or `apex`, with the pinned release's constructor and a step in PyTorch's operators.

    With another `kind` PyTorch's again. What follows its release is the signature, the names of the state, and that the
    step count is the group's.
    """
    plain = learner_optimizer.adam_implementation, optimizers.fused_adam
    optimizers._used.clear()
    if kind in optimizers.FUSED:
        learner_optimizer.adam_implementation = lambda *_: kind
        optimizers.fused_adam = _stand_in
    try:
        yield
    finally:
        learner_optimizer.adam_implementation, optimizers.fused_adam = plain
        optimizers._used.clear()


def _stand_in(kind: str) -> type:
    table, name = {
        "te": ("transformer-engine", "transformer_engine.pytorch.optimizers.FusedAdam"),
        "apex": ("apex", "apex.optimizers.FusedAdam"),
    }[kind]
    file = Path(__file__).parents[1] / "signatures" / f"{table}.json"
    text = json.loads(file.read_text())["names"][name]["__init__"]
    space: dict[str, Any] = {"torch": torch}
    exec(f"def init({text}): ...", space)
    signature = inspect.signature(space["init"])

    class FusedAdam(torch.optim.Optimizer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            bound = signature.bind(self, *args, **kwargs)
            bound.apply_defaults()
            given = bound.arguments
            super().__init__(given["params"], {k: given[k] for k in ("lr", "bias_correction", "betas", "eps", "weight_decay")})
            self.decoupled = given["adam_w_mode"]
            assert given["bias_correction"] and not given["master_weights"] and not given["amsgrad"]

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                t = group["step"] = group.get("step", 0) + 1
                b1, b2 = group["betas"]
                for p in (p for p in group["params"] if p.grad is not None):
                    state, g = self.state[p], p.grad
                    if not state:
                        state |= {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                    g = g if self.decoupled else g + group["weight_decay"] * p
                    m = state["exp_avg"].mul_(b1).add_(g, alpha=1 - b1) / (1 - b1**t)
                    v = state["exp_avg_sq"].mul_(b2).addcmul_(g, g, value=1 - b2) / (1 - b2**t)
                    decay = group["weight_decay"] * p if self.decoupled else 0.0
                    p.sub_(group["lr"] * (m / (v.sqrt() + group["eps"]) + decay))

    return FusedAdam


def fused_against_float64(path: str, kind: str, optimizer: dict[str, Any], steps: int) -> list[float]:
    with fused_adam_of(kind):
        return against_float64(path, {kind: optimizer}, "float32", steps)[kind]
