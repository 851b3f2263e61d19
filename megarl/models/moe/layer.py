"""Megatron's MoE layer, with a dispatcher of ours where tokens need not travel."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megarl.models.moe.biased_experts import BiasedExperts
from megarl.models.moe.experts import GroupedExperts, Routed
from megarl.models.moe.pair_router import PairRouter


class LocalDispatcher(MoETokenDispatcher):
    """For experts that are all here and whole: they read their tokens where these are.

    Megatron's dispatchers copy every token to each of its experts and every result back, in tensors of top-k times the
    size of the hidden states.
    """

    def dispatch_preprocess(self, hidden: Tensor, chosen: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
        """`chosen` and `gates [tokens, k]`, from a `PairRouter`."""
        self.hidden_shape, self.chosen = hidden.shape, chosen
        return hidden.view(-1, hidden.shape[-1]), gates

    def token_dispatch(self, hidden: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
        return hidden, gates

    def dispatch_postprocess(self, hidden: Tensor, gates: Tensor) -> tuple[Tensor, Routed, Tensor]:
        """`hidden [tokens, H]` as it is, the pairs in the order of their experts, and the gate of each."""
        experts, pairs = self.chosen.flatten().to(torch.int16).sort(stable=True)  # a narrow type sorts faster
        counts = torch.bincount(experts, minlength=self.config.num_moe_experts)
        rows = pairs.div(self.chosen.shape[1], rounding_mode="floor")
        return hidden, Routed(counts, rows), gates.flatten().index_select(0, pairs)

    def combine_preprocess(self, hidden: Tensor) -> Tensor:
        return hidden

    def token_combine(self, hidden: Tensor) -> Tensor:
        return hidden

    def combine_postprocess(self, hidden: Tensor) -> Tensor:
        return hidden.view(self.hidden_shape)


class MoE(MoELayer):
    """`MoELayer` of `GroupedExperts`, or `BiasedExperts` where linears have biases.

    With a `PairRouter` and `LocalDispatcher` when ep and etp are 1.

    It stands in a layer's spec as the class itself: of a `ModuleSpec` Megatron knows its own classes only.
    """

    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)  # of the shared experts
    reads_in_place = True  # the experts take `Routed`

    def __init__(self, config: TransformerConfig) -> None:
        groups = get_default_pg_collection()
        shared = ModuleSpec(module=SharedExpertMLP, submodules=self.linears)
        super().__init__(
            config, MoESubmodules(experts=self.experts_of(config), shared_experts=shared), pg_collection=groups
        )
        if self.reads_in_place and groups.ep.size() * groups.expt_tp.size() == 1:
            self.router = PairRouter(config, groups)
            self.token_dispatcher = LocalDispatcher(config, groups)

    @staticmethod
    def experts_of(config: TransformerConfig) -> type | ModuleSpec:
        """The module of a rank's experts."""
        return BiasedExperts if config.add_bias_linear else GroupedExperts
