"""Writing slices of weights straight into the layers of a running vLLM model.

`reload_weights` wants full tensors on every rank, puts every layer back to what it was before loading, counts what each
of several hundred loaders copies and takes the layers together again. Where the layers are known it is clear beforehand
where each slice goes, so it goes there: into the parameter itself, or through the packing of the layer's kernel.

What is relied on is checked where a model is taken on (`take_on`), and a model with anything else is refused with a
reason, so that it is reloaded by vLLM's own machinery instead.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from megarl import platform
from megarl.platform import vllm_fp8

Box = tuple[slice, ...]
FACTORS = "weight_scale_inv"
CODED_LINEAR = {"weight", FACTORS}  # parameters in FP8
CODED_EXPERTS = {f"{name}_{part}" for name in ("w13", "w2") for part in CODED_LINEAR}
MATRICES = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}


class Layer(ABC):
    """What one module of vLLM hosts of some Hugging Face tensors."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.parts: dict[str, Any] = {}  # Hugging Face name -> which part of the layer it is

    @abstractmethod
    def shape(self, part: Any) -> tuple[int, ...]:
        """Of a part, as hosted on this rank."""

    @abstractmethod
    def write(self, part: Any, box: Box, values: Tensor) -> None:
        """Replace a box of a part, in any precision."""

    def finish(self) -> None:  # noqa: B027 - most layers have nothing to do
        """Compute with what was written; called when every part is complete."""

    def hidden_bytes(self) -> int:
        """Of packed weights that the kernel keeps outside of tensors: as many as the matrix has."""
        return 0

    @abstractmethod
    def read(self, part: Any) -> Tensor:
        """A part as the layer computes with it."""


class Plain(Layer):
    """A parameter that the kernels read as it is loaded: rows of `getattr(module, name)`."""

    def __init__(self, module: nn.Module, name: str = "weight", outputs: list[nn.Module] | None = None) -> None:
        super().__init__(module)
        self.name, self.outputs = name, outputs or []

    def _rows(self, part: slice) -> Tensor:
        return getattr(self.module, self.name).data[part]

    def shape(self, part: slice) -> tuple[int, ...]:
        return tuple(self._rows(part).shape)

    def write(self, part: slice, box: Box, values: Tensor) -> None:
        self._rows(part)[box].copy_(values)

    def finish(self) -> None:
        """`outputs` are the output layers with this weight: a CPU keeps a packed copy beside it."""
        for output in self.outputs:
            output.quant_method.process_weights_after_loading(output)

    def hidden_bytes(self) -> int:
        packed = [output for output in self.outputs if hasattr(output, "cpu_linear")]
        return len(packed) * getattr(self.module, self.name).nbytes

    def read(self, part: slice) -> Tensor:
        return self._rows(part)


class PackedLinear(Layer):
    """A linear layer of one or several projections that keeps a packed copy alone."""

    weight: Tensor | None = None

    def shape(self, part: slice) -> tuple[int, ...]:
        width = getattr(self.module, "input_size_per_partition", self.module.input_size)
        return (part.stop - part.start, width)

    def write(self, part: slice, box: Box, values: Tensor) -> None:
        if self.weight is None:
            rows = max(p.stop for p in self.parts.values())
            self.weight = torch.empty(rows, self.shape(part)[1], dtype=self.module.params_dtype)
        self.weight[part][box].copy_(values)

    def finish(self) -> None:
        self.module.weight = nn.Parameter(self.weight, requires_grad=False)
        self.weight = None
        self.module.quant_method.process_weights_after_loading(self.module)

    def hidden_bytes(self) -> int:
        if self.module.weight.numel():  # the packed copy is the parameter
            return 0
        return sum(math.prod(self.shape(part)) for part in self.parts.values()) * self.module.params_dtype.itemsize

    def read(self, part: slice) -> Tensor:
        width = self.shape(part)[1]
        identity = torch.eye(width, dtype=self.module.params_dtype)
        return self.module.quant_method.apply(self.module, identity)[:, part].T


class CodedLinear(Plain):
    """A linear layer in FP8: rows of its codes `weight` [N, K], or of their factors `weight_scale_inv` by block.

    A part is the name of one of them and its rows.
    """

    def _rows(self, part: tuple[str, slice]) -> Tensor:
        name, rows = part
        return getattr(self.module, name).data[rows]

    def finish(self) -> None:
        vllm_fp8.renew(self.module)


@dataclass(frozen=True)
class ExpertPart:
    """One matrix of the rank's expert number `index`."""

    index: int
    matrix: str  # gate, up or down
    factors: bool = False  # those of its FP8 blocks


class PlainExperts(Layer):
    """All experts of a layer on this rank, `w13_weight` [experts, gate above up, H] and `w2_weight` [experts, H, width]."""

    def _matrix(self, part: ExpertPart) -> Tensor:
        """Where the kernels read one matrix, padding included."""
        matrix = self._all(part)[part.index]
        return matrix if part.matrix == "down" else matrix.chunk(2)[part.matrix == "up"]

    def _all(self, part: ExpertPart) -> Tensor:
        """The parameter that a matrix is part of."""
        return (self.module.w2_weight if part.matrix == "down" else self.module.w13_weight).data

    def shape(self, part: ExpertPart) -> tuple[int, ...]:
        rows, width = self._matrix(part).shape
        ffn = self.module.moe_config.intermediate_size_per_partition
        return (rows, ffn) if part.matrix == "down" else (ffn, width)

    def write(self, part: ExpertPart, box: Box, values: Tensor) -> None:
        self._matrix(part)[box].copy_(values)

    def write_experts(self, first: ExpertPart, count: int, values: Tensor) -> None:
        """All matrices of consecutive experts, downs or each one's gate above its up, from `first` on."""
        out = self._all(first)[first.index : first.index + count]
        self._place(values.view(out.shape), out)

    def _place(self, values: Tensor, out: Tensor) -> None:
        out.copy_(values)

    def is_padded(self, part: ExpertPart) -> bool:
        return self.shape(part) != tuple(self._matrix(part).shape)

    def read(self, part: ExpertPart) -> Tensor:
        rows, width = self.shape(part)
        return self._matrix(part)[:rows, :width]


class CodedExperts(PlainExperts):
    """Experts in FP8: the codes where plain ones have their weights, and in `w13_weight_scale_inv` [experts, gate above up,
    K / 128] and `w2_weight_scale_inv` the factors of their blocks."""

    def _all(self, part: ExpertPart) -> Tensor:
        name = ("w2_weight" if part.matrix == "down" else "w13_weight") + "_scale_inv" * part.factors
        return getattr(self.module, name).data

    def shape(self, part: ExpertPart) -> tuple[int, ...]:
        return tuple(self._matrix(part).shape)

    def finish(self) -> None:
        vllm_fp8.renew(self.module)


class PackedExperts(PlainExperts):
    """Experts that a CPU kernel reads in blocks of rows, each matrix by itself; padded with zeros to whole blocks."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.open: dict[ExpertPart, tuple[Tensor, int]] = {}  # matrices that came in part: (values, elements missing)

    def write(self, part: ExpertPart, box: Box, values: Tensor) -> None:
        out = self._matrix(part)
        if values.shape == out.shape and values.dtype == out.dtype and values.is_contiguous():
            return self._place(values[None], out[None])
        matrix, missing = self.open.pop(part, (None, math.prod(self.shape(part))))
        matrix = torch.zeros_like(out) if matrix is None else matrix
        matrix[box].copy_(values)
        missing -= values.numel()
        if missing:
            self.open[part] = matrix, missing
        else:
            self._place(matrix[None], out[None])

    def _place(self, values: Tensor, out: Tensor) -> None:
        # columns of a wider matrix, read in place, are no matrix of the operator's kind
        pack(values.to(out.dtype).contiguous(), out, self.module.quant_method.moe_kernel.fused_experts.isa)

    def read(self, part: ExpertPart) -> Tensor:
        packed, (rows, width) = self._matrix(part), self.shape(part)
        order = _packed_order(tuple(packed.shape), packed.dtype, self.module.quant_method.moe_kernel.fused_experts.isa)
        out = torch.empty_like(packed)
        out.view(-1)[order] = packed.reshape(-1)
        return out[:rows, :width]


def pack(matrices: Tensor, out: Tensor, isa: str) -> None:
    """[experts, rows, width] in the order in which vLLM's CPU kernel reads them."""
    torch.ops._C.prepack_moe_weight(matrices, out, isa)


def _packed_order(shape: tuple[int, int], dtype: torch.dtype, isa: str) -> Tensor:
    """[elements] int64: which element of the matrix each packed one is. Found by packing numbers, 8 bits at a time."""
    numbers, order = torch.arange(math.prod(shape)), torch.zeros(math.prod(shape), dtype=torch.int64)
    bits = torch.int16 if dtype.itemsize == 2 else torch.int32
    for shift in range(0, max(1, int(numbers[-1]).bit_length()), 8):
        digits = (numbers >> shift & 255).to(bits).view(dtype).view(shape)
        out = torch.empty_like(digits)
        pack(digits[None], out[None], isa)
        order |= out.view(bits).reshape(-1).long() << shift
    return order


@dataclass(frozen=True)
class Stretch:
    """Where elements `start:end` of a flat tensor go: a box of one part, or with `experts` all of so many experts."""

    layer: Layer
    names: tuple[str, ...]
    start: int
    end: int
    part: Any
    box: Box
    shape: tuple[int, ...]
    experts: int = 0


class Direct:
    """The layers of one rank's vLLM model, and `hosted`: Hugging Face name -> the box of the full tensor it has there.

    `names`: all tensors of the checkpoint, those that other ranks host too.
    """

    def __init__(self, layers: list[Layer], hosted: dict[str, Box], names: frozenset[str]) -> None:
        self.layers, self.hosted, self.names = layers, hosted, names
        self.places = {name: layer for layer in layers for name in layer.parts}
        self.sizes = {name: math.prod(layer.shape(layer.parts[name])) for name, layer in self.places.items()}
        self._missing: dict[str, int] = {}  # elements, of the tensors of layers that were given some
        self._incomplete: dict[Layer, int] = {}  # tensors, of layers that were given some

    @contextlib.contextmanager
    def loading(self, everything: bool = False) -> Iterator[None]:
        """Around writes. Raises ValueError at the end when a layer was given only some of its elements.

        `everything`: and when a layer was given none.
        """
        self._missing.clear()
        self._incomplete.clear()
        with torch.no_grad():
            yield
        for name in self.places if everything else self._missing:
            missing = self._missing.get(name, "all")
            if missing:
                raise ValueError(f"the stream ended without {name}, of which {missing} elements are missing")

    def write(self, name: str, box: Box, values: Tensor) -> None:
        """Replace a box of what is hosted of a tensor. Raises ValueError for a tensor that is not."""
        layer = self._layer(name)
        layer.write(layer.parts[name], box, values)
        self._written(layer, name, values.numel())

    def write_stretches(self, stretches: list[Stretch], values: Tensor) -> None:
        """Replace what the `stretches` of these values say."""
        for one in stretches:
            here = values if len(stretches) == 1 else values[one.start : one.end]
            if one.experts:
                one.layer.write_experts(one.part, one.experts, here)
            else:
                one.layer.write(one.part, one.box, here.reshape(one.shape))
            for name in one.names:
                self._written(one.layer, name, (one.end - one.start) // len(one.names))

    def stretches(self, parts: list[tuple[str, Box, tuple[int, ...]]]) -> list[Stretch]:
        """How to write values that come one after another: (Hugging Face name, box of what is hosted, its shape) each.

        Raises ValueError for a tensor that is not hosted.
        """
        out: list[Stretch] = []
        at = index = 0
        while index < len(parts):
            name, box, shape = parts[index]
            layer, part = self._layer(name), self.places[name].parts[name]
            taken = self._whole_experts(layer, parts[index:])
            names = tuple(name for name, _, _ in parts[index : index + (taken or 1)])
            end = at + sum(math.prod(size) for _, _, size in parts[index : index + len(names)])
            experts = taken // (1 if taken and part.matrix == "down" else 2)
            out.append(Stretch(layer, names, at, end, part, box, shape, experts))
            at, index = end, index + len(names)
        return out

    def _whole_experts(self, layer: Layer, parts: list[tuple[str, Box, tuple[int, ...]]]) -> int:
        """How many of the first parts are all matrices of consecutive experts, as they lie in the layer; 0: none."""
        if not isinstance(layer, PlainExperts):
            return 0
        first, count = layer.parts[parts[0][0]], 0
        kinds = ("down",) if first.matrix == "down" else ("gate", "up")
        for number, (name, _, shape) in enumerate(parts):
            part = layer.parts.get(name)
            expected = replace(first, index=first.index + number // len(kinds), matrix=kinds[number % len(kinds)])
            if part != expected or shape != layer.shape(part) or layer.is_padded(part):
                break
            count = number + 1
        return count // len(kinds) * len(kinds)

    def _layer(self, name: str) -> Layer:
        if name not in self.places:
            raise ValueError(f"the engine's model has no {name}")
        return self.places[name]

    def _written(self, layer: Layer, name: str, count: int) -> None:
        if name not in self._missing:
            self._missing |= {other: self.sizes[other] for other in layer.parts}
            self._incomplete[layer] = len(layer.parts)
        self._missing[name] -= count
        if not self._missing[name]:
            self._incomplete[layer] -= 1
            if not self._incomplete[layer]:
                layer.finish()

    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Write full tensors; a layer that is given none keeps its weights.

        Raises ValueError for a name or a shape that the model does not have, and when a layer is given only some of its
        tensors.
        """
        with self.loading():
            for name, tensor in tensors:
                if name not in self.names:
                    raise ValueError(f"the engine's model has no {name}")
                box = self.hosted.get(name)
                if box is not None:
                    self.write(name, tuple(map(slice, _box_shape(box))), _cut(name, tensor, box))

    def hidden_bytes(self) -> int:
        return sum(layer.hidden_bytes() for layer in self.layers)

    def read(self, name: str) -> Tensor:
        """What this rank hosts of a tensor, as its layer computes with it."""
        layer = self.places[name]
        return layer.read(layer.parts[name])


def _cut(name: str, tensor: Tensor, box: Box) -> Tensor:
    out = tensor[box] if tensor.dim() == len(box) else tensor
    if tuple(out.shape) != _box_shape(box):
        raise ValueError(f"{name} is {tuple(tensor.shape)}, the engine's model takes another shape")
    return out


def take_on(model: nn.Module, hosted: dict[str, Box], names: frozenset[str]) -> Direct | str:
    """The layers of a model that hosts these boxes; or why it cannot be written into."""
    try:
        return _take_on(model, hosted, names)
    except (ImportError, AttributeError, RuntimeError, TypeError, ValueError) as error:  # of another version of vLLM
        return f"vLLM is not as it was expected to be: {type(error).__name__}: {str(error).splitlines()[0]}"


def _take_on(model: nn.Module, hosted: dict[str, Box], names: frozenset[str]) -> Direct | str:
    if hasattr(model, "process_weights_after_loading"):
        return f"{type(model).__name__} changes its weights after loading"
    layers: list[Layer] = []
    for path, module in model.named_modules():
        found = _layers(model, path, module, hosted)
        if isinstance(found, str):
            return f"{path} ({type(module).__name__}): {found}"
        layers += found
    direct = Direct([layer for layer in layers if layer.parts], hosted, names)
    shapes = {name: layer.shape(layer.parts[name]) for name, layer in direct.places.items()}
    planned = {name: _box_shape(box) for name, box in hosted.items()}
    for name in [*planned, *shapes]:
        if shapes.get(name) != planned.get(name):
            return f"{name} is {shapes.get(name, 'not there')} in vLLM, and in the plan {planned.get(name, 'not there')}"
    return direct


def _box_shape(box: Box) -> tuple[int, ...]:
    return tuple(s.stop - s.start for s in box)


def _layers(model: nn.Module, path: str, module: nn.Module, hosted: dict[str, Box]) -> list[Layer] | str:
    """A module's own layers; or what about it is unknown."""
    from vllm.model_executor.layers.attention.mla_attention import MLAAttention
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.layernorm import RMSNorm
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization.fp8 import Fp8LinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    if isinstance(module, RMSNorm):
        return [_with_parts(Plain(module), {f"{path}.weight": slice(None)})] if module.has_weight else []
    if isinstance(module, VocabParallelEmbedding):
        return _vocabulary(model, path, module)
    if isinstance(module, LinearBase):
        if type(module.quant_method) is Fp8LinearMethod:
            return vllm_fp8.unknown(module, CODED_LINEAR) or _linear(model, path, module, coded=True)
        known = type(module.quant_method) is UnquantizedLinearMethod
        return _linear(model, path, module) if known else f"its method is {type(module.quant_method).__name__}"
    if type(module) is nn.Linear:  # some routers
        own = [name for name, _ in module.named_parameters(recurse=False)]
        return [_with_parts(Plain(module, name), {f"{path}.{name}": slice(None)}) for name in own]
    if isinstance(module, RoutedExperts):
        return _experts(model, path, module, hosted)
    if isinstance(module, MLAAttention):
        return "it keeps products of weights"
    own = [name for name, _ in module.named_parameters(recurse=False)]
    return f"nothing is known of its {own[0]}" if own else []


def _with_parts(layer: Layer, parts: dict[str, Any]) -> Layer:
    layer.parts = parts
    return layer


def _vocabulary(model: nn.Module, path: str, module: nn.Module) -> list[Layer]:
    """The embedding, or the output layer; a tied output layer goes with the embedding."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    heads = [other for other in model.modules() if isinstance(other, ParallelLMHead)]
    tied = any(other is not module and other.weight is module.weight for other in heads)
    if module in heads and model.config.tie_word_embeddings:
        return []
    outputs = [head for head in heads if head is module or tied] if platform.name() == "cpu" else []
    rows = slice(module.num_org_embeddings_per_partition)
    return [_with_parts(Plain(module, outputs=outputs), {f"{path}.weight": rows})]


def _linear(model: nn.Module, path: str, module: nn.Module, coded: bool = False) -> list[Layer] | str:
    parent, _, leaf = path.rpartition(".")
    names = model.packed_modules_mapping.get(leaf, [leaf])
    sizes = getattr(module, "output_partition_sizes", [module.output_size])
    if len(names) != len(sizes):
        return f"it has {len(sizes)} parts, and names for {len(names)}"
    ends = list(itertools.accumulate(sizes))
    parts = {f"{parent}.{name}": slice(end - size, end) for name, size, end in zip(names, sizes, ends, strict=True)}
    if coded:
        blocks = {f"{name}.{FACTORS}": (FACTORS, vllm_fp8.blocks(part)) for name, part in parts.items()}
        codes = {f"{name}.weight": ("weight", part) for name, part in parts.items()}
        out: list[Layer] = [_with_parts(CodedLinear(module), codes | blocks)]
    else:
        weight = PackedLinear(module) if platform.name() == "cpu" else Plain(module)
        out = [_with_parts(weight, {f"{name}.weight": part for name, part in parts.items()})]
    for own, _ in module.named_parameters(recurse=False):
        if own == "bias":
            out.append(_with_parts(Plain(module, own), {f"{name}.bias": part for name, part in parts.items()}))
        elif own == "e_score_correction_bias":
            out.append(_with_parts(Plain(module, own), {f"{path}.{own}": slice(None)}))
        elif own != "weight" and not (coded and own == FACTORS):
            return f"nothing is known of its {own}"
    return out


def _experts(model: nn.Module, path: str, module: nn.Module, hosted: dict[str, Box]) -> list[Layer] | str:
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend

    kernel = getattr(module.quant_method, "moe_kernel", None)
    experts = getattr(kernel, "fused_experts", None)
    own = {name for name, _ in module.named_parameters(recurse=False)}
    bias = getattr(module, "e_score_correction_bias", None)
    if any(other is not module and getattr(other, "e_score_correction_bias", None) is bias for other in model.modules()):
        own.discard("e_score_correction_bias")  # the router's, which is written there
    coded = own == CODED_EXPERTS
    if not coded and own != {"w13_weight", "w2_weight"}:
        return f"its parameters are {', '.join(sorted(own))}"
    if coded:
        unknown = vllm_fp8.unknown(module, CODED_EXPERTS)
        if unknown:
            return unknown
        layer: Layer = CodedExperts(module)
    elif isinstance(experts, CPUUnquantizedExperts):
        if not packs_by_matrix(experts.isa, module.w2_weight.dtype):
            return f"the packing of its kernel ({experts.isa}) is not one of rows of a matrix"
        layer = PackedExperts(module)
    elif getattr(module.quant_method, "unquantized_backend", None) is UnquantizedMoeBackend.TRITON:
        layer = PlainExperts(module)
    else:
        return f"its kernel is {type(experts).__name__}"
    numbers = module.expert_map  # global -> local; None: all are here
    expert = re.compile(rf"^{re.escape(path.rpartition('.')[0])}\.(\d+)\.(\w+)\.(weight|{FACTORS})$")
    for match in filter(None, map(expert.match, hosted)):
        index = int(match[1]) if numbers is None else int(numbers[int(match[1])])
        if match[2] not in MATRICES or index < 0:
            return f"{match[0]} is in the plan and not in vLLM"
        layer.parts[match[0]] = ExpertPart(index, MATRICES[match[2]], match[3] == FACTORS)
    if len(layer.parts) != 3 * (1 + coded) * len(module.w2_weight):
        return f"the plan has {len(layer.parts)} matrices of its {len(module.w2_weight)} experts"
    return [layer]


@functools.cache
def packs_by_matrix(isa: str, dtype: torch.dtype) -> bool:
    """Whether packing only reorders a matrix, and gate and up packed apart are the two halves of both packed at once."""
    bits = torch.int16 if dtype.itemsize == 2 else torch.int32
    both = torch.arange(128 * 64, dtype=bits).view(dtype).view(128, 64)
    whole, halves = torch.empty_like(both), torch.empty_like(both)
    pack(both[None], whole[None], isa)
    for source, target in zip(both.chunk(2), halves.chunk(2), strict=True):
        pack(source[None], target[None], isa)
    found, numbers = whole.view(bits).flatten(), both.view(bits).flatten()
    return torch.equal(found, halves.view(bits).flatten()) and torch.equal(found.sort().values, numbers)
