"""Routers that take given experts in place of their own top-k: one object for each model, none global.

Megatron's `RouterReplay` keeps one list for all models of a process and matches it by the order of construction.
Here the experts of a packed row travel with the row (`PackedRow.routing`), so that pipelines with several micro-batches
in flight and layers computed again in the backward pass find their own, and a model never sees another's.

Symbols in the shape comments: l MoE layers of this rank, m rows its routers see (n / tp under sequence parallelism),
k experts a token, E experts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from megarl.errors import RunFailed
from megarl.models.spec import ModelSpec
from megarl.types import MicroBatch

LIVE = -1  # in place of a row's first expert: the router's own choice


def expert_dtype(num_experts: int) -> torch.dtype:
    """The narrowest integer that holds every expert's number and `LIVE`."""
    return torch.int8 if num_experts <= 128 else torch.int16


@dataclass
class RowRouting:
    """The routing of one packed row in one pass of one model on this rank."""

    owner: RoutingReplay
    experts: Tensor | None  # [l, m, k]: what routers are to choose; None: as they like
    chosen: list[Tensor | None]  # l times [m, k]: what each would choose on its own
    gates: list[Tensor | None]  # l times [m, k]: with which weights
    margins: list[Tensor | None]  # l times [m]: from the last chosen to the first other expert, in router logits or scores
    used: list[int] = field(default_factory=list)  # l: how often the router asked
    rows: int = 0  # m

    def stacked(self) -> Tensor:
        """[l, m, k]: the routers' own choices. Raises RunFailed for a layer that was not asked."""
        for layer, chosen in zip(self.owner.layers, self.chosen, strict=True):
            if chosen is None:
                raise RunFailed(f"routing: layer {layer.number} of the {self.owner.name} recorded nothing")
        if not self.chosen:  # a pipeline stage of dense layers
            spec = self.owner.spec
            return torch.empty(0, self.rows, spec.top_k, dtype=expert_dtype(spec.num_experts))
        return torch.stack(self.chosen)


class RoutingReplay:
    """The routers of one model on this rank; `name` is the model's role, for errors.

    A row of experts that starts with `LIVE` stands for the router's own choice. Gates are computed from the router's own
    scores of the given experts, so that its gradient flows as ever.
    Raises RunFailed for a router that would not ask.
    """

    def __init__(self, chunks: Sequence[nn.Module], spec: ModelSpec, mesh: Any, name: str) -> None:
        self.name, self.spec, self.sequence_ranks, self.sequence_rank = name, spec, mesh.tp, mesh.tp_rank
        self.margins = False  # whether passes record them too
        self.layers: list[LayerReplay] = []
        found = [(layer.layer_number - 1, layer) for chunk in chunks for layer in chunk.decoder.layers]
        for number, layer in sorted(found, key=lambda item: item[0]):
            if number in spec.moe_layers:
                self._check(number, layer.mlp.router)
                replay = LayerReplay(self, len(self.layers), number, layer.mlp)
                layer.mlp.router.router_replay = replay
                layer.register_forward_pre_hook(replay.enter, with_kwargs=True)
                self.layers.append(replay)
        self._columns = torch.tensor([spec.moe_layers.index(layer.number) for layer in self.layers], dtype=torch.int64)

    def _check(self, number: int, router: Any) -> None:
        config = router.config
        ignoring = {
            "moe_router_fusion": config.moe_router_fusion,
            "moe_router_load_balancing_type sinkhorn": router.routing_type == "sinkhorn",
            "moe_router_force_load_balancing": config.moe_router_force_load_balancing,
            "moe_expert_capacity_factor": config.moe_expert_capacity_factor is not None,
        }
        for setting, is_on in ignoring.items():
            if is_on:
                raise RunFailed(f"routing: layer {number} of the {self.name} has {setting}, which ignores replayed experts")

    def local(self, micro_batch: MicroBatch) -> Tensor:
        """[l, m, k]: the experts of `micro_batch.batch` that this rank's routers are to choose.

        Rows of padding, and of the last token of a sequence, which no engine routes and nothing reads, are `LIVE`.
        Raises RunFailed when the record does not fit the model: its layers, its experts a token, numbers out of range,
        an expert twice for a token.
        """
        record = micro_batch.batch.routed_experts
        expected = (micro_batch.batch.tokens.numel(), len(self.spec.moe_layers), self.spec.top_k)
        if record is None:
            raise RunFailed(f"routing: there are no recorded experts for the {self.name} to replay; set rollout.routed_experts")
        if tuple(record.shape) != expected:
            raise RunFailed(
                f"routing: the record is {tuple(record.shape)}, and the {self.name} needs {expected} (tokens, MoE layers, "
                "experts a token)"
            )
        rows = torch.full((micro_batch.tokens.numel(), len(self.layers), self.spec.top_k), LIVE, dtype=torch.int64)
        held = micro_batch.held.clone()
        held[micro_batch.last_rows[micro_batch.last_rows >= 0]] = -1
        own = held >= 0
        rows[own] = record[held[own]].to(torch.int64)[:, self._columns]
        self._check_experts(rows[own])
        size = len(rows) // self.sequence_ranks
        part = rows[self.sequence_rank * size : (self.sequence_rank + 1) * size]
        return part.transpose(0, 1).to(expert_dtype(self.spec.num_experts)).contiguous()

    def _check_experts(self, rows: Tensor) -> None:
        """rows [r, l, k] without `LIVE`."""
        if not rows.numel():
            return
        wrong = ((rows < 0) | (rows >= self.spec.num_experts)).any(2).any(0)
        twice = (rows.sort(dim=2).values.diff(dim=2) == 0).any(2).any(0)
        for layer, is_wrong, is_twice in zip(self.layers, wrong.tolist(), twice.tolist(), strict=True):
            column = rows[:, layer.index]
            if is_wrong:
                outside = column[(column < 0) | (column >= self.spec.num_experts)][0]
                raise RunFailed(
                    f"routing: layer {layer.number}: expert {outside} is recorded, and the {self.name} has "
                    f"{self.spec.num_experts}"
                )
            if is_twice:
                row = column[(column.sort(dim=1).values.diff(dim=1) == 0).any(1)][0].tolist()
                raise RunFailed(f"routing: layer {layer.number}: an expert is recorded twice for one token: {row}")

    def begin(self, micro_batch: MicroBatch, device: torch.device) -> RowRouting:
        """For a pass over one micro-batch, with the experts in `micro_batch.experts` where there are any."""
        empty: list[Tensor | None] = [None] * len(self.layers)
        experts = micro_batch.experts
        rows = micro_batch.tokens.numel() // self.sequence_ranks
        if experts is not None and tuple(experts.shape) != (len(self.layers), rows, self.spec.top_k):
            raise RunFailed(
                f"routing: {tuple(experts.shape)} experts for {rows} rows of the {self.name}'s {len(self.layers)} MoE layers "
                f"({', '.join(str(layer.number) for layer in self.layers)}) here, {self.spec.top_k} a token"
            )
        experts = None if experts is None else experts.to(device)
        return RowRouting(self, experts, empty, list(empty), list(empty), [0] * len(self.layers), rows)

    def finish(self, rows: Sequence[RowRouting], uses: int) -> None:
        """After a pass: every router has asked for each row exactly `uses` times. Raises RunFailed naming the layer."""
        for layer in self.layers:
            if layer.waiting:
                raise RunFailed(f"routing: layer {layer.number} of the {self.name} left {layer.waiting} records unused")
            for row in rows:
                if row.used[layer.index] != uses:
                    raise RunFailed(
                        f"routing: layer {layer.number} of the {self.name} used its record {row.used[layer.index]} times in a "
                        f"pass, not {uses}"
                    )


class LayerReplay:
    """What one router asks for its top-k, in the place of a Megatron `RouterReplay`."""

    def __init__(self, owner: RoutingReplay, index: int, number: int, mlp: Any) -> None:
        self.owner, self.index, self.number = owner, index, number
        self._router, self._recomputed = mlp.router, mlp.moe_layer_recompute
        self._limited = getattr(mlp.router.router_replay, "limited", lambda scores: scores)
        self._row: RowRouting | None = None  # of the layer that runs now
        self._entered = False
        self._again: deque[RowRouting] = deque()  # rows whose backward pass will ask once more

    @property
    def waiting(self) -> int:
        return len(self._again)

    def enter(self, _layer: nn.Module, _args: tuple, kwargs: dict[str, Any]) -> None:
        """Before a forward of the layer. Recomputing a whole layer passes here too, the MoE part alone does not."""
        self._row, self._entered = kwargs["packed_seq_params"].routing, True
        if self._row is not None and self._row.owner is not self.owner:
            raise RunFailed(
                f"routing: layer {self.number} of the {self.owner.name} got a record of the {self._row.owner.name}"
            )
        if self._recomputed and torch.is_grad_enabled():
            self._again.append(self._row)

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Megatron's hook: scores `[m, E]` of this rank's rows -> the chosen experts' scores and numbers `[m, k]`."""
        row = self._row if self._entered else self._again.popleft()
        self._entered = False
        allowed = self._limited(scores)
        values, own = default_compute_topk(allowed, topk, num_groups=num_groups, group_topk=group_topk)
        if row is None:
            return values, own
        row.used[self.index] += 1
        row.chosen[self.index] = own.detach().to(expert_dtype(scores.shape[1]))
        row.gates[self.index] = self._gates(values.detach(), own)
        if self.owner.margins:
            best = allowed.detach().topk(min(topk + 1, scores.shape[1]), dim=1).values
            row.margins[self.index] = best[:, topk - 1] - best[:, -1]
        if row.experts is None:
            return values, own
        given = row.experts[self.index].long()
        chosen = torch.where(given[:, :1] == LIVE, own, given)
        return scores.gather(1, chosen), chosen

    def _gates(self, values: Tensor, own: Tensor) -> Tensor:
        """[m, k]: the weights of the chosen experts, by the router's own rule, adding up to at most 1."""
        config = self._router.config
        if config.moe_router_score_function == "softmax":
            return values if config.moe_router_pre_softmax else values.softmax(dim=1)
        if self._router.expert_bias is not None:
            values = values - self._router.expert_bias[own]
        return values / values.sum(dim=1, keepdim=True).clamp(min=1e-20)
