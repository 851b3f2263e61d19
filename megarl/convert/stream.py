"""Megatron -> Hugging Face: every rank gets every full tensor, one block (layer) at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megarl.convert.families import family
from megarl.convert.load import matched
from megarl.convert.rules import Rule, Shard
from megarl.errors import RunFailed
from megarl.models.spec import ModelSpec


@torch.no_grad()
def stream_hf(chunks: list[nn.Module], spec: ModelSpec, mesh) -> Iterator[tuple[str, Tensor]]:
    """Yields (Hugging Face name, full tensor) on every rank, in the same order, in the parameters' dtype and device.

    Collective: every rank must exhaust it. Per block, what the owning pipeline stage holds is broadcast over the
    pipeline group and gathered over the tensor or expert parallel ranks, fused into one flat tensor for each kind, so
    that the extra memory is at most about two layers. Tensors may be views of the model's parameters: copy what must
    outlive the next optimizer step.
    """
    yield from stream_tensors({name: tensor for name, (_, tensor) in matched(chunks, spec).items()}, spec, mesh)


@torch.no_grad()
def stream_gradients(chunks: list[nn.Module], spec: ModelSpec, mesh) -> Iterator[tuple[str, Tensor]]:
    """`stream_hf` of the main gradients: reduced over the data-parallel ranks, as the optimizer steps with them.

    Without the distributed optimizer, which leaves a rank with its part of the sum.
    """
    held = {name: tensor for name, (_, tensor) in matched(chunks, spec, gradients=True).items()}
    yield from stream_tensors(held, spec, mesh)


@torch.no_grad()
def stream_tensors(held: dict[str, Tensor], spec: ModelSpec, mesh) -> Iterator[tuple[str, Tensor]]:
    """`stream_hf` of any tensors that are cut as the parameters are: by Megatron name with global layer numbers."""
    owners = _owners(held, mesh)
    shard = Shard.of(mesh)
    for block in family(spec.family).blocks(spec):
        rules = [rule for rule in block if rule.exported]
        shards = _collect(rules, held, owners, mesh)
        for rule in rules:
            yield from _assemble(rule, spec, shard.members(rule.group), shards[rule.megatron])
        del shards


# Who holds a parameter: pipeline rank, and the shape and dtype of one shard.
Owner = tuple[int, tuple[int, ...], torch.dtype]


def _owners(held: dict[str, Tensor], mesh) -> dict[str, Owner]:
    inventory = {name: (mesh.pp_rank, tuple(t.shape), t.dtype) for name, t in held.items()}
    if mesh.pp == 1:
        return inventory
    everyone: list[dict[str, Owner] | None] = [None] * mesh.pp
    dist.all_gather_object(everyone, inventory, group=mesh.pp_group)
    return {name: owner for stage in reversed(everyone) for name, owner in stage.items()}


def _collect(rules: list[Rule], held: dict[str, Tensor], owners: dict[str, Owner], mesh) -> dict[str, list[Tensor]]:
    """All shards of each rule's parameter, in the order of `Shard.members`."""
    fused: dict[tuple, list[str]] = defaultdict(list)
    for rule in rules:
        if rule.megatron not in owners:
            raise RunFailed(f"conversion: no pipeline stage holds {rule.megatron}")
        stage, _, dtype = owners[rule.megatron]
        fused[stage, rule.group, dtype].append(rule.megatron)
    out = {}
    for (stage, group, dtype), names in fused.items():
        shapes = [owners[name][1] for name in names]
        if mesh.pp == 1 and _group_size(group, mesh) == 1:
            out.update({name: [held[name]] for name in names})
            continue
        sizes = [torch.Size(size).numel() for size in shapes]
        flat = _flat([held[name] for name in names]) if stage == mesh.pp_rank else None
        device = next(iter(held.values())).device
        rows = _share(flat, stage, group, sum(sizes), dtype, device, mesh)
        columns = rows.split(sizes, dim=1)
        out.update({name: [row.view(size) for row in c] for name, size, c in zip(names, shapes, columns)})
    return out


def _group_size(group: str, mesh) -> int:
    return {"": 1, "tp": mesh.tp, "expert": mesh.ep * mesh.etp}[group]


def _flat(tensors: list[Tensor]) -> Tensor:
    return tensors[0].reshape(-1) if len(tensors) == 1 else torch.cat([t.reshape(-1) for t in tensors])


def _share(flat: Tensor | None, stage: int, group: str, n: int, dtype, device, mesh) -> Tensor:
    """[ranks of the group, n]: every rank's flat parameters of one pipeline stage, on all ranks."""
    if mesh.pp > 1:
        flat = torch.empty(n, dtype=dtype, device=device) if flat is None else flat.contiguous()
        dist.broadcast(flat, src=dist.get_global_rank(mesh.pp_group, stage), group=mesh.pp_group)
    if group == "tp":
        flat = _gather(flat, mesh.tp, mesh.tp_group)
    elif group == "expert":
        flat = _gather(_gather(flat, mesh.etp, mesh.etp_group), mesh.ep, mesh.ep_group)
    return flat.view(_group_size(group, mesh), n)


def _gather(flat: Tensor, size: int, group) -> Tensor:
    if size == 1:
        return flat
    out = torch.empty(size * flat.numel(), dtype=flat.dtype, device=flat.device)
    dist.all_gather_into_tensor(out, flat.contiguous(), group=group)
    return out


def _assemble(rule: Rule, spec: ModelSpec, members: list[Shard], shards: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The Hugging Face tensors of one rule; a tensor that lies whole in one shard is a view of it."""
    pieces: dict[str, list] = defaultdict(list)
    for member, tensor in zip(members, shards):
        for region in rule.regions(spec, member):
            pieces[region.hf_name].append((region.hf, tensor[region.local]))
    for name, size in rule.hf_shapes(spec).items():
        if len(pieces[name]) == 1:
            yield name, pieces[name][0][1]
            continue
        full = torch.empty(size, dtype=shards[0].dtype, device=shards[0].device)
        for index, piece in pieces[name]:
            full[index] = piece
        yield name, full
