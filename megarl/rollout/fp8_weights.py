"""FP8 rollout: which weights of a model become blocks of e4m3 on the way to the engine, and where these lie on each side.

A block is 128 x 128 elements of a Hugging Face tensor: `NAME` becomes codes and `NAME_scale_inv` one float32 factor for each
block, as in the published DeepSeek-V3 checkpoint, which is what vLLM loads. The sender quantises its shard, so blocks must
not be cut between ranks, of the learner or of the engine. They are rounded as the learner's recipe `blockwise` rounds
weights; where the blocks of its parameters are the same (they are unless the width of a head is no multiple of 128), both
sides multiply with the same numbers, bit for bit.
"""

from __future__ import annotations

import functools
import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megarl import platform
from megarl.config.schema import Model, Rollout
from megarl.convert.encodings import Fp8Blocks
from megarl.convert.rules import Region
from megarl.convert.save import coded_tensors, plain_modules
from megarl.convert.stacks import Stack, stretch
from megarl.errors import BadInput
from megarl.models.fp8 import Quantised, quantize
from megarl.models.layers.fp8_layers import check_skipped
from megarl.models.spec import ModelSpec
from megarl.rollout.engine_shards import EXPERT, Box, EngineDegrees
from megarl.rollout.names import layer_of

if TYPE_CHECKING:
    from megarl.rollout.sync_plan import SyncPlan

BLOCK = 128
CODES, FACTORS = ":codes", ":factors"  # of a parameter's name: what a sync sends in place of it
AT_ONCE = 1 << 24  # elements quantised at once
KEPT_PARAMETERS = 8  # whose codes are kept, a layer's and some of the next one's


def factors_name(hf_name: str) -> str:
    """The tensor of a weight's factors."""
    return Fp8Blocks().parts(hf_name)[1]


def _blocks(box: Box) -> Box:
    return tuple(slice(s.start // BLOCK, -(-s.stop // BLOCK)) for s in box)


@dataclass(frozen=True)
class Fp8Weights:
    """The weights that an engine has in FP8: those of the layers' products, as of a learner in FP8.

    Plain stay embedding, output layer, norms, routers, biases, and all of the first and last layers that are kept.
    """

    spec: ModelSpec
    skip_first: int = 0
    skip_last: int = 0
    power_of_two: bool = False

    @classmethod
    def of(cls, spec: ModelSpec, model: Model, rollout: Rollout) -> Fp8Weights | None:
        """None when `rollout.fp8` asks for none. Raises BadInput for a model that vLLM has no FP8 layers for."""
        if rollout.fp8 == "none":
            return None
        check_skipped(model, spec, "rollout.fp8")
        if spec.family == "gpt_oss" or spec.kv_lora_rank:  # vLLM multiplies latent attention's weights with each other
            raise BadInput(f"rollout.fp8 = 'blockwise': not for {spec.family}; set rollout.fp8: none")
        return cls(spec, model.fp8_skip_first, model.fp8_skip_last, model.fp8_power_of_two)

    @property
    def layers(self) -> range:
        """The layers in FP8."""
        return range(self.skip_first, self.spec.num_layers - self.skip_last)

    @functools.cached_property
    def coded(self) -> frozenset[str]:
        """Hugging Face names."""
        return frozenset(name for name in coded_tensors(self.spec) if layer_of(name) in self.layers)

    def config(self) -> dict[str, Any]:
        """config.json's quantization_config, for vLLM."""
        return Fp8Blocks((BLOCK, BLOCK)).config(plain_modules(self.spec, self.coded, {}))

    def quantise(self, weight: Tensor) -> Quantised:
        """[N, K] in blocks. Some rows at a time, since the way there takes several times the memory of the codes."""
        rows = max(1, AT_ONCE // (BLOCK * weight.shape[1])) * BLOCK
        tile = BLOCK, BLOCK
        parts = [quantize(part, tile, power_of_two=self.power_of_two) for part in weight.split(rows)]
        if len(parts) == 1:
            return parts[0]
        return Quantised(torch.cat([part.codes for part in parts]), torch.cat([part.factors for part in parts]), tile)

    def with_factors(self, hosted: Mapping[str, Box]) -> dict[str, Box]:
        """What an engine rank hosts, with the factors of what is coded."""
        out = {}
        for name, box in hosted.items():
            out[name] = box
            if name in self.coded:
                out[factors_name(name)] = _blocks(box)
        return out

    def stream(self, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Full tensors, in their precision, as vLLM loads them: codes and factors of those that are coded."""
        for name, tensor in tensors:
            if name in self.coded:
                codes, factors, _ = self.quantise(tensor)
                yield name, codes
                yield factors_name(name), factors
            else:
                yield name, tensor

    def check(self, degrees: EngineDegrees) -> None:
        """Raises BadInput, naming what works, when an engine of these degrees would cut a block."""
        found = self._cut(degrees)
        if found is None:
            return
        divisors = (tp for tp in range(degrees.tensor - 1, 0, -1) if degrees.tensor % tp == 0)
        tp = next((tp for tp in divisors if self._cut(replace(degrees, tensor=tp)) is None), None)
        name, rows, columns = found
        instead = f"lower rollout.tensor_parallel to {tp}" if tp else "set rollout.fp8: none"
        if EXPERT.search(name) and tp and not degrees.experts:
            instead += " or set rollout.expert_parallel: true"
        raise BadInput(
            f"rollout.fp8 = 'blockwise': {name} is {rows} x {columns} on a rank of the engine, and blocks are {BLOCK} x "
            f"{BLOCK}; {instead}"
        )

    def _cut(self, degrees: EngineDegrees) -> tuple[str, int, int] | None:
        """A coded tensor that a rank hosts a part of that is not whole blocks, and the part's size."""
        for rank in range(degrees.ranks):
            for name, box in degrees.hosted(self.spec, rank).items():
                if name in self.coded and any(s.start % BLOCK or s.stop % BLOCK for s in box):
                    return name, *(s.stop - s.start for s in box)
        return None


@dataclass(frozen=True)
class BlockedParameter:
    """A parameter as one matrix [rows, K] whose blocks are those of its Hugging Face tensors.

    `order`: the ranges of rows of `parameter.flatten(0, -2)` that it is made of; none: it is that. `regions` are of its
    codes, then of its factors.
    """

    rows: int
    columns: int
    regions: list[Region]
    order: tuple[tuple[int, int], ...] | None = None

    @classmethod
    def of(cls, shape: tuple[int, ...], regions: list[Region]) -> BlockedParameter:
        """Raises BadInput when a rank of the learner holds a part of a block."""
        rows, columns = math.prod(shape[:-1]), shape[-1]
        places = [_rows(region, shape) for region in regions]
        order = None
        if any(start % BLOCK or stop % BLOCK for start, stop in places):
            regions, places, order = _by_tensor(regions, places)
        out: list[list[Region]] = [[], []]
        for region, (start, stop) in zip(regions, places, strict=True):
            if any(s.start % BLOCK or s.stop % BLOCK for s in region.hf) or start % BLOCK:
                size = " x ".join(str(s.stop - s.start) for s in region.hf)
                raise BadInput(
                    f"rollout.fp8 = 'blockwise': {region.hf_name} is {size} on a rank of the learner, and blocks are {BLOCK} x "
                    f"{BLOCK}; lower parallel.{'etp' if EXPERT.search(region.hf_name) else 'tp'}, or set rollout.fp8: none"
                )
            local = slice(start, stop), slice(0, columns)
            out[0].append(Region(region.hf_name, region.hf, local))
            out[1].append(Region(factors_name(region.hf_name), _blocks(region.hf), _blocks(local)))
        return cls(rows, columns, out[0] + out[1], order)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Of codes and of factors."""
        return {CODES: (self.rows, self.columns), FACTORS: (-(-self.rows // BLOCK), -(-self.columns // BLOCK))}

    def matrix(self, parameter: Tensor) -> Tensor:
        flat = parameter.flatten(0, -2)
        return flat if self.order is None else torch.cat([flat[start:stop] for start, stop in self.order])


def _rows(region: Region, shape: tuple[int, ...]) -> tuple[int, int]:
    """The rows of the flattened parameter that a region takes whole."""
    start, count = 0, 1
    for dim, size in enumerate(shape[:-1]):
        index = region.local[dim] if dim < len(region.local) else slice(0, size)
        low, high = (index, index + 1) if isinstance(index, int) else (index.start, index.stop)
        start, count = start * size + low, count * (high - low)
    return start, start + count


def _by_tensor(
    regions: list[Region], places: list[tuple[int, int]]
) -> tuple[list[Region], list[tuple[int, int]], tuple[tuple[int, int], ...]]:
    """The regions of each tensor as one, tensor after tensor; their rows then; and where these are in the parameter."""
    tensors: dict[str, list[tuple[Region, tuple[int, int]]]] = {}
    for region, place in zip(regions, places, strict=True):
        tensors.setdefault(region.hf_name, []).append((region, place))
    joined, rows, order, at = [], [], [], 0
    for parts in tensors.values():
        parts.sort(key=lambda part: part[0].hf[0].start)
        first, last = parts[0][0], parts[-1][0]
        joined.append(replace(first, hf=(slice(first.hf[0].start, last.hf[0].stop), *first.hf[1:])))
        count = sum(stop - start for _, (start, stop) in parts)
        rows.append((at, at + count))
        order += [place for _, place in parts]
        at += count
    return joined, rows, tuple(order)


class Coded(Mapping[str, Tensor]):
    """A rank's parameters by Megatron name, with the codes and factors of those that a plan codes, made when asked for."""

    def __init__(self, parameters: Mapping[str, Tensor | Stack], plan: SyncPlan, rank: int) -> None:
        self._parameters, self._plan, self._rank = parameters, plan, rank
        self._made: OrderedDict[str, Quantised] = OrderedDict()

    def __getitem__(self, name: str) -> Tensor:
        base, _, kind = name.partition(":")
        if not kind:
            return self._parameters[name]
        if base not in self._made:
            found = self._parameters[base]
            whole = stretch(found, 0, found.numel()).view(found.shape).to(platform.device())
            self._made[base] = self._plan.fp8.quantise(self._plan.blocked(base, self._rank).matrix(whole))
            if len(self._made) > KEPT_PARAMETERS:
                self._made.popitem(last=False)
        made = self._made[base]
        return made.codes if f":{kind}" == CODES else made.factors

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)
