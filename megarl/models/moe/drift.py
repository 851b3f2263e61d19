"""How far two routings of the same tokens are apart, and how evenly a routing loads the experts.

Three quantities that are easily mixed up (the first two differ by up to a factor k):

- expert level: share of the experts of a token in a layer that the other routing did not choose, 1 - |S ∩ S'| / k; what
  GSPO reports between updates (arXiv 2507.18071, section 5.3);
- pair level: share of (token, layer) pairs with any difference; what R3 reports between engine and learner
  (arXiv 2510.11370);
- token level: share of tokens with a difference in at least one layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megarl.metrics import ExpertLoad, Mean, Metric


@dataclass(frozen=True)
class Drift:
    """Two routings of the same rows: l layers of this rank, m rows. Rows outside the mask hold 0."""

    layers: Sequence[int]  # global numbers
    changed: Tensor  # [l, m] int64: experts of the first routing that the second did not choose
    mask: Tensor  # [m] bool: rows that count
    top_k: int

    @classmethod
    def between(cls, layers: Sequence[int], first: Tensor, second: Tensor, mask: Tensor) -> Drift:
        """`first` and `second` [l, m, k]; a row of `first` that starts below 0 has no routing and does not count."""
        first, second = first.long(), second.long().to(first.device)
        kept = (first[..., None] == second[..., None, :]).any(-1).sum(-1)
        known = (first[..., 0] >= 0).all(0) if len(first) else torch.ones_like(mask)
        mask = mask.to(first.device) & known
        return cls(layers, torch.where(mask, first.shape[-1] - kept, 0), mask, first.shape[-1])

    @property
    def changed_layers(self) -> Tensor:
        """[m] int64: in how many of these layers a row's experts differ."""
        return (self.changed > 0).sum(0)

    def metrics(self, prefix: str) -> dict[str, Metric]:
        """Expert and pair level over this rank's layers, and expert level by layer."""
        rows = int(self.mask.sum())
        by_layer = self.changed.sum(1).tolist()
        out: dict[str, Metric] = {
            f"{prefix}_changed": Mean(float(sum(by_layer)), float(rows * len(by_layer) * self.top_k)),
            f"{prefix}_pair": Mean(float((self.changed > 0).sum()), float(rows * len(by_layer))),
        }
        for layer, count in zip(self.layers, by_layer, strict=True):
            out[f"{prefix}_changed/layer_{layer:02d}"] = Mean(float(count), float(rows * self.top_k))
        return out

    def gate_mass(self, first: Tensor, second: Tensor, gates: Tensor) -> Mean:
        """Mean weight `gates` [l, m, k] of those experts of `second` that `first` did not choose, per token and layer."""
        new = (second.long()[..., None] != first.long()[..., None, :]).all(-1)
        moved = (gates.double() * new).sum(-1)
        return Mean(float(moved[:, self.mask].sum()), float(self.mask.sum() * len(self.layers)))


def load_metrics(layers: Sequence[int], experts: Tensor, mask: Tensor, num_experts: int) -> dict[str, Metric]:
    """By layer, of `experts` [l, m, k] where `mask` [m]: the fullest expert's load over the mean, and unused experts."""
    out: dict[str, Metric] = {}
    for layer, chosen in zip(layers, experts, strict=True):
        counts = torch.bincount(chosen[mask].flatten().long(), minlength=num_experts).double().cpu()
        out[f"routing/load_max_over_mean/layer_{layer:02d}"] = ExpertLoad(counts, "max_over_mean")
        out[f"routing/unused_experts/layer_{layer:02d}"] = ExpertLoad(counts, "unused")
    return out
