"""`LMHead`: an output layer that leaves the logits to `linear_log_probs`."""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor


class LMHead(ColumnParallelLinear):
    """Megatron's output layer with its weight and checkpoint format, whose output is what the weight multiplies.

    `[n(/tp), 1, hidden]` -> `[n, 1, hidden]`, the same on every tensor-parallel rank; the gradient that comes back is
    the part of this rank's columns, and is summed over the ranks here.
    """

    def __init__(self, layer: ColumnParallelLinear) -> None:
        """Takes over the weight of `layer`: the parameter itself, with its marks, or none if it is the embedding's."""
        super().__init__(
            layer.input_size,
            layer.output_size,
            config=layer.config,
            init_method=layer.config.init_method,
            bias=False,
            skip_weight_param_allocation=True,
            tp_group=layer.tp_group,
        )
        self.weight = layer.weight

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(hidden_states, group=self.tp_group), None
        return copy_to_tensor_model_parallel_region(hidden_states, group=self.tp_group), None


def output_weight(model: GPTModel) -> Tensor:
    """`[V/tp, hidden]`: the output layer's own weight on the last stage, or the embedding's that it shares."""
    own = model.output_layer.weight
    return model.shared_embedding_or_output_weight() if own is None else own
