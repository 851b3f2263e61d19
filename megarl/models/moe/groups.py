"""What routers choose by besides their scores: groups, of which a token's experts come from the best, and a bias."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from megarl.models.spec import ModelSpec


class GroupLimited:
    """In the place of a Megatron `RouterReplay`: the router asks it for its top-k.

    Megatron's own rule takes the sum of the best k / top_groups experts as a group's score, which is neither
    DeepSeek-V2's (2405.04434, the best one) nor, for other k, DeepSeek-V3's (2412.19437, the two best).
    """

    def __init__(self, spec: ModelSpec) -> None:
        self.groups, self.chosen, self.best = spec.router_groups, spec.router_top_groups, spec.group_score

    def limited(self, scores: Tensor) -> Tensor:
        """scores `[m, E]` with -inf outside of each row's best groups."""
        grouped = scores.unflatten(1, (self.groups, -1))
        best = grouped.amax(dim=2) if self.best == "max" else grouped.topk(2, dim=2).values.sum(dim=2)
        inside = torch.zeros_like(best, dtype=torch.bool).scatter_(1, best.topk(self.chosen, dim=1).indices, True)
        return grouped.masked_fill(~inside[:, :, None], float("-inf")).flatten(1)

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: Any = None,
        group_topk: Any = None,
        default_compute_topk: Callable[..., Any] = torch.topk,
    ) -> tuple[Tensor, Tensor]:
        """Megatron's hook: scores `[m, E]` -> the chosen experts' scores and numbers `[m, k]`."""
        return default_compute_topk(self.limited(scores), topk)


def limit_groups(chunk: nn.Module, spec: ModelSpec) -> None:
    """Makes every router of a chunk of the model choose from the best groups."""
    for layer in chunk.decoder.layers:
        if layer.layer_number - 1 in spec.moe_layers:
            layer.mlp.router.router_replay = GroupLimited(spec)


def keep_selection_bias(chunk: nn.Module) -> None:
    """Makes the bias of every router float32 again after Megatron's `Float16Module`, which takes buffers too.

    A router does it before each pass, but by then the weights would have been read into the narrower one.
    """
    for module in chunk.modules():
        if getattr(module, "expert_bias", None) is not None:
            module._maintain_float32_expert_bias()
