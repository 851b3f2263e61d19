"""Which node is bad, from what every rank found out about itself (`megarl.cluster.node_check` collects it).

A slow pair of ranks accuses both nodes. A node is named when its best pair is slow, which that of a good node beside a bad
one is not. Two nodes have one pair between them, with nothing to compare it with but `Limits.gb_per_s`.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megarl.errors import BadInput

GIB = 2**30


@dataclass(frozen=True)
class Limits:
    """What a node must have; from MEGARL_CHECK_FREE, _SHARE, _GB_PER_S, _SKEW, _SECONDS."""

    free: float = 0.7  # least free share of a device's memory
    share: float = 0.25  # least bandwidth of a node's best pair, as a share of the median node's
    gb_per_s: float = 0.01  # least bandwidth of any node's best pair
    skew: float = 1.0  # seconds that a clock may be off the median
    seconds: float = 120.0  # for a rank to arrive

    @classmethod
    def from_environment(cls, **defaults: float) -> Limits:
        """Raises `BadInput` for what is not a number above 0."""
        found = dict(defaults)
        for name in cls.__dataclass_fields__:
            key = f"MEGARL_CHECK_{name.upper()}"
            text = os.environ.get(key)
            if text is not None:
                try:
                    found[name] = float(text)
                except ValueError:
                    found[name] = 0.0
                if not found[name] > 0:
                    raise BadInput(f"{key} = {text!r}: set a number above 0")
        return cls(**found)


@dataclass(frozen=True)
class Report:
    """Of one rank. Bytes of its device's memory; `bandwidth`: other rank -> GB/s; `clock`: seconds ahead of rank 0's."""

    rank: int
    node: str
    address: str
    devices: int | None  # on its node; none: any number of ranks share the host
    wanted: int  # ranks on its node
    free: int
    total: int
    clock: float
    bandwidth: dict[int, float]


def faults(reports: Sequence[Report], limits: Limits) -> list[str]:
    """One line for each thing that is wrong with a node, naming it."""
    return [*_devices(reports, limits), *_clocks(reports, limits), *_bandwidths(reports, limits)]


def _devices(reports: Sequence[Report], limits: Limits) -> Iterator[str]:
    for node, mine in _by_node(reports).items():
        if mine[0].devices is not None and mine[0].devices < mine[0].wanted:
            yield f"node {node}: {mine[0].devices} devices for {mine[0].wanted} ranks"
    for one in reports:
        if one.free < limits.free * one.total:
            yield (f"node {one.node}: rank {one.rank}'s device has {one.free / GIB:.1f} of "
                   f"{one.total / GIB:.1f} GiB free, below {limits.free:.0%}: something else runs there")  # fmt: skip


def _clocks(reports: Sequence[Report], limits: Limits) -> Iterator[str]:
    clocks = {node: statistics.median(one.clock for one in mine) for node, mine in _by_node(reports).items()}
    middle = statistics.median_low(clocks.values())
    for node, clock in clocks.items():
        if abs(clock - middle) > limits.skew:
            yield f"node {node}: its clock is {clock - middle:+.1f} s off the others'"


def _bandwidths(reports: Sequence[Report], limits: Limits) -> Iterator[str]:
    """Between nodes, and within one between its ranks: the best pair of each against the median one's."""
    nodes = {one.rank: one.node for one in reports}
    between: dict[str, float] = {}
    for one in reports:
        for other, speed in one.bandwidth.items():
            if nodes[other] != one.node:
                between[one.node] = max(between.get(one.node, 0.0), speed)
    yield from _slow({f"node {node}: to other nodes": speed for node, speed in between.items()}, limits)
    within = {
        f"node {one.node}: rank {one.rank} to its other ranks": max(
            speed for other, speed in one.bandwidth.items() if nodes[other] == one.node
        )
        for one in reports
        if any(nodes[other] == one.node for other in one.bandwidth)
    }
    yield from _slow(within, limits)


def _slow(speeds: dict[str, float], limits: Limits) -> Iterator[str]:
    if not speeds:
        return
    middle = statistics.median_high(speeds.values())
    for name, speed in speeds.items():
        if speed < max(limits.share * middle, limits.gb_per_s):
            yield f"{name} {speed:.3f} GB/s in an all-reduce; the median is {middle:.3f}, the least {limits.gb_per_s:g}"


def _by_node(reports: Sequence[Report]) -> dict[str, list[Report]]:
    found: dict[str, list[Report]] = {}
    for one in reports:
        found.setdefault(one.node, []).append(one)
    return found


def rounds(world: int, per_node: int) -> list[list[tuple[int, int]]]:
    """Pairs of ranks that are measured at the same time, round by round: each rank is in at most one pair of a round.

    Every rank has one pair with the next rank of its node, and the first rank of each node two with the next nodes.
    """
    inside = [(rank, rank + 1) for rank in range(world - 1) if rank // per_node == (rank + 1) // per_node]
    firsts = list(range(0, world, per_node))
    across = {tuple(sorted((one, firsts[(i + shift) % len(firsts)]))) for i, one in enumerate(firsts) for shift in (1, 2)}
    left = inside + sorted(pair for pair in across if pair[0] != pair[1])
    found = []
    while left:
        busy: set[int] = set()
        now = []
        for pair in left:
            if not busy & set(pair):
                now.append(pair)
                busy |= set(pair)
        left = [pair for pair in left if pair not in now]
        found.append(now)
    return found


def summary(reports: Sequence[Report]) -> str:
    """One line about nodes that are all well."""
    nodes = _by_node(reports)
    place = {one.rank: one.node for one in reports}
    speeds = [speed for one in reports for other, speed in one.bandwidth.items() if place[other] != one.node]
    clocks = [one.clock for one in reports]
    between = f", {min(speeds):.2f} GB/s at least between nodes" if speeds else ""
    return f"nodes: {len(nodes)} well, {len(reports)} ranks{between}, clocks within {max(clocks) - min(clocks):.3f} s"
