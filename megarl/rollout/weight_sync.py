"""Weight sync: learner -> engine, by a plan that is a value, and the check that every sync gets.

`SyncPlan` says what moves; `sync_weights` moves it and refuses a stream that is not the plan; `check_sync` compares the
two engines' log-probs on fixed probe sequences and, when they are apart, names the tensor families that differ.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from megarl.convert import family, stream_hf
from megarl.errors import RunFailed
from megarl.models.spec import ModelSpec
from megarl.rollout.engine_weights import WeightGap, compare_weights, family_of, layer_of

if TYPE_CHECKING:
    from megarl.parallel import Mesh
    from megarl.rollout.vllm_engine import VLLMEngine

THRESHOLDS = {"float32": 1e-5, "bfloat16": 5e-2}  # mean log-prob gap, nats


@dataclass(frozen=True)
class SyncEntry:
    """One tensor of a sync.

    Example: `SyncEntry("model.layers.0.mlp.experts.3.down_proj.weight", (128, 64), "float32",
    "decoder.layers.0.mlp.experts.weight2", 0, "experts.down_proj", "expert", 32768)`.
    """

    hf_name: str
    shape: tuple[int, ...]  # full, as the engine gets it
    dtype: str
    source: str  # the Megatron parameter, with the global layer number
    layer: int | None  # none: outside the layers
    family: str
    group: str  # the ranks that hold its parts: "tp", "expert" (ep x etp), or "" for every rank
    bytes: int


@dataclass(frozen=True)
class SyncPlan:
    """Everything one weight sync moves, in order; the same on every rank."""

    entries: tuple[SyncEntry, ...]

    @classmethod
    def build(cls, spec: ModelSpec, dtype: str) -> SyncPlan:
        """The plan of a model in `dtype`, read off its family's conversion table."""
        size = torch.empty(0, dtype=getattr(torch, dtype)).element_size()
        entries = [
            SyncEntry(
                name, shape, dtype, rule.megatron, layer_of(name), family_of(name), rule.group, math.prod(shape) * size
            )
            for block in family(spec.family).blocks(spec)
            for rule in block
            if rule.exported
            for name, shape in rule.hf_shapes(spec).items()
        ]
        return cls(tuple(entries))

    @property
    def bytes(self) -> int:
        """What every engine rank receives."""
        return sum(entry.bytes for entry in self.entries)

    @property
    def largest_layer_bytes(self) -> int:
        """The largest block held at once; a sync needs at most about two of these beside the weights."""
        layers: dict[int | None, int] = {}
        for entry in self.entries:
            layers[entry.layer] = layers.get(entry.layer, 0) + entry.bytes
        return max(layers.values())

    def stream(self, chunks: list[nn.Module], spec: ModelSpec, mesh: Mesh) -> Iterator[tuple[str, Tensor]]:
        """`stream_hf` of the learner, each tensor in the precision that the plan moves it in."""
        dtype = getattr(torch, self.entries[0].dtype)
        return ((name, tensor.to(dtype)) for name, tensor in stream_hf(chunks, spec, mesh))

    def follow(self, stream: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Pass the stream on while it is exactly this plan. Raises RunFailed naming the first tensor that is not."""
        expected = iter(self.entries)
        for name, tensor in stream:
            entry = next(expected, None)
            if entry is None or entry.hf_name != name:
                raise RunFailed(f"weight sync: the learner sent {name} where the plan has {_describe(entry)}")
            found = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
            if found != (entry.shape, entry.dtype):
                raise RunFailed(
                    f"weight sync: {_describe(entry)} came as {found}, the plan has {(entry.shape, entry.dtype)}"
                )
            yield name, tensor
        missing = next(expected, None)
        if missing is not None:
            raise RunFailed(f"weight sync: the learner's stream ended before {_describe(missing)}")


@dataclass(frozen=True)
class SyncReport:
    seconds: float
    bytes: int  # received by each engine rank


@dataclass(frozen=True)
class SyncGap:
    """Learner against engine on the probe sequences, over all ranks, in nats a token."""

    mean: float
    max: float
    median: float = 0.0


def sync_weights(
    plan: SyncPlan, chunks: list[nn.Module], spec: ModelSpec, mesh: Mesh, engine: VLLMEngine, policy_version: int
) -> SyncReport:
    """Stream the learner's weights into every engine. Collective over the world.

    Raises RunFailed when the stream is not the plan or the engine refuses it.
    """
    start = time.perf_counter()
    engine.load_weights(plan.follow(plan.stream(chunks, spec, mesh)), policy_version)
    return SyncReport(time.perf_counter() - start, plan.bytes)


def make_probes(vocab_size: int, count: int, length: int = 48, seed: int = 0) -> list[list[int]]:
    """`count` fixed sequences of uniformly random token ids: the same in every sync of a run."""
    draw = np.random.default_rng(seed)
    return draw.integers(0, vocab_size, (count, length)).tolist()


def default_threshold(*dtypes: str) -> float:
    """Largest mean log-prob gap that rounding alone explains between a learner and an engine of these precisions."""
    return max(THRESHOLDS[dtype] for dtype in dtypes)


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
    engine: VLLMEngine,
    probes: list[list[int]],
    learner_log_probs: list[np.ndarray],
    threshold: float,
    mesh: Mesh,
    stream: Callable[[], Iterator[tuple[str, Tensor]]],
) -> SyncGap:
    """Compare the engines' log-probs after a sync. Collective over the world.

    `stream()` yields the learner's weights again (`lambda: plan.stream(chunks, spec, mesh)`); it is used only when the
    mean gap is above `threshold`, to find what differs. Raises RunFailed, on every rank with the same text.

    A mean above the threshold is accepted when every weight is equal and the median is below: then a few tokens sat on
    a tie between two experts, which rounding broke differently in the two engines.
    """
    gap = measure_gap(engine, probes, learner_log_probs, mesh)
    if gap.mean <= threshold:  # a nan is not
        return gap
    differing = [item for item in compare_with_learner(engine, mesh, stream()) if item.differs]
    if not differing and gap.median <= threshold:
        return gap
    raise RunFailed(
        f"weight sync: learner and engine log-probs differ by {gap.mean:.1e} on average (max {gap.max:.1e}, threshold "
        f"{threshold:.0e}, rollout.sync_threshold): {explain(differing)}"
    )


def compare_with_learner(engine: VLLMEngine, mesh: Mesh, stream: Iterable[tuple[str, Tensor]]) -> list[WeightGap]:
    """Every tensor family of every layer, engine against learner, the largest gap over all ranks. Collective."""
    ranks = mesh.all_gather_object(compare_weights(engine.model, engine.vllm_config, stream))
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


def _describe(entry: SyncEntry | None) -> str:
    if entry is None:
        return "nothing more"
    where = "" if entry.layer is None else f", layer {entry.layer}"
    return f"{entry.hf_name} ({entry.family}{where})"
