"""Experts with biases and the clamped activation of gpt-oss."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megarl import platform
from megarl.models.moe.experts import GroupedExperts, Routed

ALPHA, LIMIT = 1.702, 7.0


class BiasedExperts(GroupedExperts):
    """`GroupedExperts` with bias1 `[E/ep, 2, F]` and bias2 `[E/ep, H]`, and `ClampedSwiGLU` for its activation.

    Only with etp 1: where results are summed over ranks, every rank would add bias2.
    """

    def __init__(self, num_local_experts: int, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(num_local_experts, config, *args, **kwargs)
        self.bias1 = self._parameter(num_local_experts, 2, self.weight1.shape[2])
        self.bias2 = self._parameter(num_local_experts, config.hidden_size)

    def forward(self, hidden: Tensor, routed: Routed | Tensor, probs: Tensor) -> tuple[Tensor, None]:
        """See `GroupedExperts.forward`."""
        counts, rows = routed if isinstance(routed, Routed) else (routed, None)
        ends = torch.as_tensor(counts, device=hidden.device).cumsum(0).to(torch.int32)
        own = hidden if rows is None else platform.take_rows(hidden, rows)
        activated = ClampedSwiGLU.apply(platform.grouped_linear(own, self.weight1, self.bias1, ends))
        if hasattr(self.weight2, "product"):  # in FP8 rows of padding are 0, and stay so in spite of the bias
            activated = activated.masked_fill((own == 0).all(dim=1, keepdim=True), 0.0)
        out = platform.grouped_linear(activated, self.weight2, self.bias2, ends)
        out = out * probs.to(out.dtype)[:, None]
        return (out if rows is None else platform.sum_rows(out, rows, len(hidden))), None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """All four as shards of `[E, ...]`."""
        biases = {f"{prefix}bias1": self.bias1, f"{prefix}bias2": self.bias2}
        shards = {key: self._shard(key, bias, sharded_offsets) for key, bias in biases.items()}
        return super().sharded_state_dict(prefix, sharded_offsets, metadata) | shards


class ClampedSwiGLU(torch.autograd.Function):
    """`g sigmoid(1.702 g) (u + 1)` of `[n, 2F]`, with g the first half, at most 7, and u the second, within 7 of 0."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = _clamped(gate_up)
        return gate.mul_(torch.sigmoid(ALPHA * gate)).mul_(up.add_(1))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = _clamped(gate_up)
        sigmoid = torch.sigmoid(ALPHA * gate)
        out = torch.empty_like(gate_up)
        grad_gate, grad_up = out.chunk(2, dim=-1)
        torch.mul(grad, gate * sigmoid, out=grad_up)
        slope = (1 - sigmoid).mul_(gate).mul_(ALPHA).add_(1).mul_(sigmoid)  # of g sigmoid(a g): s (1 + a g (1 - s))
        torch.mul(slope.mul_(up.add_(1)), grad, out=grad_gate)
        raw_gate, raw_up = gate_up.chunk(2, dim=-1)
        grad_gate.masked_fill_(raw_gate > LIMIT, 0)
        grad_up.masked_fill_(raw_up.abs() > LIMIT, 0)
        return out


def _clamped(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = gate_up.chunk(2, dim=-1)
    return gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT)
