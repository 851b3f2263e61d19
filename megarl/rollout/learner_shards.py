"""Which rank of the learner holds which shard of every parameter: a pure function of degrees and rank."""

from __future__ import annotations

import functools
from bisect import bisect_left
from dataclasses import dataclass

from megarl.config.schema import Parallel
from megarl.convert.family import EMBEDDING, LAYER
from megarl.convert.rules import Shard


@dataclass(frozen=True)
class LearnerLayout:
    """Who holds which shard, in Megatron's rank order: tp fastest, then cp, ep, dp, pp; experts: etp, ep, dp, pp.

    `stages[layer]` is the pipeline stage of a layer. Example: the second of two expert-parallel ranks of a model of two
    layers is rank 1 of `LearnerLayout(world=2, ep=2, stages=(0, 0))`.
    """

    world: int
    tp: int = 1
    ep: int = 1
    etp: int = 1
    pp: int = 1
    stages: tuple[int, ...] = ()

    @classmethod
    def of(cls, parallel: Parallel, world: int, num_layers: int) -> LearnerLayout:
        """Raises ValueError when the layers do not divide over the stages."""
        p = parallel
        return cls(world, p.tp, p.ep, p.etp, p.pp, layer_stages(p, num_layers))

    def shard(self, rank: int) -> Shard:
        """What a rank holds of the parameters of its stage."""
        return Shard(self.tp, self.ep, self.etp, rank % self.tp, rank // self.etp % self.ep, rank % self.etp)

    def stage(self, megatron: str) -> int:
        """The stage that holds a parameter; of the output layer of tied embeddings, which has two, the first's counts."""
        if megatron.startswith(LAYER):
            return self.stages[int(megatron.removeprefix(LAYER).split(".", 1)[0])]
        return 0 if megatron == EMBEDDING else self.pp - 1

    def holders(self, stage: int, group: str, shard: Shard) -> range:
        """All ranks that hold the same numbers of a parameter of this group as `shard`."""
        size = self.world // self.pp
        offset, stride = {
            "": (0, 1),
            "tp": (shard.tp_rank, self.tp),
            "expert": (shard.ep_rank * self.etp + shard.etp_rank, self.ep * self.etp),
        }[group]
        return range(stage * size + offset, (stage + 1) * size, stride)

    def sender(self, stage: int, group: str, shard: Shard, receiver: int) -> int:
        """The holder that a rank gets a shard from: itself, or one of its own share of the others, near by number."""
        holders = self.holders(stage, group, shard)
        if receiver in holders:
            return receiver
        at = bisect_left(holders, receiver)
        return holders[(receiver - at) * len(holders) // (self.world - len(holders))]

    @functools.cache  # noqa: B019 - of one rank, as many entries as stages and groups
    def receivers(self, stage: int, group: str, shard: Shard, sender: int) -> tuple[int, ...]:
        """The other ranks that get a shard from `sender`, one of its holders."""
        others = (rank for rank in range(self.world) if rank != sender)
        return tuple(rank for rank in others if self.sender(stage, group, shard, rank) == sender)


def layer_stages(parallel: Parallel, num_layers: int) -> tuple[int, ...]:
    """The pipeline stage of every layer, as Megatron deals them out: virtual stage by virtual stage."""
    p, chunks = parallel, (parallel.vpp or 1)
    ends = {0: p.first_stage_layers, p.pp - 1: p.last_stage_layers} if p.pp > 1 else {}
    ends = {stage: count for stage, count in ends.items() if count is not None}
    extra = (p.embedding_in_split + p.loss_in_split) if p.pp > 1 else 0
    rest = num_layers + extra - sum(ends.values())
    even = rest // max(1, p.pp - len(ends))
    counts = [[ends.get(stage, even) // chunks for stage in range(p.pp)] for _ in range(chunks)]
    if extra:
        counts[0][0] -= p.embedding_in_split
        counts[-1][-1] -= p.loss_in_split
    out = tuple(stage for chunk in counts for stage, count in enumerate(chunk) for _ in range(count))
    if len(out) != num_layers:
        raise ValueError(f"{num_layers} layers do not divide over pp = {p.pp}, vpp = {p.vpp}")
    return out
