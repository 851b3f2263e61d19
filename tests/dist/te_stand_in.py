"""A stand-in for Transformer Engine, whose own modules cannot be imported without CUDA.

Public names, signatures, parameter names and shapes are those of the pinned release, read from `tests/signatures`: a call
that the release would refuse is refused here. Around them is plain PyTorch, written from the release's documentation, with
none of its kernels and no FP8. So it shows that Megatron's wrappers and megarl's provider are put together right: arguments,
layouts, names, shards, gradients. Weights alone are rounded to FP8, where they are FP8 parameters (`te_quantised`) and by the
same recipes where they are not. What Transformer Engine itself computes is left to tests/gpu.
"""

from __future__ import annotations

import contextlib
import enum
import importlib.machinery
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.dist import te_quantised
from tests.dist.te_quantised import Parameters, Quantizer
from tests.signatures import load, signature

NAME = "transformer_engine"
TABLE = load("transformer-engine")
VERSION = "2.11.0"
DROPPED = {"override_linear_precision", "params_dtype", "device"}  # what Megatron gives recipes that do not know it

recipes: list[dict[str, Any]] = []  # the recipes that were made
products: list[tuple[nn.Module, Tensor, bool]] = []  # linear, rows of its input that are 0, whether in FP8; if `watching`
watching = False


def _bound(text: str, method: Callable) -> Callable:
    """`method`, called with the release's arguments and defaults."""
    release, own = signature(text), inspect.signature(method)
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in own.parameters.values())

    def call(*args: Any, **kwargs: Any) -> Any:
        bound = release.bind(*args, **kwargs)
        bound.apply_defaults()
        found = dict(bound.arguments)
        for parameter in release.parameters.values():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                found |= found.pop(parameter.name)
        return method(**(found if takes_all else {k: v for k, v in found.items() if k in own.parameters}))

    call.plain, call.__signature__ = method, release  # type: ignore[attr-defined]
    return call


def _like(name: str) -> Callable[[type], type]:
    """Gives the methods of a class the release's signatures."""

    def decorate(kind: type) -> type:
        for method, text in TABLE[name].items():
            if callable(kind.__dict__.get(method)) and isinstance(text, str):
                setattr(kind, method, _bound(text, kind.__dict__[method]))
        return kind

    return decorate


class Base(nn.Module):
    def _register(self, name: str, wanted: list[str], dtype: torch.dtype, **place: int) -> None:
        """Parameters of the release, in its shapes."""
        for pattern in wanted:
            shape = eval(TABLE[name]["parameters"][pattern], {}, {"self": self})
            shape = shape if isinstance(shape, tuple) else (shape,)
            parameter = nn.Parameter(torch.empty(shape, dtype=dtype))
            self.register_parameter(pattern.format(**place), parameter)

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None: ...

    def init_fp8_metadata(self, num_gemms: int = 1) -> None: ...

    def _note(self, rows: Tensor) -> None:
        if watching:
            zero = (rows.detach().reshape(-1, rows.shape[-1]) == 0).all(dim=1)
            products.append((self, zero, FP8GlobalStateManager.is_fp8_enabled()))


def _mark(parameter: nn.Parameter, dim: int) -> None:
    # of every linear, whatever its parallel mode
    parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_stride = True, dim, 1


@_like(f"{NAME}.pytorch.Linear")
class Linear(Base):
    table = f"{NAME}.pytorch.Linear"

    def __init__(
        self, in_features: int, out_features: int, sequence_parallel: bool, tp_group: Any, tp_size: int, init_method: Any,
        bias: bool, return_bias: bool, params_dtype: torch.dtype, parallel_mode: str | None, **_: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self._build(in_features, out_features, sequence_parallel, tp_group, tp_size, parallel_mode)
        self.use_bias, self.return_bias = bias, return_bias
        self._register(self.table, ["weight"], params_dtype)
        init_method(self.weight)
        Parameters.wrap(self, "weight")
        _mark(self.weight, 1 if parallel_mode == "row" else 0)
        if bias:
            self._register(self.table, ["bias"], params_dtype)
            nn.init.zeros_(self.bias)
            if parallel_mode == "row":
                self.bias.sequence_parallel = self.sequence_parallel
            elif parallel_mode == "column":
                _mark(self.bias, 0)
        else:
            self.bias = torch.empty(0)

    def _build(
        self, inputs: int, outputs: int, sequence_parallel: bool, group: Any, size: int, mode: str | None
    ) -> None:
        self.tp_group, self.tp_size = group, group.size() if group is not None else size
        self.parallel_mode, self.save_original_input = mode, False
        self.in_features = inputs // self.tp_size if mode == "row" else inputs
        self.out_features = outputs // self.tp_size if mode == "column" else outputs
        self.sequence_parallel = self.tp_size > 1 and sequence_parallel

    def forward(self, inp: Tensor, is_first_microbatch: bool | None) -> Any:
        return self._multiply(inp)

    def _multiply(self, inp: Tensor) -> Any:
        alone = self.parallel_mode is None or self.tp_size == 1
        if not alone:
            from megatron.core.tensor_parallel import mappings
        if not alone and self.parallel_mode == "column":
            gather = mappings.gather_from_sequence_parallel_region
            copy = mappings.copy_to_tensor_model_parallel_region
            inp = (gather if self.sequence_parallel else copy)(inp, group=self.tp_group)
        self._note(inp)
        out = F.linear(inp, FP8GlobalStateManager.operand(self.weight))
        if not alone and self.parallel_mode == "row":
            scatter = mappings.reduce_scatter_to_sequence_parallel_region
            reduce = mappings.reduce_from_tensor_model_parallel_region
            out = (scatter if self.sequence_parallel else reduce)(out, group=self.tp_group)
        if self.return_bias:
            return out, self.bias
        return out + self.bias if self.use_bias else out


@_like(f"{NAME}.pytorch.LayerNormLinear")
class LayerNormLinear(Linear):
    table = f"{NAME}.pytorch.LayerNormLinear"

    def __init__(
        self, in_features: int, out_features: int, eps: float, sequence_parallel: bool, tp_group: Any, tp_size: int,
        init_method: Any, bias: bool, normalization: str, return_bias: bool, params_dtype: torch.dtype,
        parallel_mode: str | None, **_: Any,
    ) -> None:  # fmt: skip
        assert normalization == "RMSNorm"
        Linear.__init__(
            self, in_features, out_features, sequence_parallel=sequence_parallel, tp_group=tp_group, tp_size=tp_size,
            init_method=init_method, bias=bias, return_bias=return_bias, params_dtype=params_dtype,
            parallel_mode=parallel_mode,
        )  # fmt: skip
        self.eps = eps
        self._register(self.table, ["layer_norm_weight"], params_dtype)
        nn.init.ones_(self.layer_norm_weight)
        self.layer_norm_weight.sequence_parallel = self.sequence_parallel

    def forward(self, inp: Tensor, is_first_microbatch: bool | None) -> Any:
        return self._multiply(F.rms_norm(inp, inp.shape[-1:], self.layer_norm_weight, self.eps))


@_like(f"{NAME}.pytorch.GroupedLinear")
class GroupedLinear(Base):
    table = f"{NAME}.pytorch.GroupedLinear"

    def __init__(
        self, num_gemms: int, in_features: int, out_features: int, tp_group: Any, tp_size: int, init_method: Any,
        bias: bool, return_bias: bool, params_dtype: torch.dtype, parallel_mode: str | None, **_: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        assert tp_size == 1, "Megatron leaves the communication of experts to its dispatchers"
        self.num_gemms, self.in_features, self.out_features = num_gemms, in_features, out_features
        self.use_bias, self.return_bias, self.save_original_input = bias, return_bias, False
        for i in range(num_gemms):
            self._register(self.table, ["weight{i}", *(["bias{i}"] if bias else [])], params_dtype, i=i)
            init_method(getattr(self, f"weight{i}"))
            Parameters.wrap(self, f"weight{i}")
            _mark(getattr(self, f"weight{i}"), 1 if parallel_mode == "row" else 0)
            if bias:
                nn.init.zeros_(getattr(self, f"bias{i}"))

    def forward(self, inp: Tensor, m_splits: list[int], is_first_microbatch: bool | None) -> Any:
        assert isinstance(m_splits, list) and len(m_splits) == self.num_gemms and sum(m_splits) == len(inp)
        self._note(inp)
        weights = [FP8GlobalStateManager.operand(getattr(self, f"weight{i}")) for i in range(self.num_gemms)]
        parts = [F.linear(rows, weight) for rows, weight in zip(inp.split(m_splits), weights, strict=True)]
        if not self.use_bias:
            return torch.cat(parts)
        biases = [getattr(self, f"bias{i}") for i in range(self.num_gemms)]
        if self.return_bias:
            return torch.cat(parts), biases
        return torch.cat([part + bias for part, bias in zip(parts, biases, strict=True)])


@_like(f"{NAME}.pytorch.RMSNorm")
class RMSNorm(Base):
    def __init__(
        self, hidden_size: int, eps: float, sequence_parallel: bool, params_dtype: torch.dtype, **_: Any
    ) -> None:
        super().__init__()
        assert TABLE[f"{NAME}.pytorch.ops.basic.rmsnorm.RMSNorm"]["parameters"].keys() == {"weight"}
        self.weight, self.eps = nn.Parameter(torch.ones(hidden_size, dtype=params_dtype)), eps
        self.weight.sequence_parallel = sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


@_like(f"{NAME}.pytorch.DotProductAttention")
class DotProductAttention(Base):
    def __init__(
        self, num_attention_heads: int, num_gqa_groups: int, tp_size: int, attn_mask_type: str, cp_comm_type: str,
        softmax_scale: float | None, cp_group: Any, **_: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        assert attn_mask_type == "causal" and num_attention_heads % num_gqa_groups == 0 and num_gqa_groups % tp_size == 0
        self.num_gqa_groups_per_partition, self.scale = num_gqa_groups // tp_size, softmax_scale
        self.cp_group, self.cp_comm_type = cp_group, cp_comm_type

    def forward(
        self, query_layer: Tensor, key_layer: Tensor, value_layer: Tensor, qkv_format: str, cu_seqlens_q: Tensor,
        max_seqlen_q: int, attn_mask_type: str, **_: Any,
    ) -> Tensor:  # fmt: skip
        assert qkv_format == "thd" and attn_mask_type == "padding_causal"
        assert key_layer.shape[-2] == self.num_gqa_groups_per_partition
        lengths = cu_seqlens_q.diff().tolist()
        assert cu_seqlens_q.dtype == torch.int32 and max(lengths) == max_seqlen_q and sum(lengths) == len(query_layer)
        out = []
        for q, k, v in zip(*(x.split(lengths) for x in (query_layer, key_layer, value_layer)), strict=True):
            heads = (x.transpose(0, 1)[None] for x in (q, k, F.pad(v, (0, k.shape[-1] - v.shape[-1]))))
            found = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True, scale=self.scale)
            out.append(found[0].transpose(0, 1)[..., : v.shape[-1]])
        return torch.cat(out).flatten(1)

    def set_context_parallel_group(self, cp_group: Any, **_: Any) -> None:
        self.cp_group = cp_group


class _Aligned(nn.Module):
    def __init__(self, num_gemms: int) -> None:
        super().__init__()
        self.num_gemms = num_gemms

    @staticmethod
    def _padded(sizes: list[int]) -> list[int]:
        return [-(-size // 16) * 16 for size in sizes]


@_like(f"{NAME}.pytorch.Fp8Padding")
class Fp8Padding(_Aligned):
    def __init__(self, num_gemms: int) -> None:
        _Aligned.__init__(self, num_gemms)

    def forward(self, inp: Tensor, m_splits: list[int]) -> tuple[Tensor, list[int]]:
        sizes = self._padded(m_splits)
        parts = zip(inp.split(m_splits), sizes, strict=True)
        return torch.cat([F.pad(part, (0, 0, 0, size - len(part))) for part, size in parts]), sizes


@_like(f"{NAME}.pytorch.Fp8Unpadding")
class Fp8Unpadding(_Aligned):
    def __init__(self, num_gemms: int) -> None:
        _Aligned.__init__(self, num_gemms)

    def forward(self, inp: Tensor, m_splits: list[int]) -> Tensor:
        parts = zip(inp.split(self._padded(m_splits)), m_splits, strict=True)
        return torch.cat([part[:size] for part, size in parts])


class FP8GlobalStateManager:
    enabled = False
    quantizer: Quantizer | None = None

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return FP8GlobalStateManager.enabled

    @classmethod
    def operand(cls, weight: Tensor) -> Tensor:
        return te_quantised.operand(weight, cls.quantizer if cls.enabled else None)


def _autocast(enabled: bool, fp8_recipe: Any, **_: Any) -> Any:
    @contextlib.contextmanager
    def inside() -> Iterator[None]:
        state = FP8GlobalStateManager
        before, state.enabled, state.quantizer = (state.enabled, state.quantizer), enabled, Quantizer.of(fp8_recipe)
        try:
            yield
        finally:
            state.enabled, state.quantizer = before

    return inside()


class CudaRNGStatesTracker: ...


def _recipe(name: str) -> type:
    """A recipe that takes the release's fields, and drops of others what pydantic would."""
    entry = TABLE[f"{NAME}.common.recipe.{name}"]
    release = signature(entry["__init__"])
    dropped = DROPPED if entry["drops_unknown"] else set()

    def init(self: Any, **settings: Any) -> None:
        known = {key: value for key, value in settings.items() if key in release.parameters}
        assert settings.keys() - known.keys() <= dropped, f"{name} would drop {sorted(settings.keys() - known.keys())}"
        release.bind(self, **known)
        recipes.append({"name": name, "blocks": getattr(self, "fp8_quant_fwd_inp", None)} | known)

    return type(name, (), {"__init__": init} | dict.fromkeys(entry.get("attributes", ())))


def _function(name: str, function: Callable) -> Callable:
    return _bound(TABLE[name]["signature"], function)


def _absent(**_: Any) -> Any:
    raise NotImplementedError("no part of the stand-in")


def install(capability: int = 90) -> None:
    """Before Megatron-core is imported. `capability`: of the chip that is said to be there, for which FP8 it has."""
    said = {
        "is_fp8_available": (capability >= 89, "Device compute capability 8.9 or higher required for FP8 execution."),
        "is_fp8_block_scaling_available": (capability >= 90, "compute capability 9.0 or higher required."),
        "is_mxfp8_available": (
            capability >= 100, "Device compute capability 10.0 or higher required for MXFP8 execution."
        ),
    }  # fmt: skip
    pytorch = {
        "Linear": Linear, "LayerNormLinear": LayerNormLinear, "GroupedLinear": GroupedLinear, "RMSNorm": RMSNorm,
        "LayerNorm": RMSNorm, "DotProductAttention": DotProductAttention, "Fp8Padding": Fp8Padding,
        "Fp8Unpadding": Fp8Unpadding, "fp8_autocast": _function(f"{NAME}.pytorch.fp8_autocast", _autocast),
        "fp8_model_init": _function(f"{NAME}.pytorch.fp8_model_init", te_quantised.fp8_model_init),
    }  # fmt: skip
    for name, answer in said.items():
        pytorch[name] = _function(f"{NAME}.pytorch.{name}", lambda return_reason, a=answer: a if return_reason else a[0])
    names = TABLE[f"{NAME}.common.recipe.Format"]["attributes"]
    kinds = ("DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling")
    routing = ("fused_topk_with_score_function", "fused_compute_score_for_moe_aux_loss", "fused_moe_aux_loss")
    members: dict[str, dict[str, Any]] = {
        "": {"__version__": VERSION},
        ".common": {},
        ".common.recipe": {
            "Format": enum.Enum("Format", names),
            "QParams": type("QParams", (), {"__init__": _bound(TABLE[f"{NAME}.common.recipe.QParams"]["__init__"], _qparams)}),
            **{kind: _recipe(kind) for kind in kinds},
        },
        ".pytorch": pytorch,
        ".pytorch.ops": {"Sequential": nn.Sequential, "FusibleOperation": nn.Module},
        ".pytorch.fp8": {
            "FP8GlobalStateManager": FP8GlobalStateManager,
            "fp8_autocast": _function(f"{NAME}.pytorch.fp8.fp8_autocast", _autocast),
        },
        ".pytorch.distributed": {
            "CudaRNGStatesTracker": CudaRNGStatesTracker,
            "activation_recompute_forward": type("activation_recompute_forward", (), {}),
            "checkpoint": _function(f"{NAME}.pytorch.distributed.checkpoint", _absent),
        },
        ".pytorch.tensor": {
            name: _like(f"{NAME}.pytorch.tensor.{name}")(getattr(te_quantised, name))
            for name in ("QuantizedTensor", "Float8Tensor", "Float8BlockwiseQTensor")
        },
        ".pytorch.tensor.mxfp8_tensor": {"MXFP8Tensor": te_quantised.MXFP8Tensor},
        ".pytorch.tensor.utils": {
            name: _function(f"{NAME}.pytorch.tensor.utils.{name}", getattr(te_quantised, name))
            for name in ("replace_raw_data", "cast_master_weights_to_fp8", "post_all_gather_processing")
        },
        ".pytorch.router": {name: _function(f"{NAME}.pytorch.router.{name}", _absent) for name in routing},
    }
    te_quantised.cast_modules()
    for suffix, content in members.items():
        module = types.ModuleType(NAME + suffix)
        module.__path__ = []
        module.__spec__ = importlib.machinery.ModuleSpec(NAME + suffix, None, is_package=True)
        for name, value in content.items():
            if suffix:
                assert name in ("nn",) or f"{NAME}{suffix}.{name}" in TABLE, f"{NAME}{suffix}.{name} is not in the table"
            setattr(module, name, value)
        sys.modules[NAME + suffix] = module
        parent, _, own = (NAME + suffix).rpartition(".")
        if parent:
            setattr(sys.modules[parent], own, module)


def _qparams(self: Any, power_2_scale: bool, **_: Any) -> None:
    self.power_2_scale = power_2_scale
