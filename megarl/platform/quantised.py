"""Quantised tensors: parameters that Transformer Engine keeps as FP8 codes and scales behind a tensor of their nominal dtype.

What megarl relies on of them are the names of `transformer_engine.pytorch.tensor.QuantizedTensor` in `PROTOCOL`, none of which
a plain tensor has but `dequantize`. `copy_` into one rounds anew; views of one are FP8 themselves or refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

PROTOCOL = ("dequantize", "quantize_", "get_metadata")


def is_quantised(tensor: Tensor) -> bool:
    return hasattr(tensor, "quantize_")


def plain(tensor: Tensor) -> Tensor:
    """The numbers that a quantised tensor stands for, a copy in its nominal dtype; any other tensor is given back."""
    if not is_quantised(tensor):
        return tensor
    with torch.no_grad():
        return tensor.dequantize()


def parts_of(tensor: Tensor) -> list[Tensor]:
    """Codes and scales of a quantised tensor, by rows and where they are kept by columns; any other tensor itself."""
    if not is_quantised(tensor):
        return [tensor]
    return [part for part in tensor.get_metadata().values() if torch.is_tensor(part)]


def rebuilt(tensor: Tensor, move: Callable[[Tensor], Tensor]) -> Tensor:
    """A quantised tensor of the same kind whose parts are `move`d."""
    made = {name: move(part) if torch.is_tensor(part) else part for name, part in tensor.get_metadata().items()}
    return type(tensor)(shape=tensor.shape, dtype=tensor.dtype, **made)


def forget_initial(parameters: Iterable[Tensor]) -> None:
    """Drop the copies on the host of what quantised parameters were initialised with, which only a first main weight needs."""
    for parameter in parameters:
        if hasattr(parameter, "clear_high_precision_init_val"):
            parameter.clear_high_precision_init_val()
