"""Comparing the weights a vLLM engine computes with against the learner's, whatever layout vLLM packed them into.

Nothing reads vLLM's storage: a linear layer is fed the identity matrix and answers with its weight, and an expert is fed
a few inputs. So the comparison sees what the kernels see, also where the packed copy and the parameter have come apart.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from megarl.models.fp8 import Quantised, dequantize
from megarl.rollout.engine_shards import Box
from megarl.rollout.fp8_weights import BLOCK, factors_name
from megarl.rollout.names import family_of, layer_of

EXPERT = re.compile(
    r"^(?P<prefix>.*\.experts)\.(?P<index>\d+)\.(?P<matrix>gate_proj|up_proj|down_proj|w1|w2|w3)\.weight$"
)
MATRICES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}  # Mixtral's names
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
STACKED = {  # Hugging Face projection -> vLLM's merged layer, and which part of it
    "q_proj": ("qkv_proj", 0),
    "k_proj": ("qkv_proj", 1),
    "v_proj": ("qkv_proj", 2),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}
EXACT = 1e-6  # of the largest weight: multiplying by the identity does not round
EXPERT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # of the largest output
PROBES = 8  # inputs an expert is compared on


@dataclass(frozen=True)
class WeightGap:
    """How far one tensor family of one layer is apart, engine against learner.

    `gap` is the largest absolute difference: of weights, or for experts of outputs relative to the largest output.
    """

    family: str  # as `family_of` names it, or several joined by "/" when the engine's outputs do not tell them apart
    layer: int | None  # none: outside the layers
    gap: float
    differs: bool
    experts: tuple[int, ...] = ()  # the experts that differ
    compared: bool = True  # False: nothing is known of how the engine holds it

    def __str__(self) -> str:
        where = "" if self.layer is None else f" in layer {self.layer}"
        return f"{self.family}{where}" + (f" (experts {_few(self.experts)})" if self.experts else "")


@torch.inference_mode()
def compare_weights(
    model: nn.Module,
    vllm_config: Any,
    stream: Iterable[tuple[str, Tensor]],
    hosted: Callable[[str], tuple[Box, Tensor] | None] = lambda name: None,
) -> list[WeightGap]:
    """One `WeightGap` per layer and tensor family, in the order of the stream.

    `stream` yields the learner's (Hugging Face name, full tensor), a layer's tensors one after another. Collective over
    the engine's ranks. Extra memory: about one layer and the embedding.

    FP8 layers round what they are fed: their codes and factors are read, by `hosted(name)`, which gives the part of a
    tensor that this rank has and its values.
    """
    from vllm.forward_context import set_forward_context

    gaps, embedding, has_output = [], None, False
    with set_forward_context(None, vllm_config):
        for block in _blocks(stream):
            embedding = block.get(EMBEDDING, embedding)
            has_output = has_output or OUTPUT in block
            codes = {name: block.pop(name) for name in list(block) if block[name].dtype.itemsize == 1}
            if codes:
                factors = {name: block.pop(factors_name(name)) for name in codes}
                gaps += _compare_codes(hosted, codes, factors)
            experts = {name: tensor for name, tensor in block.items() if EXPERT.match(name)}
            gaps += [_compare(model, name, tensor) for name, tensor in block.items() if name not in experts]
            gaps += _compare_experts(model, vllm_config, experts) if experts else []
        if embedding is not None and not has_output:  # tied: the engine may hold a packed copy
            gaps.append(_compare(model, OUTPUT, embedding))
    return gaps


def _compare_codes(
    hosted: Callable[[str], tuple[Box, Tensor] | None], codes: dict[str, Tensor], factors: dict[str, Tensor]
) -> list[WeightGap]:
    """A layer's weights in FP8, by family, as the numbers that their codes stand for; bit for bit."""
    families: dict[str, WeightGap] = {}
    for name in codes:
        key, parts = family_of(name), (hosted(name), hosted(factors_name(name)))
        base = families.setdefault(key, WeightGap(key, layer_of(name), 0.0, False, compared=False))
        if None in parts:  # another rank's, or nothing is known of how the engine holds it
            continue
        (box, found), (blocks, scales) = parts
        expected = dequantize(Quantised(codes[name][box], factors[name][blocks], (BLOCK, BLOCK)))
        gap = (dequantize(Quantised(found, scales, (BLOCK, BLOCK))) - expected).abs().max().item()
        differs, expert = gap != 0, EXPERT.match(name)
        families[key] = replace(
            base,
            gap=max(base.gap, gap) if gap == gap else gap,
            differs=base.differs or differs,
            experts=base.experts + ((int(expert["index"]),) if expert and differs else ()),
            compared=True,
        )
    return list(families.values())


def _blocks(stream: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    block: dict[str, Tensor] = {}
    for name, tensor in stream:
        if block and layer_of(name) != layer_of(next(iter(block))):
            yield block
            block = {}
        block[name] = tensor.detach().clone()
    if block:
        yield block


def _compare(model: nn.Module, name: str, expected: Tensor) -> WeightGap:
    try:
        found = _read(model, name, expected)
    except AttributeError:  # the same on every rank of an engine
        return WeightGap(family_of(name), layer_of(name), 0.0, False, compared=False)
    gap = (found.float() - expected.to(found.dtype).float()).abs().max().item() if found is not None else 0.0
    limit = EXACT * expected.float().abs().max().item()
    return WeightGap(family_of(name), layer_of(name), gap, not gap <= limit)


def _read(model: nn.Module, name: str, expected: Tensor) -> Tensor | None:
    """The full tensor of a Hugging Face name; none on ranks of an engine that are not given the output layer's result.

    Raises AttributeError for one that vLLM's model has no known place for.
    """
    if name == OUTPUT:
        logits = model.compute_logits(_identity(expected))
        return None if logits is None else logits.T
    path, _, kind = name.rpartition(".")
    parent, _, leaf = path.rpartition(".")
    if leaf == "embed_tokens":
        return model.get_submodule(path)(torch.arange(expected.shape[0], device=expected.device))
    merged, part = STACKED.get(leaf, (leaf, None))
    if part is not None and any(child == merged for child, _ in model.get_submodule(parent).named_children()):
        return _column_part(model.get_submodule(f"{parent}.{merged}"), expected, part)
    if expected.dim() == 1:
        return getattr(model.get_submodule(path), kind)
    return _linear(model.get_submodule(path), expected)


def _identity(expected: Tensor) -> Tensor:
    return torch.eye(expected.shape[1], dtype=expected.dtype, device=expected.device)


def _linear(layer: nn.Module, expected: Tensor) -> Tensor:
    """[out, in] of a layer that is one projection, over the engine's ranks where it is split; without its bias."""
    from vllm.distributed import tensor_model_parallel_all_gather, tensor_model_parallel_all_reduce

    if type(layer) is nn.Linear:
        return layer.weight
    inputs = _identity(expected)
    width = getattr(layer, "input_size_per_partition", inputs.shape[1])
    if width == inputs.shape[1]:
        outputs = layer.quant_method.apply(layer, inputs)
        split = outputs.shape[1] < expected.shape[0]
        return (tensor_model_parallel_all_gather(outputs.contiguous()) if split else outputs).T
    inputs = inputs[:, layer.tp_rank * width : (layer.tp_rank + 1) * width].contiguous()
    return tensor_model_parallel_all_reduce(layer.quant_method.apply(layer, inputs)).T


def _column_part(layer: nn.Module, expected: Tensor, part: int) -> Tensor:
    """[out, in] of one projection inside a merged column-parallel layer, or its bias [out], over the engine's ranks."""
    from vllm.distributed import tensor_model_parallel_all_gather

    if expected.dim() == 1:
        weights = layer.bias[None].to(expected.dtype)
    else:
        weights = layer.quant_method.apply(layer, _identity(expected))
    outputs = weights.split(layer.output_partition_sizes, dim=-1)[part].contiguous()
    rows = tensor_model_parallel_all_gather(outputs).T if layer.tp_size > 1 else outputs.T
    if rows.shape[0] > expected.shape[0]:  # fewer key/value heads than ranks: neighbours hold copies
        copies = rows.shape[0] // expected.shape[0]
        rows = rows.reshape(-1, copies, outputs.shape[1], rows.shape[1])[:, 0].flatten(0, 1)
    return rows.reshape(expected.shape)


def _compare_experts(model: nn.Module, vllm_config: Any, expected: dict[str, Tensor]) -> list[WeightGap]:
    """All experts of one layer, by their outputs; where these differ, the matrices that explain it are named."""
    table: dict[int, dict[str, Tensor]] = {}
    for name, tensor in expected.items():
        match = EXPERT.match(name)
        table.setdefault(int(match["index"]), {})[MATRICES.get(match["matrix"], match["matrix"])] = tensor
    name = next(iter(expected))
    module = model.get_submodule(EXPERT.match(name)["prefix"]).routed_experts
    base = WeightGap("experts.gate_proj/up_proj/down_proj", layer_of(name), 0.0, False)
    largest, wrong = 0.0, {}
    for index, matrices in table.items():
        expert = _Expert(module, vllm_config, index, matrices)
        gap = expert.gap(PROBES)
        largest = max(largest, gap) if gap == gap else gap
        if not gap <= expert.tolerance:
            wrong.setdefault(expert.suspect(), []).append((index, gap))
    if not wrong:
        return [replace(base, gap=largest)]
    return [
        replace(base, family=family, gap=max(g for _, g in found), differs=True, experts=tuple(e for e, _ in found))
        for family, found in wrong.items()
    ]


class _Expert:
    """One expert, down(silu(gate x) * (up x)), as the engine computes it and as the learner's matrices say."""

    def __init__(self, module: nn.Module, vllm_config: Any, index: int, matrices: dict[str, Tensor]) -> None:
        self.module, self.vllm_config, self.index = module, vllm_config, index
        self.dtype = matrices["down_proj"].dtype
        self.gate, self.up, self.down = (matrices[k].double() for k in ("gate_proj", "up_proj", "down_proj"))
        self.tolerance = EXPERT_TOLERANCE[self.dtype]

    def inputs(self, count: int) -> Tensor:
        """[count, H]: random, scaled so that the gate's pre-activations are around 1."""
        generator = torch.Generator().manual_seed(self.index)
        x = torch.randn(count, self.gate.shape[1], generator=generator).to(self.gate.device)
        return (x / (x.double() @ self.gate.T).std().clamp(min=1e-6)).to(self.dtype)

    def outputs(self, x: Tensor) -> Tensor:
        """The engine's [count, H] float64, with all tokens routed to this expert alone."""
        from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce
        from vllm.forward_context import get_forward_context, set_forward_context

        ones = torch.ones(x.shape[0], 1, dtype=torch.float32, device=x.device)
        chosen = torch.full((x.shape[0], 1), self.index, dtype=torch.int32, device=x.device)
        routing = dict(topk_weights=ones, topk_ids=chosen, shared_experts=None, shared_experts_input=None)
        apply, config = self.module.quant_method.apply, self.module.moe_config
        if config.dp_size > 1:  # every rank hands in the same x, and gets its rows back complete
            with (
                set_forward_context(None, self.vllm_config, num_tokens=len(x) * config.sp_size),
                get_forward_context().dp_metadata.sp_local_sizes(config.sp_size),
            ):
                return apply(layer=self.module, x=x, **routing).double()
        out = apply(layer=self.module, x=x, **routing)
        return (tensor_model_parallel_all_reduce(out) if get_tensor_model_parallel_world_size() > 1 else out).double()

    def gap(self, count: int) -> float:
        x = self.inputs(count)
        a, b = x.double() @ self.gate.T, x.double() @ self.up.T
        return _relative(self.outputs(x), (torch.nn.functional.silu(a) * b) @ self.down.T)

    def suspect(self) -> str:
        """The family that alone explains the engine's outputs; all three when none does.

        With a = gate x and b = up x: f(x) + f(-x) = down(a b) and f(x) - f(-x) = down(a b tanh(a / 2)). If down is the
        learner's, its pseudo-inverse gives a and b; if gate and up are, a least-squares fit of down leaves no residual.
        """
        x = self.inputs(self.down.shape[1] + 4 * PROBES)
        a, b = x.double() @ self.gate.T, x.double() @ self.up.T
        plus, minus = self.outputs(x), self.outputs(-x)
        loose = 10 * self.tolerance
        hidden = torch.cat([torch.nn.functional.silu(a) * b, torch.nn.functional.silu(-a) * -b])
        outputs = torch.cat([plus, minus])
        if _relative(hidden @ torch.linalg.lstsq(hidden, outputs).solution, outputs) <= loose:
            return "experts.down_proj"
        inverse = torch.linalg.pinv(self.down).T
        product, odd = (plus + minus) @ inverse, (plus - minus) @ inverse
        if _relative(torch.cat([product, odd]) @ self.down.T, torch.cat([plus + minus, plus - minus])) > loose:
            return "experts.gate_proj/up_proj/down_proj"
        clear = (product.abs() > product.abs().median()) & (a.abs() > 0.1) & (b.abs() > 1e-3)
        if _close(odd / product, torch.tanh(a / 2), clear, loose):
            return "experts.up_proj"
        a_found = 2 * torch.atanh((odd / product).clamp(-1 + 1e-12, 1 - 1e-12))
        return "experts.gate_proj" if _close(product / a_found, b, clear, loose) else "experts.gate_proj/up_proj"


def _relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


def _close(found: Tensor, expected: Tensor, where: Tensor, tolerance: float) -> bool:
    """Whether the median relative error over the well-conditioned entries is small."""
    error = ((found - expected).abs() / expected.abs().clamp(min=1e-3))[where]
    return bool(error.numel() and error.median() <= tolerance)


def _few(items: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, items[:6]))
    return shown if len(items) <= 6 else f"{shown} and {len(items) - 6} more"
