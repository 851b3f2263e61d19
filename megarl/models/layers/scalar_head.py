"""`ScalarHead`: one number a token, for critics and reward models."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup


class ScalarHead(MegatronModule):
    """hidden -> 1 without a bias, computed in float32 or wider, in place of a language model's output layer.

    `[n(/tp), 1, hidden]` -> `[n, 1, 1]`, the same on every tensor-parallel rank. Under sequence parallelism each rank
    scores its own tokens and the numbers are gathered, not the hidden states; the weight's gradient is then a rank's
    share, which Megatron sums over the ranks because of the attribute, as it does for norms. Starts at 0, so that a
    fresh critic says 0 and moves nothing but this weight in its first step.
    """

    def __init__(self, config: TransformerConfig, tp_group: ProcessGroup) -> None:
        super().__init__(config)
        self.tp_group = tp_group
        self.weight = torch.nn.Parameter(torch.zeros(1, config.hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        out = F.linear(hidden_states.to(dtype), self.weight.to(dtype))
        if self.config.sequence_parallel:
            # every rank computes the same loss from the gathered numbers: its own part of the gradient is complete
            out = gather_from_sequence_parallel_region(out, tensor_parallel_output_grad=False, group=self.tp_group)
        return out, None
