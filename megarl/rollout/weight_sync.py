"""Weight sync: learner -> engine, by a plan that is a value, and the check that every sync gets.

`SyncPlan` says what moves; `WeightSync` moves it and refuses a learner that is not the plan's; `check_sync` compares the
two engines' log-probs on fixed probe sequences and, when they are apart, names the tensor families that differ.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from megarl import platform
from megarl.config.schema import Parallel
from megarl.convert import stream_hf
from megarl.convert.load import matched
from megarl.convert.stacks import Readable, Stack
from megarl.errors import RunFailed
from megarl.models.spec import ModelSpec
from megarl.rollout.checksums import differing_tensors
from megarl.rollout.engine_weights import WeightGap, compare_weights
from megarl.rollout.exchange import Exchange, pieces_of
from megarl.rollout.fp8_weights import Coded
from megarl.rollout.sync_plan import LearnerLayout, Piece, SyncPlan, Traffic

if TYPE_CHECKING:
    from megarl.learner.host_parked import HostParked
    from megarl.parallel import Mesh
    from megarl.rollout.vllm_engine import VLLMEngine

COPIED = 64 << 20  # bytes, most that the speed of a plain copy is measured with
THRESHOLDS = {"float32": 1e-5, "bfloat16": 5e-2}  # mean log-prob gap, nats
# with an engine in FP8: where the two differ in a last bit, it may round to the neighbouring code of 8 bits
FP8_THRESHOLD = 5e-2


@dataclass(frozen=True)
class SyncReport:
    """What one sync moved on this rank, and how fast."""

    seconds: float
    traffic: Traffic
    copy_speed: float  # bytes a second that a plain copy moves here, all ranks copying at once

    @property
    def speed(self) -> float:
        """Bytes a second that this rank's engine part was renewed with."""
        return self.traffic.written / self.seconds

    def describe(self, reload_reason: str | None = None) -> str:
        """One line for a log."""
        moved, least = self.traffic.received / 1e6, self.traffic.bound / 1e6
        how = f"; full tensors through vLLM's reload, because {reload_reason}" if reload_reason else ""
        return (
            f"weight sync: {self.traffic.written / 1e6:,.1f} MB a rank, {moved:,.1f} MB of it from other ranks (least "
            f"possible {least:,.1f}), {self.seconds:.3f} s = {self.speed / 1e9:.2f} GB/s, a plain copy "
            f"{self.copy_speed / 1e9:.1f} GB/s{how}"
        )


@dataclass(frozen=True)
class SyncGap:
    """Learner against engine on the probe sequences, over all ranks, in nats a token."""

    mean: float
    max: float
    median: float = 0.0


class WeightSync:
    """Brings the weights of a learner of this layout into these engines. Collective over the world, as is `run`.

    Full tensors go to an engine that can only be reloaded by vLLM's own machinery; `engine.reload_reason` says why.
    `weights`: where the learner's may be parked on the host; they are then read from there, a layer at a time.
    """

    def __init__(
        self, spec: ModelSpec, parallel: Parallel, mesh: Mesh, engine: VLLMEngine, weights: HostParked | None = None
    ) -> None:
        learner = LearnerLayout.of(parallel, mesh.world_size, spec.num_layers)
        whole = engine.reload_reason is not None  # vLLM wants an expert's tensors one after another
        portion = 0 if whole else platform.block_bytes()
        self.plan = SyncPlan(spec, engine.dtype, learner, engine.degrees, whole, portion, engine.fp8)
        self.mesh, self.engine, self.exchange = mesh, engine, Exchange(self.plan, mesh)
        self.weights = weights
        self.copy_speed = measure_copy(min(self.plan.largest_layer_bytes, COPIED))

    def run(self, chunks: list[nn.Module], policy_version: int) -> SyncReport:
        """Raises RunFailed when the learner's parameters are not the plan's or the engine refuses something."""
        start = time.perf_counter()
        tensors = self._tensors(chunks)
        # their places on the host change from sync to sync, and numbers of quantised ones are made anew in each
        if (self.weights is not None and self.weights.is_parked) or chunks[0].config.fp8_param:
            self.exchange.is_mappable = False
        self._check(tensors)
        held = self._readable(tensors)
        if self.plan.whole:
            self.engine.load_weights(self.plan.follow(self._full_tensors(held)), policy_version)
        else:
            self.engine.write_weights(self.exchange.blocks(held), policy_version)
        platform.synchronize()
        return SyncReport(time.perf_counter() - start, self.plan.traffic(self.mesh.rank), self.copy_speed)

    @property
    def window_bytes(self) -> tuple[int, int]:
        """(device, host) bytes that a sync's messages have for good."""
        return _placed(self.exchange.window_bytes)

    @property
    def buffer_bytes(self) -> tuple[int, int]:
        """(device, host) bytes that the last sync needed beside the weights, at most at one time."""
        return _placed(self.exchange.window_bytes + self.exchange.message_bytes)

    def held(self, chunks: list[nn.Module]) -> Mapping[str, Tensor | Stack]:
        """Megatron name -> this rank's parameter, to read, on the host where it is parked there; or what is sent of it."""
        return self._readable(self._tensors(chunks))

    def _tensors(self, chunks: list[nn.Module]) -> dict[str, Tensor | Stack]:
        return {name: tensor for name, (_, tensor) in matched(chunks, self.plan.spec).items()}

    def _readable(self, tensors: Mapping[str, Tensor | Stack]) -> Mapping[str, Tensor | Stack]:
        parameters = Readable(tensors, self.weights.view if self.weights is not None else torch.Tensor.detach)
        return parameters if self.plan.fp8 is None else Coded(parameters, self.plan, self.mesh.rank)

    def _check(self, held: Mapping[str, Tensor | Stack]) -> None:
        """Raises RunFailed for a parameter that this rank has and the plan does not give it, or the other way round."""
        planned = self.plan.held(self.mesh.rank)
        found = {name: tuple(held[name].shape) for name in held if name in planned or not self.plan.is_copy(name)}
        for name in [*planned, *found]:
            if planned.get(name) != found.get(name):
                raise RunFailed(
                    f"weight sync: {name} has the shape {found.get(name)} on rank {self.mesh.rank} of the learner, "
                    f"in the plan {planned.get(name)}"
                )

    def _full_tensors(self, held: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Every tensor whole, in order, from a plan of whole tensors."""
        for block, moved in zip(self.plan.blocks, self.exchange.blocks(held, ahead=False), strict=True):
            parts: dict[str, list[tuple[Piece, Tensor]]] = {}
            for piece, values in (item for pair in moved for item in pieces_of(*pair)):
                parts.setdefault(piece.entry.hf_name, []).append((piece, values))
            for name in (name for _, entries in block for name in entries):
                yield name, _joined(parts.pop(name))

    def stream(self, chunks: list[nn.Module]) -> Iterator[tuple[str, Tensor]]:
        """`stream_hf` of the learner, each tensor as the plan moves it."""
        dtypes = {entry.hf_name: getattr(torch, entry.dtype) for entry in self.plan.entries}
        with self.weights.on_device() if self.weights is not None else nullcontext():
            tensors = stream_hf(chunks, self.plan.spec, self.mesh)
            if self.plan.fp8 is not None:
                tensors = self.plan.fp8.stream(tensors)
            for name, tensor in tensors:
                yield name, tensor.to(dtypes[name])


def _placed(size: int) -> tuple[int, int]:
    return (0, size) if platform.name() == "cpu" else (size, 0)


def _joined(pieces: list[tuple[Piece, Tensor]]) -> Tensor:
    (first, values), dtype = pieces[0], getattr(torch, pieces[0][0].entry.dtype)
    if len(pieces) == 1:
        return values.to(dtype)
    out = torch.empty(first.entry.shape, dtype=dtype, device=values.device)
    for piece, values in pieces:
        out[piece.target] = values
    return out


def measure_copy(size: int) -> float:
    """Bytes a second of `size` bytes copied on this rank's device, the best of a few."""
    source = torch.ones(size, dtype=torch.uint8, device=platform.device())
    target, best = torch.zeros_like(source), math.inf
    for _ in range(4):
        platform.synchronize()
        start = time.perf_counter()
        target.copy_(source)
        platform.synchronize()
        best = min(best, time.perf_counter() - start)
    return size / best


def make_probes(vocab_size: int, count: int, length: int = 48, seed: int = 0) -> list[list[int]]:
    """`count` fixed sequences of uniformly random token ids: the same in every sync of a run."""
    draw = np.random.default_rng(seed)
    return draw.integers(0, vocab_size, (count, length)).tolist()


def default_threshold(*dtypes: str, fp8: bool = False) -> float:
    """Largest mean log-prob gap that rounding alone explains between a learner and an engine of these precisions.

    `fp8`: of an engine in FP8 and a learner that rounds as it does.
    """
    return max(FP8_THRESHOLD if fp8 else 0.0, *(THRESHOLDS[dtype] for dtype in dtypes))


def measure_gap(
    engine: VLLMEngine, probes: list[list[int]], learner_log_probs: list[np.ndarray], mesh: Mesh
) -> SyncGap:
    """|learner - engine| over the probes' tokens but the first, each number that of the worst rank. Collective.

    `learner_log_probs` are the learner's at temperature 1, one array of len(probe) each, entry 0 ignored.
    """
    scored = engine.score(probes)
    gaps = np.concatenate([np.abs(a[1:] - b[1:]) for a, b in zip(learner_log_probs, scored, strict=True)])
    ranks = mesh.all_gather_object((gaps.mean(), gaps.max(), np.median(gaps)))
    return SyncGap(*(float(np.max(column)) for column in zip(*ranks, strict=True)))


def check_sync(
    sync: WeightSync,
    chunks: list[nn.Module],
    probes: list[list[int]],
    learner_log_probs: list[np.ndarray],
    threshold: float,
) -> SyncGap:
    """Compare the engines' log-probs after a sync. Collective over the world.

    The learner's weights are looked at again only when the mean gap is above `threshold`, to find what differs. Raises
    RunFailed, on every rank with the same text.

    A mean above the threshold is accepted when every weight is equal and the median is below: then a few tokens sat on
    a tie between two experts, which rounding broke differently in the two engines.
    """
    check_prefix_cache(sync.engine, sync.mesh)
    gap = measure_gap(sync.engine, probes, learner_log_probs, sync.mesh)
    if gap.mean <= threshold:  # a nan is not
        return gap
    compared = compare_with_learner(sync.engine, sync.mesh, sync.stream(chunks))
    differing = [item for item in compared if item.differs]
    if not differing and gap.median <= threshold:
        return gap
    reason = f"; {sync.engine.reload_reason}" if sync.engine.reload_reason and not differing else ""
    raise RunFailed(
        f"weight sync: learner and engine log-probs differ by {gap.mean:.1e} on average (max {gap.max:.1e}, threshold "
        f"{threshold:.0e}, rollout.sync_threshold): {explain(differing)}{reason}"
    )


def check_prefix_cache(engine: VLLMEngine, mesh: Mesh) -> None:
    """Raises RunFailed, on every rank, when an engine could still answer from keys and values of earlier weights."""
    blocks = mesh.all_gather_object(engine.cached_blocks)
    if any(blocks):
        rank = next(rank for rank, count in enumerate(blocks) if count)
        raise RunFailed(
            f"weight sync: the prefix cache is stale, the engine of rank {rank} kept {blocks[rank]} blocks of earlier weights"
        )


def check_checksums(sync: WeightSync, chunks: list[nn.Module], most: int = 8) -> None:
    """Raises RunFailed, on every rank, naming the tensors whose checksums differ between learner and engine.

    Where vLLM's layers cannot be read, the comparison is that of what they compute.
    """
    if sync.plan.whole:
        compared = compare_with_learner(sync.engine, sync.mesh, sync.stream(chunks))
        found = [str(item) for item in compared if item.differs]
    else:
        found = differing_tensors(sync, chunks)
    if found:
        more = f", and {len(found) - most} more" if len(found) > most else ""
        raise RunFailed(f"weight sync: these tensors' checksums differ: {', '.join(found[:most])}{more}")


def compare_with_learner(engine: VLLMEngine, mesh: Mesh, stream: Iterable[tuple[str, Tensor]]) -> list[WeightGap]:
    """Every tensor family of every layer, engine against learner, the largest gap over all ranks. Collective."""
    ranks = mesh.all_gather_object(compare_weights(engine.model, engine.vllm_config, stream, engine.hosted_weight))
    worst: dict[tuple, WeightGap] = {}
    for item in (item for rank in ranks for item in rank):
        key = (item.layer, item.family)
        if key not in worst or (item.differs, item.gap) > (worst[key].differs, worst[key].gap):
            worst[key] = item
    return list(worst.values())


def explain(differing: list[WeightGap], most: int = 8) -> str:
    """One line for an error: the families that differ, by layer."""
    if not differing:
        return "all weights are equal, so the two compute differently (temperature, attention, rope or routing)"
    families: dict[str, list[WeightGap]] = {}
    for item in differing:
        families.setdefault(item.family, []).append(item)
    parts = [str(items[0]) if len(items) == 1 else _several(name, items) for name, items in families.items()]
    more = f", and {len(parts) - most} more families" if len(parts) > most else ""
    return "these tensors differ: " + ", ".join(parts[:most]) + more


def _several(name: str, items: list[WeightGap]) -> str:
    layers = [str(item.layer) for item in items]
    return f"{name} in layers {', '.join(layers[:6])}" + (f" and {len(layers) - 6} more" if len(layers) > 6 else "")
