"""Quantised tensors of `te_stand_in`: FP8 codes and scales behind a tensor subclass, as Transformer Engine's are.

Which operations give FP8 again, dequantise or refuse is as in the release; numbers are rounded by `megarl.models.fp8`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map

aten = torch.ops.aten


class Quantizer:
    """How a kind of recipe rounds weights: `tile` shares a scale."""

    def __init__(self, kind: type, tile: tuple[int, int] | None, power_of_two: bool) -> None:
        self.kind, self.tile, self.power_of_two = kind, tile, power_of_two

    @classmethod
    def of(cls, recipe: Any) -> Quantizer | None:
        """None for a recipe that the stand-in does not round by."""
        kinds = {
            "Float8CurrentScaling": (Float8Tensor, None, False),
            "Float8BlockScaling": (Float8BlockwiseQTensor, (128, 128), True),
            "MXFP8BlockScaling": (MXFP8Tensor, (1, 32), True),
        }
        found = kinds.get(type(recipe).__name__)
        return None if found is None else cls(*found)

    def round(self, x: Tensor, amax: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[n, k] codes (uint8) and their factors."""
        from megarl.models.fp8 import E4M3, quantize

        found = quantize(x, self.tile, E4M3, self.power_of_two, amax)
        return found.codes.view(torch.uint8), found.factors

    def __call__(self, x: Tensor) -> QuantizedTensor:
        made = self.kind(shape=x.shape, dtype=x.dtype, **self.kind.metadata(self, *self.round(x), None))
        made.make_columns()
        return made


class QuantizedTensor(Tensor):
    names: tuple[str, str, str] = ("", "", "")  # of codes, factors and the copy by columns

    def __new__(cls, shape: Any, dtype: torch.dtype, *, requires_grad: bool = False, device: Any = None, **metadata: Any):
        strides = torch.empty(shape, device="meta").stride()
        made = Tensor._make_wrapper_subclass(
            cls, shape, strides=strides, dtype=dtype, device=device or "cpu", requires_grad=requires_grad
        )
        made._metadata = dict(metadata)
        return made

    @classmethod
    def metadata(cls, quantizer: Quantizer, codes: Tensor, factors: Tensor, columns: Tensor | None) -> dict[str, Any]:
        return {**dict(zip(cls.names, (codes, factors, columns), strict=True)), "fp8_dtype": "e4m3", "quantizer": quantizer}

    def get_metadata(self) -> dict[str, Any]:
        return dict(self._metadata)

    @classmethod
    def make_like(cls, tensor: QuantizedTensor, *, shape: Any = None, dtype: Any = None, requires_grad: bool = False):
        return cls(
            shape=tensor.shape if shape is None else shape, dtype=dtype or tensor.dtype, requires_grad=requires_grad,
            **tensor.get_metadata(),
        )  # fmt: skip

    @property
    def codes(self) -> Tensor:
        return self._metadata[self.names[0]]

    @property
    def columns(self) -> Tensor:
        return self._metadata[self.names[2]]

    def dequantize(self, *, dtype: torch.dtype | None = None) -> Tensor:
        from megarl.models.fp8 import E4M3, Quantised, dequantize

        found = Quantised(self.codes.view(E4M3), self._metadata[self.names[1]], self._metadata["quantizer"].tile)
        return dequantize(found).to(dtype or self.dtype)

    def quantize_(self, tensor: Tensor, *, noop_flag: Any = None) -> QuantizedTensor:
        codes, factors = self._metadata["quantizer"].round(tensor.dequantize() if isinstance(tensor, QuantizedTensor) else tensor)
        self.codes.copy_(codes)
        self._metadata[self.names[1]].copy_(factors)
        self.make_columns()
        return self

    def make_columns(self) -> None:
        self._metadata[self.names[2]] = self.codes.t().contiguous()

    def detach(self) -> QuantizedTensor:
        return type(self).make_like(self)

    def float(self) -> Tensor:
        return self.dequantize(dtype=torch.float32)

    def expand_as(self, other: Tensor) -> Tensor:
        return _Identity.apply(self) if other is self else super().expand_as(other)

    def _set(self, tensor: Tensor) -> None:
        assert isinstance(tensor, QuantizedTensor), "the stand-in casts no plain tensor here"
        self._metadata = tensor.get_metadata()

    data = property(lambda self: self, _set)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten.detach.default:
            return args[0].detach()
        if func is aten.copy_.default:
            target, source = args[:2]
            if isinstance(target, QuantizedTensor):
                target.quantize_(source)
            else:
                target.copy_(source.dequantize())
            return target
        if func is aten.view.default:
            raise NotImplementedError(f"{cls.__name__} does not support views")
        assert not func._schema.is_mutable, f"{func} is no part of the stand-in"
        plain = tree_map(lambda x: x.dequantize() if isinstance(x, QuantizedTensor) else x, (args, kwargs or {}))
        return func(*plain[0], **plain[1])


class Float8Tensor(QuantizedTensor):
    names = ("data", "fp8_scale_inv", "data_transpose")
    data = property(lambda self: self.detach(), QuantizedTensor._set)  # whose copy by columns is its own


class Float8BlockwiseQTensor(QuantizedTensor):
    names = ("rowwise_data", "rowwise_scale_inv", "columnwise_data")


class MXFP8Tensor(QuantizedTensor):
    names = ("rowwise_data", "rowwise_scale_inv", "columnwise_data")


class _Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, quantizer: Quantizer | None) -> Tensor:
        if isinstance(weight, QuantizedTensor):
            return weight.dequantize()
        return quantizer(weight).dequantize()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def operand(weight: Tensor, quantizer: Quantizer | None) -> Tensor:
    """What a linear multiplies by; `quantizer`: of the recipe it is in."""
    return _Rounded.apply(weight, quantizer) if quantizer or isinstance(weight, QuantizedTensor) else weight


class Parameters:
    """Whether linears that are made have quantised weights, as `fp8_model_init` sets it."""

    quantizer: Quantizer | None = None
    keeps_initial = False

    @classmethod
    def wrap(cls, module: nn.Module, name: str) -> None:
        weight = getattr(module, name)
        if cls.quantizer is None:
            return
        parameter = nn.Parameter(cls.quantizer(weight.detach()))
        if cls.keeps_initial:
            initial = [weight.detach().clone()]
            parameter.get_high_precision_init_val = lambda: initial[0] if initial else None
            parameter.clear_high_precision_init_val = initial.clear
        module.register_parameter(name, parameter)


@contextlib.contextmanager
def fp8_model_init(enabled: bool, recipe: Any, preserve_high_precision_init_val: bool) -> Iterator[None]:
    before = Parameters.quantizer, Parameters.keeps_initial
    Parameters.quantizer = Quantizer.of(recipe) if enabled else None
    Parameters.keeps_initial = preserve_high_precision_init_val
    try:
        yield
    finally:
        Parameters.quantizer, Parameters.keeps_initial = before


def replace_raw_data(tensor: QuantizedTensor, new_raw_data: Tensor) -> None:
    if isinstance(tensor, MXFP8Tensor):
        raise NotImplementedError("replace_raw_data for MXFP8Tensor is not supported yet")
    assert new_raw_data.dtype == torch.uint8
    new_raw_data.copy_(tensor.codes)
    tensor._metadata[tensor.names[0]] = new_raw_data


def cast_master_weights_to_fp8(
    model_weights: list[QuantizedTensor], master_weights: list[Tensor | None], start_offsets: list[int | None], group: Any,
    manual_post_all_gather_processing: bool,
) -> None:  # fmt: skip
    from megarl.models.fp8 import _tiles

    assert manual_post_all_gather_processing
    for weight, main, start in zip(model_weights, master_weights, start_offsets, strict=True):
        quantizer, whole = weight._metadata["quantizer"], torch.zeros(weight.shape)
        if isinstance(weight, MXFP8Tensor):
            raise NotImplementedError("no part of the release")
        own = slice(start or 0, (start or 0) + (0 if main is None else main.numel()))
        if main is not None:
            whole.view(-1)[own] = main.to(weight.dtype).float()
        amax = _tiles(whole, quantizer.tile).abs().amax((1, 3))
        dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=group)
        codes, factors = quantizer.round(whole, amax)
        weight.codes.view(-1)[own] = codes.view(-1)[own]
        weight._metadata[weight.names[1]].copy_(factors)


def post_all_gather_processing(model_weights: list[QuantizedTensor]) -> None:
    for weight in model_weights:
        if not isinstance(weight, MXFP8Tensor):
            weight.make_columns()


def cast_modules() -> None:
    """`Module.bfloat16` as the release has it, which changes no codes."""

    def cast(tensor: Tensor) -> Tensor:
        if isinstance(tensor, QuantizedTensor):
            return type(tensor).make_like(tensor, dtype=torch.bfloat16)
        return tensor.bfloat16() if tensor.is_floating_point() else tensor

    nn.Module.bfloat16 = lambda self: self._apply(cast)
