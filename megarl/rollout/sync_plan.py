"""`SyncPlan`: which rank sends which slice of which tensor to whom in a weight sync. A value: no process, no tensor.

The learner's side are the conversion table's regions (slice of a Hugging Face tensor <-> slice of a parameter), the
engine's side is `EngineDegrees.hosted`; what moves is where the two meet. So a rank gets what it hosts and nothing else,
experts go straight to the ranks that host them, and what a rank has on its own shard does not travel.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from megarl.convert import family
from megarl.convert.family import OUTPUT
from megarl.convert.rules import Index, Region, Rule, Shard
from megarl.errors import RunFailed
from megarl.models.spec import ModelSpec
from megarl.rollout.engine_shards import EXPERT, Box, EngineDegrees
from megarl.rollout.fp8_weights import CODES, FACTORS, BlockedParameter, Fp8Weights, factors_name
from megarl.rollout.learner_shards import LearnerLayout
from megarl.rollout.names import family_of, layer_of

if TYPE_CHECKING:
    from torch import Tensor

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}


@dataclass(frozen=True)
class SyncEntry:
    """One Hugging Face tensor of a sync.

    Example: `SyncEntry("model.layers.0.mlp.experts.3.down_proj.weight", (128, 64), "float32",
    "decoder.layers.0.mlp.experts.weight2", 0, "experts.down_proj", "expert", 32768)`.
    """

    hf_name: str
    shape: tuple[int, ...]  # full
    dtype: str
    source: str  # the Megatron parameter, with the global layer number; of FP8, with what of it is sent behind a colon
    layer: int | None  # none: outside the layers
    family: str
    group: str  # the ranks that hold its parts: "tp", "expert" (ep x etp), or "" for every rank
    bytes: int

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Piece:
    """What one rank gives another of one tensor: `parameter[local]` goes to `hosted[target]`."""

    entry: SyncEntry
    local: Index  # in the sender's shard of `entry.source`
    box: Box  # in the full Hugging Face tensor
    target: Box  # in what the receiver hosts of it
    order: tuple[int, ...] | None = None  # of the dimensions of `parameter[local]`, which then may be more than the box's

    @functools.cached_property
    def shape(self) -> tuple[int, ...]:
        return tuple(s.stop - s.start for s in self.target)

    @functools.cached_property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.entry.item_bytes


Block = list[tuple[Rule, dict[str, SyncEntry]]]


def _halves(block: Block) -> tuple[Block, Block]:
    """A block in two, as equal as its parameters allow: of experts, the gates and ups come first and the downs then."""
    sizes = [sum(entry.bytes for entry in entries.values()) for _, entries in block]
    ends = list(itertools.accumulate(sizes, initial=0))
    cut = min(range(len(ends)), key=lambda i: abs(2 * ends[i] - ends[-1]))
    return block[:cut], block[cut:]


def _expert(hf_name: str) -> int:
    """The expert that a tensor is of; 0 for others."""
    match = EXPERT.search(hf_name)
    return int(match[1]) if match else 0


@dataclass(frozen=True)
class SyncPlan:
    """Everything one weight sync moves, in blocks (embedding, the halves of each layer, what follows).

    The same on every rank. Two blocks are held at once, so about a layer; less with a `portion`, the bytes above which the
    experts of a block are taken in portions.

    `whole`: every engine rank is given full tensors, for engines whose layers are not known well enough to be written
    into. `hosted(rank)` then is the whole checkpoint.

    `fp8`: the weights that move as codes and factors, two tensors each.
    """

    spec: ModelSpec
    dtype: str
    learner: LearnerLayout
    engine: EngineDegrees
    whole: bool = False
    portion: int = 0
    fp8: Fp8Weights | None = None

    @functools.cached_property
    def blocks(self) -> list[Block]:
        """The rules that are exported, each with its tensors, block by block."""
        blocks = [
            [(rule, {entry.hf_name: entry for entry in self._entries(rule)}) for rule in block if rule.exported]
            for block in family(self.spec.family).blocks(self.spec)
        ]
        return [part for block in blocks for half in _halves(block) for part in self._portions(half)]

    def _portions(self, block: Block) -> Iterator[Block]:
        """A block in portions of about `portion` bytes: in each, as many experts of every expert-parallel rank."""
        size = sum(entry.bytes for _, entries in block for entry in entries.values())
        each = max(1, self.spec.num_experts // self.learner.ep)
        count = min(each, -(-size // self.portion)) if self.portion else 1
        for number in range(count):
            parts = [
                (rule, {name: entry for name, entry in entries.items() if _expert(name) % each * count // each == number})
                for rule, entries in block
            ]
            if any(entries for _, entries in parts):
                yield [(rule, entries) for rule, entries in parts if entries]

    def _entries(self, rule: Rule) -> Iterator[SyncEntry]:
        coded = rule.megatron in self._coded
        for name, size in rule.hf_shapes(self.spec).items():
            if coded:
                yield self._entry(rule, name, size, "float8_e4m3fn", CODES)
                factors = tuple(s.stop for s in self.fp8.with_factors({name: whole(size)})[factors_name(name)])
                yield self._entry(rule, factors_name(name), factors, "float32", FACTORS)
            else:
                yield self._entry(rule, name, size, rule.dtype or self.dtype)

    def _entry(self, rule: Rule, name: str, size: tuple[int, ...], dtype: str, kind: str = "") -> SyncEntry:
        where = (rule.megatron + kind, layer_of(name), family_of(name), rule.group)
        return SyncEntry(name, size, dtype, *where, math.prod(size) * ITEM_BYTES[dtype])

    @functools.cached_property
    def _coded(self) -> frozenset[str]:
        """The parameters that move as codes and factors."""
        names = self.fp8.coded if self.fp8 is not None else frozenset()
        rules = (rule for block in family(self.spec.family).blocks(self.spec) for rule in block if rule.exported)
        return frozenset(rule.megatron for rule in rules if not names.isdisjoint(rule.hf_shapes(self.spec)))

    @functools.cached_property
    def entries(self) -> tuple[SyncEntry, ...]:
        """Every tensor, in order."""
        return tuple(entry for block in self.blocks for _, entries in block for entry in entries.values())

    @functools.cache  # noqa: B019 - this rank, and those that it gets something from
    def held(self, rank: int) -> dict[str, tuple[int, ...]]:
        """The parameters that a rank has a shard of, and its shape."""
        shard, mine = self.learner.shard(rank), rank // (self.learner.world // self.learner.pp)
        rules = [rule for block in self.blocks for rule, _ in block if self.learner.stage(rule.megatron) == mine]
        return {rule.megatron: rule.local_shape(self.spec, shard) for rule in rules}

    @functools.cache  # noqa: B019 - as `held`
    def blocked(self, megatron: str, rank: int) -> BlockedParameter | None:
        """How a rank's shard of a parameter is cut into blocks; none for one that moves as it is."""
        return self._blocked(self._rules[megatron], self.learner.shard(rank)) if megatron in self._coded else None

    def regrouped(self, rank: int) -> list[str]:
        """The parameters of a rank whose blocks are not those that a learner in FP8 rounds them in."""
        blocked = {name: self.blocked(name, rank) for name in self.held(rank)}
        return [name for name, one in blocked.items() if one is not None and one.order is not None]

    @functools.cached_property
    def _rules(self) -> dict[str, Rule]:
        return {rule.megatron: rule for block in self.blocks for rule, _ in block}

    @functools.cache  # noqa: B019 - as many entries as there are shards
    def _blocked(self, rule: Rule, shard: Shard) -> BlockedParameter:
        shape = rule.local_shape(self.spec, shard)
        return BlockedParameter.of(shape, rule.regions(self.spec, shard))

    @functools.cache  # noqa: B019 - as `held`
    def _stored(self, rank: int) -> dict[str, tuple[int, ...]]:
        """`held`, and the codes and factors that a rank makes."""
        shapes = dict(self.held(rank))
        for megatron in self.held(rank):
            blocked = self.blocked(megatron, rank)
            if blocked is not None:
                shapes |= {megatron + kind: shape for kind, shape in blocked.shapes.items()}
        return shapes

    def is_copy(self, megatron: str) -> bool:
        """Whether a parameter repeats one that another rule moves: the last stage's output layer of tied embeddings."""
        return megatron == OUTPUT and self.spec.tie_embeddings

    @functools.cache  # noqa: B019 - one entry for each engine rank asked for
    def hosted(self, rank: int) -> dict[str, Box]:
        """What a rank is given of each tensor: Hugging Face name -> box."""
        if self.whole:
            return {entry.hf_name: whole(entry.shape) for entry in self.entries}
        return self._class_hosted(rank % self.engine.ranks)

    @functools.cache  # noqa: B019 - the ranks of one engine
    def _class_hosted(self, index: int) -> dict[str, Box]:
        hosted = self.engine.hosted(self.spec, index)
        return hosted if self.fp8 is None else self.fp8.with_factors(hosted)

    def incoming(self, block: int, rank: int) -> dict[int, list[Piece]]:
        """What a rank is given in a block, by sender; its own pieces under its own number."""
        hosted, out = self.hosted(rank), {}
        for rule, entries in self.blocks[block]:
            stage = self.learner.stage(rule.megatron)
            for shard in self.learner.shard(rank).members(rule.group):
                pieces = list(self._pieces(rule, entries, shard, hosted))
                if pieces:
                    sender = self.learner.sender(stage, rule.group, shard, rank)
                    out.setdefault(sender, []).extend(pieces)
        return out

    def outgoing(self, block: int, rank: int) -> dict[int, list[Piece]]:
        """What a rank gives others in a block, by receiver, in the order in which the receiver's `incoming` lists it."""
        out: dict[int, list[Piece]] = {}
        shard = self.learner.shard(rank)
        for rule, entries in self.blocks[block]:
            stage = self.learner.stage(rule.megatron)
            if rank not in self.learner.holders(stage, rule.group, shard):
                continue
            for receiver in self.learner.receivers(stage, rule.group, shard, rank):
                pieces = list(self._pieces(rule, entries, shard, self.hosted(receiver)))
                if pieces:
                    out.setdefault(receiver, []).extend(pieces)
        return out

    @functools.cache  # noqa: B019 - asked for by each rank for itself
    def schedule(self, rank: int) -> list[Exchanged]:
        """What a rank sends and gets, block by block."""
        out = []
        for block in range(len(self.blocks)):
            incoming = {sender: self._runs(pieces, sender) for sender, pieces in self.incoming(block, rank).items()}
            outgoing = {other: self._runs(pieces, rank) for other, pieces in self.outgoing(block, rank).items()}
            out.append(Exchanged(incoming, outgoing))
        return out

    def _runs(self, pieces: list[Piece], sender: int) -> list[Run]:
        """The pieces in order; neighbours in the sender's parameter together."""
        shapes, runs = self._stored(sender), []
        for piece in pieces:
            start = None if piece.order else _start(shapes[piece.entry.source], piece.local)
            last = runs[-1] if runs else None
            if last is not None and start is not None and last.end == (piece.entry.source, piece.entry.dtype, start):
                last.pieces.append(piece)
            else:
                runs.append(Run([piece], start))
        return runs

    def _pieces(
        self, rule: Rule, entries: dict[str, SyncEntry], shard: Shard, hosted: dict[str, Box]
    ) -> Iterator[Piece]:
        for region in self._regions(rule, shard):
            box = hosted.get(region.hf_name) if region.hf_name in entries else None
            found = _meet(region, box) if box is not None else None
            if found is not None:
                yield Piece(entries[region.hf_name], *found)

    @functools.cached_property
    def _known(self) -> dict[tuple[str, Shard], list[Region]]:
        return {}

    def _regions(self, rule: Rule, shard: Shard) -> list[Region]:
        key = rule.megatron, shard
        if key not in self._known:
            coded = rule.megatron in self._coded
            self._known[key] = self._blocked(rule, shard).regions if coded else rule.regions(self.spec, shard)
        return self._known[key]

    @property
    def bytes(self) -> int:
        """Of all tensors once, in the precision that they move in."""
        return sum(entry.bytes for entry in self.entries)

    @property
    def largest_layer_bytes(self) -> int:
        """Of the embedding, a layer or the output layer; a sync needs at most two of these beside the weights."""
        layers: dict[Any, int] = {}
        for entry in self.entries:
            key = entry.family if entry.layer is None else entry.layer
            layers[key] = layers.get(key, 0) + entry.bytes
        return max(layers.values())

    def received(self, rank: int) -> dict[int, int]:
        """The bytes that a rank gets in a sync, by sender; its own under its own number."""
        out: dict[int, int] = {}
        for (stage, group, shard), size in self._totals(0 if self.whole else rank % self.engine.ranks).items():
            sender = self.learner.sender(stage, group, shard, rank)
            out[sender] = out.get(sender, 0) + size
        return out

    @functools.cache  # noqa: B019 - the ranks of one engine
    def _totals(self, index: int) -> Counter[tuple[int, str, Shard]]:
        """`shares` of all blocks together."""
        totals: Counter[tuple[int, str, Shard]] = Counter()
        for block in self.shares(index):
            totals.update(block)
        return totals

    @functools.cache  # noqa: B019 - the ranks of one engine
    def shares(self, index: int) -> list[dict[tuple[int, str, Shard], int]]:
        """The bytes that the `index`-th rank of an engine is given in each block, by the shard that has them.

        A shard is (stage, group, coordinates); who sends it depends on the receiver, how much does not.
        """
        out: list[dict[tuple[int, str, Shard], int]] = []
        learner, hosted = self.learner, self.hosted(index)
        for block in self.blocks:
            out.append({})
            for rule, entries in block:
                for shard in Shard(learner.tp, learner.ep, learner.etp).members(rule.group):
                    size = message_bytes(self._pieces(rule, entries, shard, hosted))
                    if size:
                        key = learner.stage(rule.megatron), rule.group, shard
                        out[-1][key] = out[-1].get(key, 0) + size
        return out

    @functools.cache  # noqa: B019 - asked for by each rank for itself
    def traffic(self, rank: int) -> Traffic:
        """The bytes that a rank's engine part is made of, and where they come from."""
        found = self.received(rank)
        local = found.pop(rank, 0)
        received = sum(found.values())
        bound = replace(self, whole=False).traffic(rank).received if self.whole else received
        return Traffic(local, received, bound)

    def follow(self, stream: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Pass full tensors on while they are exactly this plan's. Raises RunFailed naming the first that is not."""
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
class Exchanged:
    """One rank's part in one block: pieces by sender (itself included) and by receiver."""

    incoming: dict[int, list[Run]]
    outgoing: dict[int, list[Run]]


@dataclass(eq=False)
class Run:
    """Pieces that lie one after another in the sender's parameter: one stretch of elements from `start` on.

    `start` is none for a piece that is no such stretch.
    """

    pieces: list[Piece]
    start: int | None

    @property
    def first(self) -> Piece:
        return self.pieces[0]

    @functools.cached_property
    def bytes(self) -> int:
        return message_bytes(self.pieces)

    @property
    def count(self) -> int:
        return self.bytes // self.first.entry.item_bytes

    @property
    def end(self) -> tuple[str, str, int | None]:
        """What a piece that goes on with this run has for source, precision and start."""
        size = sum(math.prod(piece.shape) for piece in self.pieces)
        return self.first.entry.source, self.first.entry.dtype, None if self.start is None else self.start + size


def whole(shape: tuple[int, ...]) -> Box:
    """All of a tensor."""
    return tuple(slice(0, n) for n in shape)


def message_bytes(pieces: Iterable[Piece | Run]) -> int:
    return sum(piece.bytes for piece in pieces)


def _start(shape: tuple[int, ...], index: Index) -> int | None:
    """The first element of a part of a contiguous tensor, if the part is one stretch of it."""
    bounds = [(i, i + 1) if isinstance(i, int) else (i.start, i.stop) for i in index]
    bounds += [(0, size) for size in shape[len(bounds) :]]
    start, whole = 0, True  # whole: everything behind this dimension is taken
    for size, (low, _) in zip(shape, bounds, strict=True):
        start = start * size + low
    for size, (low, high) in zip(reversed(shape), reversed(bounds), strict=True):
        if not whole and high - low > 1:
            return None
        whole = whole and (low, high) == (0, size)
    return start


@dataclass(frozen=True)
class Traffic:
    """Bytes of one rank in one sync."""

    local: int  # from the learner's shard on the same rank
    received: int  # from other ranks
    bound: int  # the least that it could receive: what its engine part has and its own learner shard has not

    @property
    def written(self) -> int:
        return self.local + self.received


def _meet(region: Region, box: Box) -> tuple[Index, Box, Box, tuple[int, ...] | None] | None:
    """(index in the parameter, box in the tensor, box in the hosted part, order) of what a region and a box share."""
    common = tuple(slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(region.hf, box, strict=True))
    if any(s.start >= s.stop for s in common):
        return None
    target = tuple(slice(c.start - b.start, c.stop - b.start) for c, b in zip(common, box, strict=True))
    if region.order is not None:  # its dimensions are not the tensor's: it is taken whole
        if common != region.hf:
            raise ValueError(f"{region.hf_name}: a part of a reordered region is asked for")
        return region.local, common, target, region.order
    shifts = iter(c.start - a.start for c, a in zip(common, region.hf, strict=True))
    sizes = iter(c.stop - c.start for c in common)
    local = tuple(_within(index, shifts, sizes) if isinstance(index, slice) else index for index in region.local)
    local += tuple(slice(shift, shift + size) for shift, size in zip(shifts, sizes))  # dimensions it takes whole
    return local, common, target, None


def _within(index: slice, shifts: Iterator[int], sizes: Iterator[int]) -> slice:
    start = (index.start or 0) + next(shifts)
    return slice(start, start + next(sizes))


def _describe(entry: SyncEntry | None) -> str:
    if entry is None:
        return "nothing more"
    where = "" if entry.layer is None else f", layer {entry.layer}"
    return f"{entry.hf_name} ({entry.family}{where})"
