"""Routers that take given experts in place of their own top-k: one object for each model, none global.

Megatron's `RouterReplay` keeps one list for all models of a process and matches it by the order of construction.
Here the experts of a packed row travel with the row (`PackedRow.routed_experts`), so that pipelines with several
micro-batches in flight and layers computed again in the backward pass find their own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from megarl.models.spec import ModelSpec
from megarl.types import MicroBatch


class RoutingReplay:
    """The routers of one model (`chunks` of this rank), by the global number of their layer.

    A row of experts that starts with -1 stands for "its own choice": padding is routed live. Gates are computed from
    the router's own scores of the given experts, so that its gradient flows as ever.
    """

    def __init__(self, chunks: list[nn.Module], spec: ModelSpec, tp_rank: int) -> None:
        self.width = (len(spec.moe_layers), spec.top_k)
        self.layers: dict[int, LayerReplay] = {}
        for chunk in chunks:
            for layer in chunk.decoder.layers:
                number = layer.layer_number - 1
                if number in spec.moe_layers:
                    replay = LayerReplay(spec.moe_layers.index(number), tp_rank, layer.mlp.moe_layer_recompute)
                    layer.mlp.router.router_replay = self.layers[number] = replay
                    layer.register_forward_pre_hook(replay.enter, with_kwargs=True)

    def rows(self, micro_batch: MicroBatch, device: torch.device) -> Tensor:
        """[n, L, k] int64: the experts of the token that each of this rank's rows holds; -1 on padding."""
        rows = torch.full((micro_batch.tokens.numel(), *self.width), -1)
        held = micro_batch.held
        rows[held >= 0] = micro_batch.batch.routed_experts.long()[held[held >= 0]]
        return rows.to(device)

    @contextmanager
    def recording(self) -> Iterator[list[list[Tensor]]]:
        """What this rank's routers choose for its rows: per MoE layer, ascending, `[n, k]` of each forward in order."""
        layers = [self.layers[number] for number in sorted(self.layers)]
        for layer in layers:
            layer.record = []
        yield [layer.record for layer in layers]
        for layer in layers:
            layer.record = None


class LayerReplay:
    """What one router asks for its top-k, in the place of a Megatron `RouterReplay`."""

    def __init__(self, column: int, tp_rank: int, recomputed: bool) -> None:
        self.column, self.tp_rank, self.recomputed = column, tp_rank, recomputed
        self.record: list[Tensor] | None = None
        self._experts: Tensor | None = None  # [n, L, k] of the row in the layer now
        self._entered = False
        self._again: deque[Tensor | None] = deque()  # rows whose backward pass will ask once more

    def enter(self, _layer: nn.Module, _args: tuple, kwargs: dict[str, Any]) -> None:
        """Before a forward of the layer. Recomputing a whole layer passes here too, the MoE part alone does not."""
        self._experts, self._entered = kwargs["packed_seq_params"].routed_experts, True
        if self.recomputed and torch.is_grad_enabled():
            self._again.append(self._experts)

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Megatron's hook: scores `[m, E]` of this rank's rows -> the chosen experts' scores and numbers `[m, k]`.

        Under sequence parallelism m = n / tp, the tp_rank-th part of the row.
        """
        experts = self._experts if self._entered else self._again.popleft()
        self._entered = False
        values, own = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        if self.record is not None:
            self.record.append(own.detach())
        if experts is None:
            return values, own
        start = self.tp_rank * len(scores) if len(experts) > len(scores) else 0
        given = experts[start : start + len(scores), self.column]
        chosen = torch.where(given >= 0, given, own)
        return scores.gather(1, chosen), chosen
