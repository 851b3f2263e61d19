"""Run by the ranks of `test_te_provider.py` on CUDA, with Transformer Engine itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megarl import platform
from megarl.checkpoint import Checkpointer
from megarl.config.schema import Config, Model, Optimizer, Parallel
from megarl.convert import stream_gradients
from megarl.data.packing import micro_batches, pack
from megarl.learner.policy import Policy
from megarl.models.layers.provider import choose
from megarl.parallel import Mesh
from megarl.platform import features
from tests.dist.learner_cases import fixed_batch, negative_log_likelihood
from tests.dist.provider_cases import agree, cross_load, torn_down

__all__ = ["agree", "cross_load"]


def installed() -> list[str | None]:
    """Why there can be no te layers here; then, by recipe, why it cannot be. None: it can."""
    problem = features.transformer_engine_problem()
    return [problem, *([] if problem else [features.recipe_problem(name) for name in features.TE_RECIPES])]


def passes(path: str, degrees: dict[str, Any], variants: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Log-probs and gradients of each variant of the `model` section: their distances from the first one's.

    Distances are relative Euclidean ones over everything; `cosine` is that of the gradients.
    """
    found: dict[str, tuple[torch.Tensor, torch.Tensor, str]] = {}
    for name, model in variants.items():
        cfg = Config(model=Model(path=path, **model), parallel=Parallel(distributed_optimizer=False, **degrees))
        mesh = Mesh.build(cfg.parallel)
        policy = Policy.from_hf(path, cfg, mesh, optimizer=Optimizer(lr=1e-3, clip_grad=0.0), total_steps=10)
        packed = micro_batches(fixed_batch(), 400, policy.layout)
        if policy.fp8 is not None:  # delayed scales come from steps before
            policy.train_step(packed, negative_log_likelihood)
            policy.load_hf(path)
        log_probs = torch.cat([x.double() for x in policy.log_probs(packed)[0]] or [torch.zeros(1).double()])
        policy.train_step(packed, negative_log_likelihood)
        gradients = torch.cat([g.double().flatten().cpu() for _, g in stream_gradients(policy.chunks, policy.spec, mesh)])
        found[name] = (log_probs, gradients, choose(cfg.model).name)
        torn_down()
    (log_probs, gradients, _), out = next(iter(found.values())), {}
    for name, (own_log_probs, own_gradients, provider) in found.items():
        out[name] = {
            "provider": provider,
            "log_probs": float((own_log_probs - log_probs).norm() / log_probs.norm()),
            "gradients": float((own_gradients - gradients).norm() / gradients.norm()),
            "cosine": float(torch.nn.functional.cosine_similarity(own_gradients, gradients, dim=0)),
            "finite": bool(own_gradients.isfinite().all()),
        }
    return out


def fp8_params(path: str, saved: str, recipe: str) -> dict[str, Any]:
    """Steps with FP8 parameters and without: relative distances of log-probs from bfloat16's, and from each other."""
    found: dict[str, list[torch.Tensor]] = {}
    out: dict[str, Any] = {}

    def start(**model: Any) -> tuple[Policy, list]:
        cfg = Config(model=Model(path=path, layers="te", dtype="bfloat16", **model))
        policy = Policy.from_hf(path, cfg, Mesh.build(cfg.parallel), optimizer=Optimizer(lr=1e-3, clip_grad=0.0), total_steps=10)
        return policy, micro_batches(fixed_batch(), 400, policy.layout)

    def checkpointer(policy: Policy) -> Checkpointer:
        made = Checkpointer(Path(saved), policy.mesh, keep=1)
        made.register("policy", policy)
        return made

    def bits(policy: Policy) -> list[torch.Tensor]:
        return [part.cpu() for p in policy.fp8_params.parameters for part in platform.parts_of(p)]

    def log_probs(policy: Policy, packed: list) -> torch.Tensor:
        return torch.cat([x.double() for x in policy.log_probs(packed)[0]])

    kept: list[torch.Tensor] = []
    for name, model in {"bfloat16": {}, "plain": {"fp8": recipe}, "params": {"fp8": recipe, "fp8_params": True}}.items():
        policy, packed = start(**model)
        found[name] = [log_probs(policy, packed)]
        policy.train_step(packed, negative_log_likelihood)
        if name == "params":
            out["quantised"], kept = len(policy.fp8_params.parameters), bits(policy)
            out["trained"] = all(p.requires_grad for p in policy.fp8_params.parameters)
            checkpointer(policy).save(1)
            policy.parked["weights"].park(), policy.parked["weights"].unpark()
        policy.train_step(packed, negative_log_likelihood)
        found[name].append(log_probs(policy, packed))
        torn_down()
    policy, packed = start(fp8=recipe, fp8_params=True)
    checkpointer(policy).load_latest()
    out["resumed"] = all(map(torch.equal, bits(policy), kept)) and len(kept) > 0
    for name, one, other in (("rounding", "plain", "bfloat16"), ("gap", "params", "plain")):
        out[name] = [float((a - b).norm() / b.norm()) for a, b in zip(found[one], found[other], strict=True)]
    return out


def borders(path: str) -> dict[str, float]:
    """How far a document's log-probs move when another one in its packed row changes; when it changes itself."""
    cfg = Config(model=Model(path=path, layers="te", dtype="bfloat16"))
    policy = Policy.from_hf(path, cfg, Mesh.build(cfg.parallel))
    batch, out = fixed_batch(), []
    first = int(batch.lengths[0])
    for _ in range(2):
        out.append(policy.log_probs([pack(batch, range(len(batch)), policy.layout)])[0][0].clone())
        batch.tokens[: first - 1] = batch.tokens[: first - 1].flip(0)
    moved = (out[0] - out[1]).abs()
    return {"own": float(moved[:first].max()), "others": float(moved[first:].max())}
