"""The PyTorch layer provider: Megatron's parallel linears around PyTorch's norm, attention and grouped matrix product."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.mappings import (
    all_gather_last_dim_from_tensor_parallel_region,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from megarl import platform
from megarl.models.layers.provider import Layers
from megarl.models.moe.layer import MoE
from megarl.models.packing_params import PackedRow
from megarl.models.spec import ModelSpec


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm (1910.07467) over the last dimension, computed in float32 or wider.

    Megatron's own torch norm refuses sequence parallelism; all it needs is the attribute on the weight that makes
    Megatron sum its gradient over the tensor-parallel ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype in (torch.float32, torch.float64):
            return platform.rms_norm(x, self.weight, self.eps)
        return F.rms_norm(x.float(), self.weight.shape, None, self.eps).to(x.dtype) * self.weight


class Down(torch.nn.Module):
    """A projection that every rank holds whole and applies to its own part of the tokens."""

    def __init__(self, config: TransformerConfig, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(outputs, inputs, dtype=config.params_dtype))
        config.init_method(self.weight)
        self.weight.sequence_parallel = config.sequence_parallel  # its gradient is summed over the ranks' tokens

    def forward(self, x: Tensor) -> Tensor:
        return platform.linear(x, self.weight)


class HeadsNorm(RMSNorm):
    """One root-mean-square norm over all heads of a token, of which this rank has `copies * hidden_size / tp` elements.

    `copies`: of how many neighbouring ranks the heads are the same.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float,
        tp_group: torch.distributed.ProcessGroup,
        copies: int = 1,
    ) -> None:
        super().__init__(config, hidden_size // tp_group.size(), eps)
        self.width, self.tp_group, self.copies = hidden_size, tp_group, copies
        # every rank sees all tokens here, and has weights of its own
        self.weight.sequence_parallel = False
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def forward(self, x: Tensor) -> Tensor:
        """x `[n, ...]` with this rank's elements in a row."""
        flat = x.flatten(1).to(torch.promote_types(x.dtype, torch.float32))
        squares = flat.square().sum(dim=1, keepdim=True)
        if self.tp_group.size() > 1:  # summed over the ranks; its gradient, which all of them have a part in, as well
            squares = reduce_from_tensor_model_parallel_region(squares, self.tp_group)
            squares = copy_to_tensor_model_parallel_region(squares, self.tp_group)
        out = (flat * torch.rsqrt(squares / (self.width * self.copies) + self.eps)).to(x.dtype) * self._own_weight()
        return out.view(x.shape)

    def _own_weight(self) -> Tensor:
        """Of this rank's heads, from the ranks that hold its pieces."""
        if self.copies == 1:
            return self.weight
        whole = all_gather_last_dim_from_tensor_parallel_region(self.weight[None], self.tp_group)
        return whole.view(self.tp_group.size() // self.copies, -1)[self.tp_group.rank() // self.copies]

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """The weight as a shard over tp."""
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0}, sharded_offsets)


class PackedAttention(MegatronModule):
    """Causal grouped-query attention over one packed row, with norms of queries and keys and rotary positions.

    Input `[n(/tp), 1, hidden]` (sharded over tp under sequence parallelism), output of the same shape. The fused
    projection is laid out per key/value group as `[q .. q, k, v]`, as everywhere in Megatron, and cut over tp as plain
    rows; with more ranks than groups every rank gathers it and takes its query heads and their group's key and value.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        pg_collection: ProcessGroupCollection | None = None,
        spec: ModelSpec | None = None,
        layers: Layers | None = None,
        **_: Any,
    ) -> None:
        """`layers`: the modules it is made of. Where they have norm and linear in one, the norm before it is inside."""
        super().__init__(config)
        self.layer_number = layer_number
        self.head_dim = config.kv_channels
        self.tp_group = pg_collection.tp
        tp, heads, groups = config.tensor_model_parallel_size, config.num_attention_heads, config.num_query_groups
        self.ranks_per_group = max(1, tp // groups)  # that share a key/value head
        self.groups = max(1, groups // tp)  # key/value heads on this rank
        self.queries = heads // groups // self.ranks_per_group  # query heads on this rank per key/value head
        width = (heads + 2 * groups) * self.head_dim
        common = dict(config=config, skip_bias_add=True, init_method=config.init_method, is_expert=False)
        self.linear_qkv = (layers.norm_column or layers.column)(
            config.hidden_size, width, gather_output=False, tp_group=pg_collection.tp, bias=spec.qkv_bias, **common
        )
        self.linear_proj = layers.row(
            config.num_attention_heads * self.head_dim,
            config.hidden_size,
            input_is_parallel=True,
            tp_group=pg_collection.tp,
            bias=spec.output_bias,
            **common,
        )
        self.q_layernorm = self.k_layernorm = None
        if spec.qk_norm == "head":
            self.q_layernorm, self.k_layernorm = (layers.norm(config, self.head_dim, spec.norm_eps) for _ in range(2))
        elif spec.qk_norm == "all":
            self.q_layernorm = HeadsNorm(config, heads * self.head_dim, spec.norm_eps, self.tp_group)
            self.k_layernorm = HeadsNorm(
                config, groups * self.head_dim, spec.norm_eps, self.tp_group, self.ranks_per_group
            )
        self.window = spec.windows[layer_number - 1] if spec.windows else 0
        self.sinks = None
        if spec.sinks:  # of the query heads of this rank
            self.sinks = torch.nn.Parameter(torch.zeros(heads // tp, dtype=config.params_dtype))
            set_tensor_model_parallel_attributes(self.sinks, is_parallel=True, dim=0, stride=1)
        self.core_attention = layers.core(config, layer_number, spec, pg_collection)

    def forward(
        self, hidden_states: Tensor, attention_mask: Any = None, packed_seq_params: PackedRow | None = None, **_: Any
    ) -> tuple[Tensor, Tensor | None]:
        query, key, value = self._project(hidden_states)
        if self.q_layernorm is not None:
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        query, key = rotate(query, packed_seq_params.rotary), rotate(key, packed_seq_params.rotary)
        query = query.reshape(-1, self.groups * self.queries, self.head_dim)
        key, value = key.squeeze(2), value.squeeze(2)
        if self.core_attention is not None:
            out = self.core_attention(query, key, value, packed_seq_params)
        else:
            out = attend(query, key, value, packed_seq_params, self.window, self.sinks)
        return self.linear_proj(out.reshape(out.shape[0], 1, -1))

    def _project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[n, groups, queries, head_dim]`, and keys and values `[n, groups, 1, head_dim]`, of this rank."""
        qkv, bias = self.linear_qkv(hidden_states)
        if bias is not None:
            qkv = qkv + bias
        if self.ranks_per_group == 1:
            qkv = qkv.view(-1, self.groups, self.queries + 2, self.head_dim)
            return qkv.split([self.queries, 1, 1], dim=2)
        qkv = all_gather_last_dim_from_tensor_parallel_region(qkv, self.tp_group)
        group, part = divmod(self.tp_group.rank(), self.ranks_per_group)
        group_heads = self.ranks_per_group * self.queries
        qkv = qkv.view(qkv.shape[0], -1, group_heads + 2, self.head_dim)[:, group : group + 1]
        query, key, value = qkv.split([group_heads, 1, 1], dim=2)
        return query[:, :, part * self.queries : (part + 1) * self.queries], key, value

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Of the linears and norms, and the sinks as shards over tp."""
        out = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.sinks is not None:
            axes = {"sinks": 0}
            out |= make_sharded_tensors_for_checkpoint({"sinks": self.sinks}, prefix, axes, sharded_offsets)
        return out


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor], interleaved: bool = False) -> Tensor:
    """Rotary positions on the first `width` elements of heads `[n, .., .., head_dim]`, in the precision of the tables.

    `rotary`: cos and sin `[n, width]` with two equal halves. `interleaved`: pairs are neighbours instead of halves.
    """
    return _Rotary.apply(x, *rotary, interleaved)


class _Rotary(torch.autograd.Function):
    """The rotation, and as its gradient the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _turn(x, cos, sin, interleaved)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, -sin, ctx.interleaved), None, None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    width = cos.shape[-1]
    cos, sin = cos[:, None, None, : width // 2], sin[:, None, None, : width // 2]
    out = torch.empty(x.shape, dtype=cos.dtype, device=x.device)
    first, second = _pairs(x[..., :width].to(cos.dtype), interleaved)
    out_first, out_second = _pairs(out[..., :width], interleaved)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin)
    if width < x.shape[-1]:
        out[..., width:] = x[..., width:]
    return out.to(x.dtype)


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    return (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row: PackedRow,
    window: int = 0,
    sinks: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Causal attention inside each document of a packed row: `[n, heads, head_dim]` and two `[n, kv_heads, head_dim]`.

    `window`: the last keys a query sees, itself included; 0: all. `sinks [heads]`: see `platform.sink_attention`.
    `scale`: of the scores; none: 1 / sqrt(head_dim).

    One `scaled_dot_product_attention` per bucket of similar lengths: on a CPU that is faster than a mask over the whole
    row, and for documents of very different lengths it becomes a call per document. Under context parallelism keys and
    values are gathered from the group, and their gradients are summed on the way back.
    """
    grouped = query.shape[1] != key.shape[1]
    if row.cp_group is not None:
        both = gather_from_sequence_parallel_region(torch.cat([key, value], dim=1), group=row.cp_group)
        key, value = both.split(key.shape[1], dim=1)
    outputs, layout = [], row.layouts[window]
    for bucket in layout.buckets:
        q, k, v = (
            (x if index is None else x.index_select(0, index))
            .view(bucket.documents, -1, *x.shape[1:])
            .transpose(1, 2)
            for x, index in ((query, bucket.index), (key, bucket.key_index), (value, bucket.key_index))
        )
        if sinks is None:
            causal = bucket.mask is None
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=bucket.mask, is_causal=causal, enable_gqa=grouped, scale=scale
            )
        else:
            out = platform.sink_attention(q, k, v, bucket.mask, sinks)
        outputs.append(out.transpose(1, 2).reshape(-1, *query.shape[1:]))
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return out if layout.restore is None else out.index_select(0, layout.restore)


TORCH = Layers("torch", norm=RMSNorm, column=ColumnParallelLinear, row=RowParallelLinear, replicated=Down, moe=MoE)
