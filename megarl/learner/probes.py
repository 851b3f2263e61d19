"""The learner's side of a weight sync's check."""

from __future__ import annotations

import numpy as np
import torch

from megarl.data.packing import pack
from megarl.learner.policy import Policy
from megarl.types import Batch


def probe_log_probs(policy: Policy, probes: list[list[int]]) -> list[np.ndarray]:
    """The learner's log-probs of fixed sequences at temperature 1, on every rank: what `check_sync` compares with.

    Every rank passes the same probes and computes all of them. [len(probe)] float32 each, entry 0 is 0. Collective.
    """
    mesh = policy.mesh
    lengths = torch.tensor([len(probe) for probe in probes])
    tokens = torch.tensor([token for probe in probes for token in probe])
    batch = Batch(tokens, lengths, torch.ones(len(tokens)))
    packed = [pack(batch, range(len(probes)), mesh.tp)]
    if mesh.vpp:  # interleaved stages need a multiple of pp micro-batches
        packed *= mesh.pp
    log_probs, _entropy = policy.log_probs(packed, temperature=1.0)
    mine = log_probs[0] if log_probs else None
    flat = next(x for x in mesh.all_gather_object(mine) if x is not None) if mesh.pp > 1 else mine
    flat[batch.offsets()[:-1]] = 0.0
    return [part.numpy() for part in flat.split(lengths.tolist())]
