"""The PyTorch layer provider: Megatron's parallel linears around PyTorch's norm, attention and grouped matrix product."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megarl import platform
from megarl.models.packing_params import PackedRow


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


class PackedAttention(MegatronModule):
    """Causal grouped-query attention over one packed row, with per-head norms and rotary positions.

    Input `[n(/tp), 1, hidden]` (sharded over tp under sequence parallelism), output of the same shape. The fused
    projection is laid out per key/value group as `[q .. q, k, v]`, as everywhere in Megatron.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        pg_collection: ProcessGroupCollection | None = None,
        norm: type | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config)
        self.layer_number = layer_number
        self.head_dim = config.kv_channels
        tp = config.tensor_model_parallel_size
        self.groups = config.num_query_groups // tp  # key/value heads on this rank
        self.queries = config.num_attention_heads // config.num_query_groups  # query heads per key/value head
        width = (config.num_attention_heads + 2 * config.num_query_groups) * self.head_dim
        common = dict(config=config, bias=False, skip_bias_add=True, init_method=config.init_method)
        self.linear_qkv = ColumnParallelLinear(
            config.hidden_size, width, gather_output=False, tp_group=pg_collection.tp, **common
        )
        self.linear_proj = RowParallelLinear(
            config.num_attention_heads * self.head_dim,
            config.hidden_size,
            input_is_parallel=True,
            tp_group=pg_collection.tp,
            **common,
        )
        make_norm = (lambda: norm(config, self.head_dim, config.layernorm_epsilon)) if norm else lambda: None
        self.q_layernorm, self.k_layernorm = make_norm(), make_norm()

    def forward(
        self, hidden_states: Tensor, attention_mask: Any = None, packed_seq_params: PackedRow | None = None, **_: Any
    ) -> tuple[Tensor, None]:
        qkv, _bias = self.linear_qkv(hidden_states)
        qkv = qkv.view(-1, self.groups, self.queries + 2, self.head_dim)
        query, key, value = qkv.split([self.queries, 1, 1], dim=2)
        if self.q_layernorm is not None:
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        query, key = rotate(query, packed_seq_params.rotary), rotate(key, packed_seq_params.rotary)
        query = query.reshape(-1, self.groups * self.queries, self.head_dim)
        out = attend(query, key.squeeze(2), value.squeeze(2), packed_seq_params)
        return self.linear_proj(out.reshape(out.shape[0], 1, -1))


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


def attend(query: Tensor, key: Tensor, value: Tensor, row: PackedRow) -> Tensor:
    """Causal attention inside each document of a packed row: `[n, heads, head_dim]` and two `[n, kv_heads, head_dim]`.

    One `scaled_dot_product_attention` per bucket of similar lengths: on a CPU that is faster than a mask over the whole
    row, and for documents of very different lengths it becomes a call per document. Under context parallelism keys and
    values are gathered from the group, and their gradients are summed on the way back.
    """
    grouped = query.shape[1] != key.shape[1]
    if row.cp_group is not None:
        both = gather_from_sequence_parallel_region(torch.cat([key, value], dim=1), group=row.cp_group)
        key, value = both.split(key.shape[1], dim=1)
    outputs = []
    for bucket in row.buckets:
        q, k, v = (
            (x if index is None else x.index_select(0, index))
            .view(bucket.documents, -1, *x.shape[1:])
            .transpose(1, 2)
            for x, index in ((query, bucket.index), (key, bucket.key_index), (value, bucket.key_index))
        )
        causal = bucket.mask is None
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bucket.mask, is_causal=causal, enable_gqa=grouped)
        outputs.append(out.transpose(1, 2).reshape(-1, *query.shape[1:]))
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return out if row.restore is None else out.index_select(0, row.restore)
