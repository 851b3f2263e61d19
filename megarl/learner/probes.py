"""The learner's side of a weight sync's check."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import torch

from megarl.data.packing import pack
from megarl.learner.policy import Policy
from megarl.types import Batch


def probe_log_probs(policy: Policy, probes: list[list[int]]) -> list[np.ndarray]:
    """The learner's log-probs of fixed sequences at temperature 1, on every rank: what `check_sync` compares with.

    Every rank passes the same probes and computes all of them, without FP8: what is checked are weights, and sharply.
    [len(probe)] float32 each, entry 0 is 0. Collective.
    """
    mesh = policy.mesh
    lengths = torch.tensor([len(probe) for probe in probes])
    tokens = torch.tensor([token for probe in probes for token in probe])
    batch = Batch(tokens, lengths, torch.ones(len(tokens)))
    packed = [pack(batch, range(len(probes)), policy.layout)] * policy.layout.count_multiple
    with policy.fp8.suspended() if policy.fp8 is not None else nullcontext():
        log_probs, _entropy = policy.log_probs(packed, temperature=1.0)
    flat = torch.zeros(len(tokens), dtype=log_probs[0].dtype if log_probs else torch.float32)
    mine = (packed[0].owned, log_probs[0][packed[0].owned]) if log_probs else None
    for found in mesh.all_gather_object(mine) if mesh.pp * mesh.cp > 1 else [mine]:
        if found is not None:
            flat[found[0]] = found[1]
    return [part.numpy() for part in flat.split(lengths.tolist())]
