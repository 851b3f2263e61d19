"""Parameters of the layers in the tables' names: norms inside linears, and experts that are a parameter each."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from megarl import platform
from megarl.convert.rules import Index, Region

# Transformer Engine's name in a layer -> the tables'
NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
LAYER_NAME = re.compile(r"(decoder\.layers\.\d+\.)(.+)")
KEPT_PARAMETERS = 8  # whose numbers `Readable` keeps, a layer's and some of the next one's
EXPERT = re.compile(r"(.*mlp\.experts\.)linear_fc([12])\.(weight|bias)(\d+)")


class Stack:
    """The weights or biases of a rank's experts, one tensor each, as the one tensor `[E/ep, ...]` of the tables.

    What it is indexed with for one expert is a view; for several, and of quantised weights, it is a copy.
    """

    def __init__(self, parts: list[Tensor], inner: tuple[int, ...]) -> None:
        """`inner`: the shape of one expert in the tables, of as many elements as each of `parts`."""
        self.parts, self.inner = parts, inner

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.parts), *self.inner))

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def numel(self) -> int:
        return self.shape.numel()

    def each(self, change: Callable[[Tensor], Tensor]) -> Stack:
        return Stack([change(part) for part in self.parts], self.inner)

    def zero_(self) -> None:
        for part in self.parts:
            part.zero_()

    def __getitem__(self, index: Index) -> Tensor:
        first, *rest = index
        if isinstance(first, int):
            return self._expert(first)[tuple(rest)]
        chosen = range(len(self.parts))[first]
        if len(chosen) == 1:
            return self._expert(chosen[0])[None][(slice(None), *rest)]
        return torch.stack([self._expert(number)[tuple(rest)] for number in chosen])

    def _expert(self, number: int) -> Tensor:
        return platform.plain(self.parts[number]).view(self.inner)

    def stretch(self, start: int, count: int) -> Tensor:
        """`count` elements from `start`, in order."""
        size, out = self.parts[0].numel(), []
        for number in range(start // size, -(-(start + count) // size)):
            first, last = max(start - number * size, 0), min(start + count - number * size, size)
            out.append(platform.plain(self.parts[number]).reshape(-1)[first:last])
        return out[0] if len(out) == 1 else torch.cat(out)


class Readable(Mapping[str, "Tensor | Stack"]):
    """Parameters by name, to read: of quantised ones the numbers that they stand for, made when asked for.

    Nobody changes the parameters meanwhile. `view`: where a parameter is now.
    """

    def __init__(self, held: Mapping[str, Tensor | Stack], view: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> None:
        self._held, self._view = held, view
        self._made: OrderedDict[str, Tensor | Stack] = OrderedDict()

    def __getitem__(self, name: str) -> Tensor | Stack:
        if name not in self._made:
            found = self._held[name]
            # a stack's, which are most of a layer, are made one by one where they are read
            made = found.each(self._view) if isinstance(found, Stack) else platform.plain(self._view(found))
            self._made[name] = made
            if len(self._made) > KEPT_PARAMETERS:
                self._made.popitem(last=False)
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)


def stretch(parameter: Tensor | Stack, start: int, count: int) -> Tensor:
    """`count` elements of a contiguous parameter from `start`, in order; a view where they lie in one tensor."""
    return parameter.stretch(start, count) if isinstance(parameter, Stack) else parameter.view(-1)[start : start + count]


def views(region: Region, parameter: Tensor | Stack) -> Iterator[tuple[Tensor, tuple[slice, ...]]]:
    """A region's numbers as views, in the order of the file, each with where it is in the Hugging Face tensor."""
    experts = region.local[0]
    if not isinstance(parameter, Stack) or isinstance(experts, int):
        yield region.of(parameter), region.hf
        return
    for expert in range(*experts.indices(len(parameter.parts))):
        at = region.hf[0].start + expert - experts.start
        local, hf = (slice(expert, expert + 1), *region.local[1:]), (slice(at, at + 1), *region.hf[1:])
        yield replace(region, local=local, hf=hf).of(parameter), hf


def in_table_names(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor | Stack]]:
    """The tensors of one module by the names of the tables, with global layer numbers, whichever provider made them."""
    experts: dict[str, list[Tensor]] = {}
    for name, tensor in tensors:
        layer, expert = LAYER_NAME.fullmatch(name), EXPERT.fullmatch(name)
        if expert is not None:
            prefix, number, kind, _place = expert.groups()  # a module gives its parameters in the order of the experts
            experts.setdefault(f"{prefix}{kind}{number}", []).append(tensor)
        else:
            yield (layer[1] + NORMS.get(layer[2], layer[2]) if layer is not None else name), tensor
    for name, parts in experts.items():
        shape = tuple(parts[0].shape)
        yield name, Stack(parts, (2, shape[0] // 2, *shape[1:]) if name.endswith("1") else shape)
