"""Megatron -> Hugging Face: every rank gets every full tensor, a few MiB of parameters at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megarl import platform
from megarl.convert.families import family
from megarl.convert.load import matched
from megarl.convert.rules import Region, Rule, Shard
from megarl.convert.stacks import Readable
from megarl.errors import RunFailed
from megarl.models.spec import ModelSpec

BUCKET = 16 << 20  # bytes exchanged at once, more only for a tensor that is larger


@torch.no_grad()
def stream_hf(chunks: list[nn.Module], spec: ModelSpec, mesh) -> Iterator[tuple[str, Tensor]]:
    """Yields (Hugging Face name, full tensor) on every rank, in the same order, in the parameters' dtype and device.

    Collective: every rank must exhaust it. What the owning pipeline stage holds is broadcast over the pipeline group
    and gathered over the tensor or expert parallel ranks, so many tensors at a time as make `BUCKET` bytes: the extra
    memory is a few buckets, or three times the largest tensor. Tensors may be views of the model's parameters: copy
    what must outlive the next optimizer step.
    """
    yield from stream_tensors({name: tensor for name, (_, tensor) in matched(chunks, spec).items()}, spec, mesh)


@torch.no_grad()
def stream_gradients(chunks: list[nn.Module], spec: ModelSpec, mesh) -> Iterator[tuple[str, Tensor]]:
    """`stream_hf` of the main gradients: reduced over the data-parallel ranks, as the optimizer steps with them.

    Without the distributed optimizer, which leaves a rank with its part of the sum.
    """
    held = {name: tensor for name, (_, tensor) in matched(chunks, spec, gradients=True).items()}
    yield from stream_weights(Weights.of(held, buffers=False), spec, mesh)


def stream_tensors(held: dict[str, Tensor], spec: ModelSpec, mesh) -> Iterator[tuple[str, Tensor]]:
    """`stream_hf` of any tensors that are cut as the parameters are: by Megatron name with global layer numbers."""
    yield from stream_weights(Weights.of(held), spec, mesh)


# Who holds a parameter: pipeline rank, and dtype.
Owner = tuple[int, torch.dtype]


@dataclass(frozen=True)
class Weights:
    """What this rank holds of a model: the dtype of each parameter, and the numbers of some of them when asked for.

    `fetch` gets the Megatron names of a part of one block (layer) and gives those this rank holds; every rank calls it
    for the same parts in the same order, so it may be collective.
    """

    dtypes: Mapping[str, torch.dtype]
    fetch: Callable[[list[str]], Mapping[str, Tensor]]
    buffers: bool = True  # whether those are among them

    @classmethod
    def of(cls, held: Mapping[str, Tensor], buffers: bool = True) -> Weights:
        """Of tensors that are all in memory, quantised ones as the numbers they stand for."""
        return cls({name: tensor.dtype for name, tensor in held.items()}, lambda names: Readable(held), buffers)

    def owners(self, mesh) -> dict[str, Owner]:
        """Every parameter of the model. Collective."""
        inventory = {name: (mesh.pp_rank, dtype) for name, dtype in self.dtypes.items()}
        if mesh.pp == 1:
            return inventory
        everyone: list[dict[str, Owner] | None] = [None] * mesh.pp
        dist.all_gather_object(everyone, inventory, group=mesh.pp_group)
        return {name: owner for stage in reversed(everyone) for name, owner in stage.items()}


def hf_dtypes(weights: Weights, spec: ModelSpec, mesh) -> dict[str, torch.dtype]:
    """The dtype of every Hugging Face tensor of `stream_weights`, in its order. Collective."""
    owners = weights.owners(mesh)
    rules = [rule for block in family(spec.family).blocks(spec) for rule in block if rule.exported]
    return {name: _owner(rule, owners)[1] for rule in rules for name in rule.hf_shapes(spec)}


@torch.no_grad()
def stream_weights(
    weights: Weights, spec: ModelSpec, mesh, skip: Collection[str] = frozenset()
) -> Iterator[tuple[str, Tensor]]:
    """`stream_hf` of weights that may come a block at a time; blocks of which all tensors are in `skip` do not come.

    `skip` is the same on every rank.
    """
    owners, shard = weights.owners(mesh), Shard.of(mesh)
    for block in family(spec.family).blocks(spec):
        rules = [rule for rule in block if rule.exported and (weights.buffers or not rule.is_buffer)]
        if all(name in skip for rule in rules for name in rule.hf_shapes(spec)):
            continue
        for part in _parts(rules):
            held = weights.fetch([rule.megatron for rule in part])
            for bucket in _buckets(part, owners, spec, shard, mesh):
                yield from bucket.tensors(held, mesh)
            del held


def _parts(rules: list[Rule]) -> Iterator[list[Rule]]:
    """A block's rules in order: experts, most of a layer, one matrix at a time, what is between them together."""
    for _, found in groupby(rules, key=lambda rule: rule.megatron if rule.group == "expert" else ""):
        yield list(found)


def _owner(rule: Rule, owners: Mapping[str, Owner]) -> Owner:
    if rule.megatron not in owners:
        raise RunFailed(f"conversion: no pipeline stage holds {rule.megatron}")
    return owners[rule.megatron]


@dataclass
class _Piece:
    """One Hugging Face tensor: which regions of it each member of the group holds."""

    name: str
    size: tuple[int, ...]
    megatron: str
    regions: list[list[Region]]  # by member


@dataclass
class _Bucket:
    """Consecutive tensors that are exchanged at once: of one pipeline stage, group and dtype."""

    stage: int
    group: str
    dtype: torch.dtype
    mine: int  # this rank's place among the members
    pieces: list[_Piece] = field(default_factory=list)
    bytes: int = 0

    def tensors(self, held: Mapping[str, Tensor], mesh) -> Iterator[tuple[str, Tensor]]:
        """The full tensors. One that lies whole in one region is a view: of the parameter, or of what was received."""
        members = len(self.pieces[0].regions)
        if mesh.pp == 1 and members == 1:
            for piece in self.pieces:
                parts = [r.of(held[piece.megatron]).contiguous().view(_extent(r, piece.size)) for r in piece.regions[0]]
                yield piece.name, self._assemble(piece, [parts])
            return
        flat = self._share(held, [sum(self._numels(m)) for m in range(members)], mesh)
        parts = iter(flat.split([n for m in range(members) for n in self._numels(m)]))
        received = [
            [[next(parts).view(_extent(r, piece.size)) for r in piece.regions[m]] for piece in self.pieces]
            for m in range(members)
        ]
        for i, piece in enumerate(self.pieces):
            yield piece.name, self._assemble(piece, [received[m][i] for m in range(members)])

    def _numels(self, member: int) -> list[int]:
        return [math.prod(_extent(r, piece.size)) for piece in self.pieces for r in piece.regions[member]]

    def _share(self, held: Mapping[str, Tensor], sizes: list[int], mesh) -> Tensor:
        """What all members hold, one after the other, flat."""
        flat = torch.empty(sizes[self.mine], dtype=self.dtype, device=platform.device())
        if self.stage == mesh.pp_rank:
            at = 0
            for piece in self.pieces:
                for region in piece.regions[self.mine]:
                    part = region.of(held[piece.megatron])
                    flat[at : at + part.numel()].view(part.shape).copy_(part)
                    at += part.numel()
        if mesh.pp > 1 and len(flat):
            dist.broadcast(flat, src=dist.get_global_rank(mesh.pp_group, self.stage), group=mesh.pp_group)
        if self.group == "tp":
            return _gather(flat, sizes, mesh.tp_group)
        if self.group == "expert":
            rows = [sizes[e * mesh.etp : (e + 1) * mesh.etp] for e in range(mesh.ep)]
            flat = _gather(flat, rows[self.mine // mesh.etp], mesh.etp_group)
            return _gather(flat, [sum(row) for row in rows], mesh.ep_group)
        return flat

    def _assemble(self, piece: _Piece, parts: list[list[Tensor]]) -> Tensor:
        found = [(r, part) for regions, of in zip(piece.regions, parts) for r, part in zip(regions, of)]
        if len(found) == 1 and found[0][1].shape == piece.size:
            return found[0][1]
        full = torch.empty(piece.size, dtype=self.dtype, device=platform.device())
        for region, part in found:
            full[region.hf] = part
        return full


def _buckets(
    rules: list[Rule], owners: Mapping[str, Owner], spec: ModelSpec, shard: Shard, mesh
) -> Iterator[_Bucket]:
    bucket = None
    for rule in rules:
        stage, dtype = _owner(rule, owners)
        members = shard.members(rule.group)
        held: dict[str, list[list[Region]]] = {name: [[] for _ in members] for name in rule.hf_shapes(spec)}
        for m, member in enumerate(members):
            for region in rule.regions(spec, member):
                held[region.hf_name][m].append(region)
        for name, size in rule.hf_shapes(spec).items():
            count = math.prod(size) * dtype.itemsize
            kind = (stage, rule.group, dtype)
            if bucket and (kind != (bucket.stage, bucket.group, bucket.dtype) or bucket.bytes + count > BUCKET):
                yield bucket
                bucket = None
            bucket = bucket or _Bucket(*kind, members.index(shard) if len(members) > 1 else 0)
            bucket.pieces.append(_Piece(name, size, rule.megatron, held[name]))
            bucket.bytes += count
    if bucket:
        yield bucket


def _extent(region: Region, size: tuple[int, ...]) -> list[int]:
    return [len(range(*s.indices(n))) for s, n in zip(region.hf, size)]


def _gather(flat: Tensor, sizes: list[int], group) -> Tensor:
    """Every rank's numbers, one rank after the other; `sizes`: how many each has."""
    if len(sizes) == 1:
        return flat
    out = torch.empty(sum(sizes), dtype=flat.dtype, device=flat.device)
    if len(set(sizes)) == 1:
        dist.all_gather_into_tensor(out, flat, group=group)
        return out
    for rank, part in enumerate(out.split(sizes)):
        if sizes[rank]:
            if rank == dist.get_rank(group):
                part.copy_(flat)
            dist.broadcast(part, src=dist.get_global_rank(group, rank), group=group)
    return out
