"""Which part of every Hugging Face tensor a rank of a vLLM engine hosts: a pure function of model, degrees and rank.

vLLM cuts the query, gate and up projections by rows, the output and down projections by columns, the vocabulary in
blocks of `VOCAB_PADDING` rows, gives every rank whole key/value heads (copies where there are fewer heads than ranks) and
either whole experts or a part of every expert's width. Everything else is on every rank.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from megarl.convert import family
from megarl.models.spec import ModelSpec

Box = tuple[slice, ...]  # of a Hugging Face tensor: one start:stop a dimension

VOCAB_PADDING = 64
ROWS = {"q_proj", "q_b_proj", "kv_b_proj", "gate_proj", "up_proj", "w1", "w3"}
HEADS = {"k_proj", "v_proj"}
COLUMNS = {"o_proj", "down_proj", "w2"}
VOCAB = {"embed_tokens", "lm_head"}
EXPERT = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True)
class EngineDegrees:
    """How vLLM splits a model over the `tensor` x `data` consecutive ranks of an engine; engines repeat over the world.

    With `experts`, whole experts are dealt out over all ranks of an engine; otherwise the tensor-parallel ranks share
    every expert's width.
    """

    tensor: int = 1
    data: int = 1
    experts: bool = False

    @property
    def ranks(self) -> int:
        return self.tensor * self.data

    def hosted(self, spec: ModelSpec, rank: int) -> dict[str, Box]:
        """Hugging Face name -> what the world's `rank` hosts of it, in the order of a checkpoint."""
        out, experts = {}, self._experts(spec.num_experts, rank % self.ranks)
        for tensor in _tensors(spec):
            if tensor.expert is None or not self.experts:
                out[tensor.name] = self._box(tensor, spec, rank)
            elif tensor.expert in experts:
                out[tensor.name] = tensor.whole
        return out

    def _box(self, tensor: _Tensor, spec: ModelSpec, rank: int) -> Box:
        whole, leaf, kind = tensor.whole, tensor.leaf, tensor.kind
        size, index, tp = tuple(s.stop for s in whole), rank % self.tensor, self.tensor
        if leaf in COLUMNS and kind == "weight":
            return whole[:1] + (_part(size[1], tp, index),) + whole[2:]
        if leaf in VOCAB:
            padded = -(-size[0] // VOCAB_PADDING) * VOCAB_PADDING
            rows = _part(padded, tp, index)
            return (slice(min(rows.start, size[0]), min(rows.stop, size[0])), *whole[1:])
        if leaf in HEADS and tp > spec.num_kv_heads:
            return (_part(size[0], spec.num_kv_heads, index * spec.num_kv_heads // tp), *whole[1:])
        if leaf in ROWS | HEADS:
            return (_part(size[0], tp, index), *whole[1:])
        return whole

    def _experts(self, count: int, index: int) -> range:
        """Consecutive ones; the first ranks have one more when they do not divide."""
        each, more = divmod(count, self.ranks)
        start = index * each + min(index, more)
        return range(start, start + each + (index < more))


@dataclass(frozen=True)
class _Tensor:
    """A tensor of a checkpoint by the parts of its name."""

    name: str
    whole: Box
    expert: int | None
    leaf: str  # of which module: `q_proj`
    kind: str  # weight or bias


@functools.lru_cache(maxsize=2)  # every rank of an engine is asked for, and a large model has 45,000 tensors
def _tensors(spec: ModelSpec) -> tuple[_Tensor, ...]:
    out = []
    for name, size in family(spec.family).hf_shapes(spec).items():
        expert = EXPERT.search(name)
        path, _, kind = name.rpartition(".")
        number = int(expert[1]) if expert else None
        out.append(_Tensor(name, tuple(slice(0, n) for n in size), number, path.rpartition(".")[2], kind))
    return tuple(out)


def _part(size: int, parts: int, index: int) -> slice:
    return slice(size * index // parts, size * (index + 1) // parts)
