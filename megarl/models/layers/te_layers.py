"""The Transformer Engine layer provider: Megatron's wrappers of its linears, norms, grouped linears and attention.

The attention modules, routers and the output layer are those of the torch provider, and so are rotary positions and norms
of queries and keys. Weights have the torch provider's names in a checkpoint's shards; for conversion and weight sync
`megarl.convert.stacks` gives them theirs.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensorFactory
from megatron.core.extensions.transformer_engine import (
    TEColumnParallelGroupedLinear,
    TEColumnParallelLinear,
    TEDotProductAttention,
    TELayerNormColumnParallelLinear,
    TELinear,
    TENorm,
    TERowParallelGroupedLinear,
    TERowParallelLinear,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megarl.models.layers.provider import Layers
from megarl.models.moe.layer import MoE
from megarl.models.packing_params import PackedRow
from megarl.models.spec import ModelSpec

# what its kernels for packed rows take; other rows go through PyTorch's attention
ATTENTION_DTYPES = (torch.bfloat16,)


class TEDown(TELinear):
    """A projection that every rank holds whole and applies to its own part of the tokens."""

    def __init__(self, config: TransformerConfig, inputs: int, outputs: int) -> None:
        super().__init__(
            inputs,
            outputs,
            parallel_mode="duplicated",
            config=config,
            init_method=config.init_method,
            bias=False,
            skip_bias_add=False,
            skip_weight_param_allocation=False,
        )
        # Transformer Engine marks every linear's weight as sharded, and the gradient norm would count each rank's copy
        self.weight.tensor_model_parallel = False

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


class TECore(TEDotProductAttention):
    """Causal attention inside each document of a packed row, `[n, heads, width]` of queries, keys and values.

    Under context parallelism ranks hold two chunks of each document (`packing.zigzag`) and pass keys and values round.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        spec: ModelSpec,
        groups: ProcessGroupCollection,
        scale: float | None,
    ) -> None:
        if config.num_query_groups < config.tensor_model_parallel_size:  # ranks with the same key/value head
            config = copy.copy(config)
            config.num_query_groups = config.tensor_model_parallel_size
        widths = (spec.head_dim, spec.v_head_dim) if spec.kv_lora_rank else (None, None)
        super().__init__(
            config,
            layer_number,
            AttnMaskType.causal,
            "self",
            softmax_scale=scale,
            k_channels=widths[0],
            v_channels=widths[1],
            pg_collection=groups,
        )

    def forward(self, query: Tensor, key: Tensor, value: Tensor, row: PackedRow) -> Tensor:
        out = super().forward(query, key, value, None, AttnMaskType.causal, packed_seq_params=row)
        return out.view(len(query), query.shape[1], -1)


def core(
    config: TransformerConfig,
    layer_number: int,
    spec: ModelSpec,
    groups: ProcessGroupCollection,
    scale: float | None = None,
) -> TECore | None:
    """The core of an attention module; none where Transformer Engine 2.11 has no kernel for packed rows.

    That is for other dtypes than bfloat16, for sinks (with `softmax_type="learnable"` it drops all of its backends for
    `qkv_format="thd"`), and for windows under context parallelism, which only models with sinks have.
    """
    if config.params_dtype not in ATTENTION_DTYPES or spec.sinks or any(spec.windows):
        return None
    return TECore(config, layer_number, spec, groups, scale)


class TEExperts(TEGroupedMLP):
    """Gated experts as grouped linears: linear_fc1.weight0.. `[2 F/etp, H]` and linear_fc2.weight0.. `[H, F/etp]`."""

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(num_local_experts, config, submodules, pg_collection)
        self.dp_group = pg_collection.expt_dp
        for linear, dim in ((self.linear_fc1, 0), (self.linear_fc2, 1)):
            for parameter in linear.parameters():
                # for the reasons in `GroupedExperts._parameter`
                parameter.allreduce = False
                parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_stride = True, dim, 1

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Every weight as its part of `GroupedExperts`' weight1 and weight2, every bias of bias1 and bias2."""
        out: dict[str, Any] = {}
        for number, linear, inner in ((1, self.linear_fc1, (2, -1)), (2, self.linear_fc2, (-1,))):
            for name, parameter in linear.named_parameters():
                kind = name.rstrip("0123456789")
                expert = int(name.removeprefix(kind))
                view = (*inner, parameter.shape[1]) if kind == "weight" else inner
                cut = {("weight", 1): 1, ("weight", 2): 1, ("bias", 1): 1}.get((kind, number))  # dimension over etp
                key = f"{prefix}{kind}{number}"
                out[f"{prefix}linear_fc{number}.{name}"] = self._shard(key, parameter, expert, view, cut, sharded_offsets)
            state = linear.get_extra_state()
            if state is not None:  # scales of delayed FP8
                shape, place = _places(sharded_offsets, self.ep_group)
                key = f"{prefix}linear_fc{number}._extra_state"
                out[key] = ShardedObject(key, state, shape, place, (0, self.tp_group.rank(), self.dp_group.rank()))
        return out

    def _shard(
        self, key: str, parameter: Tensor, expert: int, view: tuple[int, ...], cut: int | None, sharded_offsets: tuple
    ) -> ShardedTensorFactory:
        axes, etp = len(sharded_offsets), self.tp_group
        number = self.ep_group.rank() * self.num_local_experts + expert
        offsets = [*sharded_offsets, (axes, number, self.ep_group.size() * self.num_local_experts)]
        if cut is not None:
            offsets.append((axes + 1 + cut, etp.rank(), etp.size()))

        def build(key: str, tensor: Tensor, replica: Any, _flattened: Any) -> ShardedTensor:
            part = tensor.view(view)
            return ShardedTensor.from_rank_offsets(key, part, *offsets, replica_id=replica, prepend_axis_num=axes + 1)

        replica = (0, etp.rank() if cut is None else 0, self.dp_group.rank())
        return ShardedTensorFactory(key, parameter, build, lambda part: part.view(parameter.shape), replica)


def _places(sharded_offsets: tuple, ep_group: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """How many objects of a kind there are, by layer and expert-parallel rank, and which this is."""
    offsets = [*((size, place) for _axis, place, size in sharded_offsets), (ep_group.size(), ep_group.rank())]
    return tuple(size for size, _ in offsets), tuple(place for _, place in offsets)


class TEMoE(MoE):
    """`MoE` of `TEExperts`."""

    linears = MLPSubmodules(linear_fc1=TEColumnParallelLinear, linear_fc2=TERowParallelLinear)
    reads_in_place = False

    @staticmethod
    def experts_of(config: TransformerConfig) -> ModuleSpec:
        grouped = MLPSubmodules(linear_fc1=TEColumnParallelGroupedLinear, linear_fc2=TERowParallelGroupedLinear)
        return ModuleSpec(module=TEExperts, submodules=grouped)


TE = Layers(
    "te",
    norm=TENorm,
    column=TEColumnParallelLinear,
    row=TERowParallelLinear,
    replicated=TEDown,
    moe=TEMoE,
    norm_column=TELayerNormColumnParallelLinear,
    core=core,
    shard_names={
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    },
)
