"""Experts of one rank as two stacked weights."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megarl import platform


class Routed(NamedTuple):
    """Token-expert pairs in the order of their experts: `counts [E]` of each expert, `rows [n]`: the token of each."""

    counts: Tensor
    rows: Tensor


class GroupedExperts(MegatronModule):
    """Gated experts (SwiGLU, 2002.05202) over token-expert pairs sorted by local expert.

    weight1 `[E/ep, 2, F/etp, H]` (0 = gate, 1 = up) and weight2 `[E/ep, H, F/etp]`. An expert may have no token.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        submodules: Any = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config)
        self.num_local_experts = num_local_experts
        self.ep_group, self.etp_group, self.dp_group = pg_collection.ep, pg_collection.expt_tp, pg_collection.expt_dp
        ffn = config.moe_ffn_hidden_size // self.etp_group.size()
        self.weight1 = self._parameter(num_local_experts, 2, ffn, config.hidden_size)
        self.weight2 = self._parameter(num_local_experts, config.hidden_size, ffn)

    def _parameter(self, *shape: int) -> torch.nn.Parameter:
        weight = torch.nn.Parameter(
            torch.empty(*shape, dtype=self.config.params_dtype, device=torch.cuda.current_device())
        )
        # Experts reduce their gradient over the expert data-parallel group. Megatron says so only when ep > 1; with
        # etp < tp the tensor-parallel ranks hold copies of the same experts as well, and would drift apart.
        weight.allreduce = False
        # every rank's experts differ, so each counts in the gradient norm: without this mark Megatron 0.16.1
        # leaves out the experts of tensor-parallel ranks above 0 when etp < tp
        set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=2, stride=1)
        return weight

    def forward(self, hidden: Tensor, routed: Routed | Tensor, probs: Tensor) -> tuple[Tensor, None]:
        """`[tokens, H]` of `hidden [tokens, H]`, by `LocalDispatcher`'s pairs or, after one of Megatron's, sorted by
        expert, with as many of each as the tensor says; `probs` of each pair."""
        counts, rows = routed if isinstance(routed, Routed) else (routed, None)
        ends = torch.as_tensor(counts, device=hidden.device).cumsum(0).to(torch.int32)
        probs = probs.to(hidden.dtype)
        return platform.gated_experts(hidden, self.weight1, self.weight2, ends, probs, rows), None

    def backward_dw(self) -> None:
        """Weight gradients are computed in the ordinary backward."""

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Both weights as shards of `[E, ...]`, so that a checkpoint loads under any ep and etp."""
        # buffers are amaxes of delayed FP8 scales
        buffers = {prefix + name: buffer for name, buffer in self.named_buffers()}
        return {key: self._shard(key, buffer, sharded_offsets) for key, buffer in buffers.items()} | {
            f"{prefix}weight1": self._shard(f"{prefix}weight1", self.weight1, sharded_offsets, ffn_axis=2),
            f"{prefix}weight2": self._shard(f"{prefix}weight2", self.weight2, sharded_offsets, ffn_axis=2),
        }

    def _shard(self, key: str, weight: Tensor, sharded_offsets: tuple, ffn_axis: int | None = None) -> ShardedTensor:
        """`ffn_axis`: the dimension cut over etp; none: all etp ranks have the same."""
        axes, ep, etp = len(sharded_offsets), self.ep_group, self.etp_group
        offsets = [*sharded_offsets, (axes, ep.rank(), ep.size())]
        if ffn_axis is not None:
            offsets.append((axes + ffn_axis, etp.rank(), etp.size()))
        replica = (0, etp.rank() if ffn_axis is None else 0, self.dp_group.rank())
        return ShardedTensor.from_rank_offsets(key, weight, *offsets, replica_id=replica, prepend_axis_num=axes)
