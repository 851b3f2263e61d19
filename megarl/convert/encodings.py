"""How numbers are stored other than as plain floats: what config.json's quantization_config says.

An `Encoding` makes several stored tensors look like one tensor of floats, read by ranges; `HFReader` asks it for every
tensor whose parts are all there. A further one is a class here and a line in `READERS`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from megarl.errors import BadInput
from megarl.models.fp8 import quantize

if TYPE_CHECKING:
    from megarl.convert.reader import HFReader

Index = tuple[slice, ...]
QUANTISED = "quantization_config"
E2M1 = [sign * number for sign in (1.0, -1.0) for number in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)]  # by code


class Encoding(Protocol):
    """Several stored tensors read as one tensor of floats. Names and shapes are those of the family's table."""

    def parts(self, name: str) -> tuple[str, ...]:
        """The stored tensors that hold `name`, when it is stored in this way."""

    def shape(self, reader: HFReader, name: str) -> tuple[int, ...]:
        """The shape of `name`. Raises BadInput when its parts do not fit together."""

    def decode(self, reader: HFReader, name: str, index: Index) -> Tensor:
        """`name[index]`, float32; reads only the ranges it needs (`reader.stored`)."""


@dataclass(frozen=True)
class Fp8Blocks:
    """e4m3 weights [N, K] with one float32 factor for each block, `NAME_scale_inv` [ceil(N / n), ceil(K / k)].

    The form of DeepSeek-V3's published checkpoint.
    """

    block: tuple[int, int] = (128, 128)  # n, k

    @classmethod
    def of(cls, settings: Mapping[str, Any], where: str) -> Fp8Blocks:
        block = settings.get("weight_block_size")
        good = isinstance(block, list) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)
        if not good or settings.get("fmt", "e4m3") != "e4m3":
            raise BadInput(
                f"{where}: {QUANTISED} has weight_block_size={block!r}, fmt={settings.get('fmt')!r}; of fp8, e4m3 in "
                "blocks such as [128, 128] is read: give the unquantised checkpoint"
            )
        return cls((block[0], block[1]))

    def parts(self, name: str) -> tuple[str, ...]:
        return name, f"{name}_scale_inv"

    def shape(self, reader: HFReader, name: str) -> tuple[int, ...]:
        weight, scale = (reader.tensors[part] for part in self.parts(name))
        if weight.dtype != "F8_E4M3" or scale.dtype != "F32" or scale.shape != self.scales(weight.shape):
            raise BadInput(
                f"{reader.folder / weight.file}: {name} is {weight.dtype} {list(weight.shape)} with factors "
                f"{scale.dtype} {list(scale.shape)}; blocks of {list(self.block)} need F8_E4M3 and "
                f"F32 {list(self.scales(weight.shape))}: download the checkpoint again"
            )
        return weight.shape

    def decode(self, reader: HFReader, name: str, index: Index) -> Tensor:
        weight, scale = self.parts(name)
        full = reader.tensors[weight].shape
        spans = [range(*s.indices(n)) for s, n in zip(index, full)]
        blocks = tuple(slice(span.start // n, (span.stop - 1) // n + 1) for span, n in zip(spans, self.block))
        factors = reader.stored(scale, blocks)
        for dim, (span, n) in enumerate(zip(spans, self.block)):
            factors = factors.index_select(dim, torch.arange(span.start, span.stop) // n - span.start // n)
        return reader.stored(weight, index).float().mul_(factors)

    def scales(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the factors of a weight."""
        return tuple(-(-size // n) for size, n in zip(shape, self.block))

    def encode(self, weight: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(first row, e4m3 rows, factors of their blocks) of [N, K], some blocks of rows at a time.

        Rounded as the learner's recipe `blockwise` rounds weights.
        """
        step = 8 * self.block[0]
        for first in range(0, weight.shape[0], step):
            codes, factors, _ = quantize(weight[first : first + step], self.block)
            yield first, codes, factors

    def config(self, kept: list[str]) -> dict[str, Any]:
        """`quantization_config` of an export; `kept`: the modules that keep plain floats."""
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": list(self.block),
            "modules_to_not_convert": kept,
        }


@dataclass(frozen=True)
class Mxfp4:
    """Experts [E, K, N] as 4 bit numbers in blocks of 32 along K with one power of two for each (OCP MX, e2m1 and e8m0).

    The form of gpt-oss's published checkpoints: `NAME_blocks` [E, N, K / 32, 16], two numbers a byte, the first in the
    low half, and `NAME_scales` [E, N, K / 32], exponents + 127.
    """

    @classmethod
    def of(cls, settings: Mapping[str, Any], where: str) -> Mxfp4:
        return cls()

    def parts(self, name: str) -> tuple[str, ...]:
        return f"{name}_blocks", f"{name}_scales"

    def shape(self, reader: HFReader, name: str) -> tuple[int, ...]:
        blocks, scales = (reader.tensors[part] for part in self.parts(name))
        fits = len(blocks.shape) == 4 and blocks.shape[3] == 16 and scales.shape == blocks.shape[:3]
        if not fits or blocks.dtype != "U8" or scales.dtype != "U8":
            raise BadInput(
                f"{reader.folder / blocks.file}: {name} has blocks {blocks.dtype} {list(blocks.shape)} and scales "
                f"{scales.dtype} {list(scales.shape)}; mxfp4 needs U8 [E, N, K / 32, 16] and U8 [E, N, K / 32]: download the "
                "checkpoint again"
            )
        experts, rows, count, _ = blocks.shape
        return experts, 32 * count, rows

    def decode(self, reader: HFReader, name: str, index: Index) -> Tensor:
        blocks, scales = self.parts(name)
        experts, columns, rows = index
        near = slice(columns.start // 32, (columns.stop - 1) // 32 + 1)
        codes = reader.stored(blocks, (experts, rows, near, slice(0, 16))).int()
        numbers = torch.tensor(E2M1).take(torch.stack([codes & 15, codes >> 4], dim=-1).long()).flatten(-2)
        exponents = reader.stored(scales, (experts, rows, near)).int() - 127
        numbers = torch.ldexp(numbers, exponents[..., None]).flatten(-2)
        first = columns.start - 32 * near.start
        return numbers[..., first : first + columns.stop - columns.start].transpose(1, 2)


READERS = {"fp8": Fp8Blocks.of, "mxfp4": Mxfp4.of}


def encoding_of(config: Mapping[str, Any], where: str) -> Encoding | None:
    """How the weights beside a config.json are encoded; None: plain floats. Raises BadInput for what is not read."""
    settings = config.get(QUANTISED)
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, Mapping) else settings
    if method not in READERS:
        raise BadInput(
            f"{where}: {QUANTISED} has quant_method={method!r}; only {', '.join(READERS)} is read: give the "
            "unquantised checkpoint"
        )
    return READERS[method](settings, where)
