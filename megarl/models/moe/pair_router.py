"""Megarl's router: Megatron's, without its maps over all experts."""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.moe_utils import compute_routing_scores_for_aux_loss
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


class PairRouter(TopKRouter):
    """Gives the pairs of a token and an expert alone, for a dispatcher that has all experts on its rank.

    Megatron's router spreads them over two `[tokens, E]`, of which a dispatcher finds them again: with many experts that
    takes longer than to choose.
    """

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """logits `[n, 1, E]` -> weights and numbers of the chosen experts, `[n, k]` both.

        padding_mask `[n, 1]`: True for padding, which has no part in the auxiliary loss.
        """
        logits = logits.view(-1, logits.shape[-1])
        gates, chosen = self._choose(logits)
        if self.training and torch.is_grad_enabled() and self.is_aux_loss_enabled():
            mask = None if padding_mask is None else padding_mask.reshape(-1)
            routed, scores = compute_routing_scores_for_aux_loss(
                logits, self.topk, self.score_function, padding_mask=mask
            )
            gates = self._apply_aux_loss(gates, scores, routed, with_padding_mask=mask is not None)
        return gates, chosen

    def _choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """As Megatron's `topk_routing_with_score_function`; float64 logits keep their precision."""
        wide = torch.promote_types(logits.dtype, torch.float32)
        if self.score_function == "softmax":
            early = self.config.moe_router_pre_softmax
            gates, chosen = self._top(logits.softmax(1, dtype=wide).type_as(logits) if early else logits)
            if not early:
                gates = gates.softmax(1, dtype=wide).type_as(logits)
        else:
            scores = logits.to(wide).sigmoid().type_as(logits)
            gates, chosen = self._top(scores if self.expert_bias is None else scores + self.expert_bias)
            if self.expert_bias is not None:
                gates = scores.gather(1, chosen).type_as(logits)
            if self.topk > 1:
                gates = gates / (gates.sum(dim=1, keepdim=True) + 1e-20)
        scaling = self.config.moe_router_topk_scaling_factor
        return gates if not scaling else gates * scaling, chosen

    def _top(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        if self.router_replay is None:
            return _best(scores, self.topk)
        return self.router_replay.get_replay_topk(scores, self.topk, default_compute_topk=_best)


def _best(scores: Tensor, k: int, **_groups: None) -> tuple[Tensor, Tensor]:
    return torch.topk(scores, k, dim=1)
