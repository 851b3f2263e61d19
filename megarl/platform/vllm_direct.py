"""A weight reload of vLLM on a CPU without its general machinery.

`reload_weights` puts every layer back to what it was before loading, counts what each of several hundred loaders copies
and takes the layers together again: for small models that costs more than moving the weights. Where a rank holds whole,
unquantized layers it is clear beforehand where each tensor goes, so it goes there, and the layer's own method packs it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class Layer:
    """A layer of vLLM that is given its tensors one by one, and takes them over when it has all."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.parts: dict[str, Any] = {}  # Hugging Face name -> which part of the layer it is
        self.missing: set[str] = set()  # of a load that goes on

    def place(self, part: Any) -> Tensor:
        """Where a part is to be written."""
        raise NotImplementedError

    def take(self) -> None:
        """Compute with what was written."""


class Rows(Layer):
    """A norm, an embedding or an output layer: it keeps its weight as it is loaded."""

    def place(self, part: slice) -> Tensor:
        return self.module.weight[part]

    def take(self) -> None:
        method = getattr(self.module, "quant_method", None)
        if method is not None:
            method.process_weights_after_loading(self.module)


class Linear(Layer):
    """A linear layer of one or several projections, which keeps a packed copy alone."""

    weight: Tensor | None = None

    def place(self, part: slice) -> Tensor:
        if self.weight is None:
            rows, width = max(p.stop for p in self.parts.values()), self.module.input_size
            self.weight = torch.empty(rows, width, dtype=self.module.params_dtype)
        return self.weight[part]

    def take(self) -> None:
        self.module.weight = nn.Parameter(self.weight, requires_grad=False)
        self.weight = None
        self.module.quant_method.process_weights_after_loading(self.module)


class Experts(Layer):
    """All experts of a layer, which pads and packs them."""

    weights: tuple[Tensor, Tensor] | None = None

    def place(self, part: tuple[str, int]) -> Tensor:
        matrix, index = part
        if self.weights is None:
            experts, width = self.module.w2_weight.shape[:2]
            ffn = self.module.moe_config.intermediate_size_per_partition
            empty = self.module.w2_weight.new_empty
            self.weights = empty(experts, 2 * ffn, width), empty(experts, width, ffn)
        gate_up, down = (weight[index] for weight in self.weights)
        return down if matrix == "down_proj" else gate_up.chunk(2)[matrix == "up_proj"]

    def take(self) -> None:
        from vllm.model_executor.utils import replace_parameter

        for name, weight in zip(("w13_weight", "w2_weight"), self.weights, strict=True):
            replace_parameter(self.module, name, weight)
        self.weights = None
        self.module.quant_method.moe_kernel.fused_experts.process_weights_after_loading(self.module)


def layers(model: nn.Module) -> dict[str, Layer] | None:
    """Hugging Face name -> layer of an engine without tensor parallelism; None when there is one of another kind."""
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
    from vllm.model_executor.layers.layernorm import RMSNorm
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    found: list[Layer] = []
    for path, module in model.named_modules():
        parent, _, leaf = path.rpartition(".")
        method = getattr(module, "quant_method", None)
        experts = getattr(getattr(method, "moe_kernel", None), "fused_experts", None)
        if isinstance(module, RMSNorm):
            found.append(Rows(module))
            found[-1].parts[f"{path}.weight"] = slice(None)
        elif isinstance(module, VocabParallelEmbedding):
            if isinstance(module, ParallelLMHead) and model.config.tie_word_embeddings:
                continue
            found.append(Rows(module))
            found[-1].parts[f"{path}.weight"] = slice(module.org_vocab_size)
        elif isinstance(module, LinearBase) and type(method) is UnquantizedLinearMethod and module.bias is None:
            found.append(Linear(module))
            start = 0
            sizes = getattr(module, "output_partition_sizes", [module.output_size])
            for name, size in zip(model.packed_modules_mapping.get(leaf, [leaf]), sizes, strict=True):
                found[-1].parts[f"{parent}.{name}.weight"] = slice(start, start + size)
                start += size
        elif isinstance(experts, CPUUnquantizedExperts) and not module.moe_config.has_bias:
            found.append(Experts(module))
            for index in range(len(module.w2_weight)):
                for matrix in ("gate_proj", "up_proj", "down_proj"):
                    found[-1].parts[f"{parent}.{index}.{matrix}.weight"] = matrix, index
        elif any(True for _ in module.parameters(recurse=False)):
            return None
    return {name: layer for layer in found for name in layer.parts}


@torch.no_grad()
def load(places: dict[str, Layer], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write a stream of Hugging Face tensors into their layers; a layer that is given none keeps its weights.

    Raises ValueError for a name or a shape that the model does not have, and when a layer is given only some of its
    tensors.
    """
    for layer in places.values():
        layer.missing.clear()
    for name, tensor in tensors:
        if name not in places:
            raise ValueError(f"the engine's model has no {name}")
        layer = places[name]
        place = layer.place(layer.parts[name])
        if place.shape != tensor.shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, the engine's model takes {tuple(place.shape)}")
        place.copy_(tensor)
        layer.missing = (layer.missing or set(layer.parts)) - {name}
        if not layer.missing:
            layer.take()
    for layer in places.values():
        if layer.missing:
            raise ValueError(f"the stream ended without {min(layer.missing)}")
