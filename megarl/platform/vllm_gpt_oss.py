"""A reload of gpt-oss in vLLM, whose loader writes sinks and experts past what `reload_weights` watches: they are lost.

Experts one by one go through the watched loaders; the sinks are written where they are, after the reload.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

EXPERTS = {
    "gate_up_proj": "w13_weight",
    "gate_up_proj_bias": "w13_bias",
    "down_proj": "w2_weight",
    "down_proj_bias": "w2_bias",
}


def watched(tensors: Iterator[tuple[str, Tensor]], sinks: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The Hugging Face tensors, those of all experts as one for each; `sinks` gets the sinks, which are left out."""
    for name, tensor in tensors:
        prefix, _, last = name.rpartition(".")
        if last == "sinks":
            sinks[name.replace(".self_attn.", ".attn.")] = tensor
        elif prefix.endswith(".experts") and last in EXPERTS:
            for expert, part in enumerate(tensor):
                yield f"{prefix}.{expert}.{EXPERTS[last]}", part
        else:
            yield name, tensor


@torch.no_grad()
def place(model: nn.Module, sinks: dict[str, Tensor]) -> None:
    """Write all heads' sinks into a model that has some of them, by its rank in the tensor-parallel group."""
    from vllm.distributed import get_tensor_model_parallel_rank

    parameters = dict(model.named_parameters())
    for name, tensor in sinks.items():
        own = len(parameters[name])
        parameters[name].copy_(tensor.narrow(0, get_tensor_model_parallel_rank() * own, own))
