"""The learner's side of a weight sync's check."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megarl.data.packing import pack
from megarl.learner.policy import Policy
from megarl.models.fp8 import RECIPES, GroupedProduct, Product, Role
from megarl.models.layers.fp8_layers import multiplying
from megarl.rollout.fp8_weights import Fp8Weights
from megarl.types import Batch


def probe_log_probs(policy: Policy, probes: list[list[int]], fp8: Fp8Weights | None = None) -> list[np.ndarray]:
    """The learner's log-probs of fixed sequences at temperature 1, on every rank: what `check_sync` compares with.

    Every rank passes the same probes and computes all of them, in FP8 only where the engine does, as `fp8` says and with
    its rounding, whatever recipe the learner trains in: what is checked are weights. [len(probe)] float32 each, entry 0
    is 0. Collective.
    """
    mesh = policy.mesh
    lengths = torch.tensor([len(probe) for probe in probes])
    tokens = torch.tensor([token for probe in probes for token in probe])
    batch = Batch(tokens, lengths, torch.ones(len(tokens)))
    packed = [pack(batch, range(len(probes)), policy.layout)] * policy.layout.count_multiple
    layers, power_of_two = (range(0), False) if fp8 is None else (fp8.layers, fp8.power_of_two)
    with multiplying(policy.modules, functools.partial(_product, power_of_two), layers):
        log_probs, _entropy = policy.log_probs(packed, temperature=1.0)
    flat = torch.zeros(len(tokens), dtype=log_probs[0].dtype if log_probs else torch.float32)
    mine = (packed[0].owned, log_probs[0][packed[0].owned]) if log_probs else None
    for found in mesh.all_gather_object(mine) if mesh.pp * mesh.cp > 1 else [mine]:
        if found is not None:
            flat[found[0]] = found[1]
    return [part.numpy() for part in flat.split(lengths.tolist())]


class _EngineProduct(Product):
    """As an engine in block-wise FP8 multiplies: scales of activations are never powers of two."""

    def __init__(self, power_of_two: bool) -> None:
        super().__init__(RECIPES["blockwise"])
        self._weights = Product(replace(self.recipe, power_of_two=power_of_two))

    def operand(self, x: Tensor, role: Role, record: bool) -> Any:
        return (self._weights if role == "weight" else super()).operand(x, role, record)


def _product(power_of_two: bool, experts: int) -> Product | GroupedProduct:
    if not experts:
        return _EngineProduct(power_of_two)
    grouped = GroupedProduct(RECIPES["blockwise"], experts)
    grouped.products = [_EngineProduct(power_of_two) for _ in range(experts)]
    return grouped
