"""Multi-head latent attention (DeepSeek-V2, 2405.04434, section 2.1) over packed rows."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megarl.models.layers.provider import Layers
from megarl.models.layers.torch_layers import attend, rotate
from megarl.models.packing_params import PackedRow
from megarl.models.rope import magnitude
from megarl.models.spec import ModelSpec

LATENT_EPS = 1e-6  # of the norms of the latents, whatever config.json says of the others


class LatentAttention(MegatronModule):
    """Causal attention whose keys and values come from one latent per token, with a rotated key that all heads share.

    Input `[n(/tp), 1, hidden]` (sharded over tp under sequence parallelism), output of the same shape.
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
        """`layers`: the modules it is made of; norms stand apart from linears, for which `LATENT_EPS` may be another."""
        super().__init__(config)
        self.layer_number, self.spec, self.tp_group = layer_number, spec, pg_collection.tp
        self.heads = spec.num_heads // pg_collection.tp.size()
        common = dict(
            config=config, bias=False, skip_bias_add=True, init_method=config.init_method, is_expert=False
        )
        column = dict(gather_output=False, tp_group=pg_collection.tp, **common)
        if spec.q_lora_rank:
            self.linear_q_down_proj = layers.replicated(config, spec.hidden_size, spec.q_lora_rank)
            self.q_layernorm = layers.norm(config, spec.q_lora_rank, LATENT_EPS)
            self.linear_q_up_proj = layers.column(spec.q_lora_rank, spec.num_heads * spec.head_dim, **column)
        else:
            self.linear_q_proj = layers.column(spec.hidden_size, spec.num_heads * spec.head_dim, **column)
        self.linear_kv_down_proj = layers.replicated(config, spec.hidden_size, spec.kv_lora_rank + spec.rope_head_dim)
        self.kv_layernorm = layers.norm(config, spec.kv_lora_rank, LATENT_EPS)
        self.linear_kv_up_proj = layers.column(
            spec.kv_lora_rank, spec.num_heads * (spec.nope_head_dim + spec.v_head_dim), **column
        )
        self.linear_proj = layers.row(
            spec.num_heads * spec.v_head_dim, spec.hidden_size, input_is_parallel=True, tp_group=self.tp_group, **common
        )
        # YaRN's temperature, which DeepSeek gives to the scores of the unrotated part too
        self.scale = spec.head_dim**-0.5
        if spec.rope.kind == "yarn" and spec.rope.mscale_all_dim:
            self.scale *= magnitude(spec.rope.factor, spec.rope.mscale_all_dim) ** 2
        self.core_attention = layers.core(config, layer_number, spec, pg_collection, self.scale)

    def forward(
        self, hidden_states: Tensor, attention_mask: Any = None, packed_seq_params: PackedRow | None = None, **_: Any
    ) -> tuple[Tensor, Tensor | None]:
        spec, rope = self.spec, packed_seq_params.rotary
        query = self._queries(hidden_states).view(-1, self.heads, 1, spec.head_dim)
        latent, shared = self.linear_kv_down_proj(hidden_states).split([spec.kv_lora_rank, spec.rope_head_dim], dim=-1)
        both, _bias = self.linear_kv_up_proj(self.kv_layernorm(latent))
        both = both.view(-1, self.heads, 1, spec.nope_head_dim + spec.v_head_dim)
        key, value = both.split([spec.nope_head_dim, spec.v_head_dim], dim=-1)
        if self.config.sequence_parallel:  # every rank's heads use the rotated key of all tokens
            shared = gather_from_sequence_parallel_region(shared, group=self.tp_group)
        shared = rotate(shared.view(-1, 1, 1, spec.rope_head_dim), rope, spec.rope.interleaved)
        plain, rotated = query.split([spec.nope_head_dim, spec.rope_head_dim], dim=-1)
        query = torch.cat([plain, rotate(rotated, rope, spec.rope.interleaved)], dim=-1)
        key = torch.cat([key, shared.expand(-1, self.heads, -1, -1)], dim=-1)
        query, key, value = query.squeeze(2), key.squeeze(2), value.squeeze(2)
        if self.core_attention is not None:
            out = self.core_attention(query, key, value, packed_seq_params)
        else:  # the kernels take values as wide as keys
            value = F.pad(value, (0, max(0, spec.head_dim - spec.v_head_dim)))
            out = attend(query, key, value, packed_seq_params, scale=self.scale)[..., : spec.v_head_dim]
        return self.linear_proj(out.reshape(out.shape[0], 1, -1))

    def _queries(self, hidden_states: Tensor) -> Tensor:
        if not self.spec.q_lora_rank:
            return self.linear_q_proj(hidden_states)[0]
        return self.linear_q_up_proj(self.q_layernorm(self.linear_q_down_proj(hidden_states)))[0]
