"""Run by the ranks of `test_te_provider.py` on CUDA, with Transformer Engine itself."""

from __future__ import annotations

from typing import Any

import torch

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
        policy = Policy.from_hf(path, cfg, mesh, optimizer=Optimizer(lr=1e-3), total_steps=10)
        packed = micro_batches(fixed_batch(), 400, policy.layout)
        if policy.fp8 is not None:  # delayed scales come from steps before
            policy.train_step(packed, negative_log_likelihood)
            policy.load_hf(path)
        log_probs = torch.cat([x.double() for x in policy.log_probs(packed)[0]] or [torch.zeros(1).double()])
        policy._apply = lambda: (False, 0.0)
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
