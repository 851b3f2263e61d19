"""What the groups of a layout send in each phase of an RL step: counted from the collectives that the layers call.

Letters: T tokens of a row on one context-parallel rank, s = T / tp of them on one rank under sequence parallelism, H the
hidden size, k experts a token, b bytes of an activation. Which collective follows which product is Megatron-core 0.16.1's
sequence parallelism, token dispatchers and distributed optimizer, and this project's attention and output layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from megarl.config.schema import Config
from megarl.plan.shape import ACTIVATION_BYTES, ModelShape, Rows
from megarl.rollout.engine_shards import EngineDegrees
from megarl.rollout.fp8_weights import Fp8Weights
from megarl.rollout.learner_shards import LearnerLayout, layer_stages
from megarl.rollout.sync_plan import SyncPlan

if TYPE_CHECKING:
    from megarl.models.spec import ModelSpec

GRADIENT_BYTES = 4  # gradients are reduced in float32
WIRE = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2, "all-to-all": 1}


@dataclass(frozen=True)
class Volume:
    """What one rank moves in a group over a phase of one RL step.

    `payload`: bytes of the whole tensor that an all-gather makes, a reduce-scatter or all-reduce takes, of this rank's
    part of an all-to-all, or of what is sent. `stride` is the distance between neighbouring ranks of the group.
    Example: one all-gather of 1 MiB over two ranks is `Volume("update", "tp", "attention", "all-gather", 2, 1, 2**20, 1)`.
    """

    phase: str
    group: str  # tp, cp, ep, etp, pp, dp, edp
    what: str
    operation: str  # all-gather, reduce-scatter, all-reduce, all-to-all or send
    ranks: int
    stride: int
    payload: float
    calls: float

    @property
    def wire(self) -> float:
        """Bytes that leave the rank in a ring, or directly in an all-to-all: (n - 1) / n of the payload, twice if reduced."""
        if self.operation == "send":
            return self.payload
        return WIRE[self.operation] * self.payload * (self.ranks - 1) / self.ranks

    def times(self, count: float, phase: str = "") -> Volume:
        """`count` of these, in another phase if one is given."""
        return replace(self, payload=self.payload * count, calls=self.calls * count, phase=phase or self.phase)


@dataclass(frozen=True)
class Layout:
    """The learner's degrees on a world of ranks, in Megatron's order, with what a row and an activation are."""

    cfg: Config
    shape: ModelShape
    world: int
    rows: Rows

    @property
    def dp(self) -> int:
        p = self.cfg.parallel
        return self.world // (p.tp * p.cp * p.pp)

    @property
    def edp(self) -> int:
        """Ranks that hold the same experts."""
        p = self.cfg.parallel
        return self.world // (p.etp * p.ep * p.pp)

    @property
    def item(self) -> int:
        return ACTIVATION_BYTES[self.cfg.model.dtype]

    @property
    def tokens(self) -> float:
        """T."""
        return self.rows.tokens / self.cfg.parallel.cp

    def stage_layers(self, stage: int) -> list[int]:
        """The numbers of the layers of a pipeline stage."""
        stages = layer_stages(self.cfg.parallel, self.shape.spec.num_layers)
        return [layer for layer, found in enumerate(stages) if found == stage]

    def parameters(self, stage: int) -> tuple[float, float]:
        """(dense, expert) parameters of one rank of a stage; norms and routers count as cut over tp, which they are not."""
        p, layers = self.cfg.parallel, [self.shape.layers[i] for i in self.stage_layers(stage)]
        dense = float(sum(layer.attention + layer.dense for layer in layers))
        return dense / p.tp + self.ends(stage), sum(layer.experts for layer in layers) / (p.ep * p.etp)

    def ends(self, stage: int) -> float:
        """Of the dense ones, those of the embedding and of the head, which are never in FP8."""
        p = self.cfg.parallel
        found = (self.shape.embedding if stage == 0 else 0) + (self.shape.head if stage == p.pp - 1 else 0)
        return found / p.tp


def layout_of(cfg: Config, shape: ModelShape, world: int, rows: Rows) -> Layout:
    """The layout that the functions below count for. Raises ValueError when the layers do not divide over the stages."""
    return Layout(cfg, shape, world, rows)


def forward_volumes(layout: Layout, stage: int, phase: str = "old_log_probs") -> list[Volume]:
    """One forward pass over all rows of one optimizer step, on a rank of `stage`."""
    rows = layout.rows.micro_batches
    found = [*_layers(layout, stage), *_ends(layout, stage, backward=False), *_boundary(layout, stage, backward=False)]
    return total(v.times(rows, phase) for v in found)


def update_volumes(layout: Layout, stage: int) -> list[Volume]:
    """One optimizer step: forward, recomputed forward, backward, and what data-parallel ranks tell each other."""
    p, rows = layout.cfg.parallel, layout.rows.micro_batches
    forward = list(_layers(layout, stage))
    again = [v for v in forward if p.recompute == "full" or (p.recompute == "selective" and v.what in RECOMPUTED)]
    found = [*forward, *again, *_layers(layout, stage, backward=True)]
    found += [*_ends(layout, stage, backward=False), *_ends(layout, stage, backward=True)]
    found += [*_boundary(layout, stage, backward=False), *_boundary(layout, stage, backward=True)]
    if p.cp > 1 and stage == p.pp - 1:  # log-ratio, its mask and the advantage of each sequence, in float32
        found.append(Volume("update", "cp", "sequence ratio", "all-reduce", p.cp, p.tp, 12 * layout.rows.sequences, 1))
    return total([*(v.times(rows, "update") for v in found), *_data_parallel(layout, stage)])


def total(volumes: Iterable[Volume]) -> list[Volume]:
    """Those of the same kind added up; what has no other rank, or no byte, is left out."""
    out: dict[tuple, Volume] = {}
    for v in volumes:
        if v.ranks == 1 or not v.payload:
            continue
        key = (v.phase, v.group, v.what, v.operation, v.ranks, v.stride)
        old = out.get(key)
        out[key] = v if old is None else replace(old, payload=old.payload + v.payload, calls=old.calls + v.calls)
    return list(out.values())


RECOMPUTED = ("mlp", "dispatch", "combine", "shared experts", "counts")  # of `recompute: selective`


def _layers(layout: Layout, stage: int, backward: bool = False) -> Iterator[Volume]:
    """One row through the layers of a stage."""
    spec = layout.shape.spec
    for number in layout.stage_layers(stage):
        yield from _latent(layout, backward) if spec.kv_lora_rank else _attention(layout, backward)
        if number in spec.moe_layers:
            yield from _experts(layout, backward)
            if spec.shared_width:
                yield from _pair(layout, "shared experts", spec.hidden_size, backward)
        else:
            yield from _pair(layout, "mlp", spec.hidden_size, backward)


def _tp(layout: Layout, what: str, operation: str, payload: float) -> Volume:
    return Volume("", "tp", what, operation, layout.cfg.parallel.tp, 1, payload, 1)


def _column(layout: Layout, what: str, width: float, backward: bool) -> Iterator[Volume]:
    """A product cut by columns gathers its input, and in the backward pass again, beside the sum of its gradient."""
    size = layout.tokens * width * layout.item
    yield _tp(layout, what, "all-gather", size)
    if backward:
        yield _tp(layout, what, "reduce-scatter", size)


def _row(layout: Layout, what: str, width: float, backward: bool) -> Iterator[Volume]:
    """A product cut by rows sums its output, and gathers the output's gradient."""
    yield _tp(layout, what, "all-gather" if backward else "reduce-scatter", layout.tokens * width * layout.item)


def _pair(layout: Layout, what: str, width: float, backward: bool) -> Iterator[Volume]:
    yield from _column(layout, what, width, backward)
    yield from _row(layout, what, width, backward)


def _attention(layout: Layout, backward: bool) -> Iterator[Volume]:
    spec, p = layout.shape.spec, layout.cfg.parallel
    yield from _pair(layout, "attention", spec.hidden_size, backward)
    if p.tp > spec.num_kv_heads:  # every rank gathers all heads and takes its own
        width = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
        kind = "reduce-scatter" if backward else "all-gather"
        yield _tp(layout, "attention heads", kind, layout.tokens * width * layout.item)
    heads = max(1, spec.num_kv_heads // p.tp)
    yield from _keys(layout, 2 * heads * spec.head_dim, backward)


def _latent(layout: Layout, backward: bool) -> Iterator[Volume]:
    """Queries and keys come out of latents, which are narrower than the hidden state; the rotated key goes to all heads."""
    spec, p = layout.shape.spec, layout.cfg.parallel
    yield from _column(layout, "attention", spec.q_lora_rank or spec.hidden_size, backward)
    yield from _column(layout, "attention", spec.kv_lora_rank, backward)
    kind = "reduce-scatter" if backward else "all-gather"
    yield _tp(layout, "attention", kind, layout.tokens * spec.rope_head_dim * layout.item)
    yield from _row(layout, "attention", spec.hidden_size, backward)
    yield from _keys(layout, 2 * spec.num_heads // p.tp * spec.head_dim, backward)  # values are padded to keys


def _keys(layout: Layout, width: float, backward: bool) -> Iterator[Volume]:
    """Keys and values of the whole row."""
    p, kind = layout.cfg.parallel, "reduce-scatter" if backward else "all-gather"
    yield Volume("", "cp", "keys and values", kind, p.cp, p.tp, layout.rows.tokens * width * layout.item, 1)


def _experts(layout: Layout, backward: bool) -> Iterator[Volume]:
    """Tokens to their experts and back; in the backward pass their gradients, the same ways the other way round."""
    spec, p = layout.shape.spec, layout.cfg.parallel
    ranks = p.ep * p.etp
    if ranks == 1:
        return
    s, wide = layout.tokens / p.tp, spec.hidden_size * layout.item
    gate = 8 if layout.cfg.model.dtype == "float64" or layout.cfg.model.router_dtype == "float64" else 4
    if p.dispatcher == "allgather":
        both = ranks * s * (wide + spec.num_experts * gate)
        out, back = ("reduce-scatter", "all-gather") if backward else ("all-gather", "reduce-scatter")
        yield Volume("", "ep", "dispatch", out, ranks, 1, both, 2)
        yield Volume("", "ep", "combine", back, ranks, 1, ranks * s * wide, 1)
        if not backward:  # which token goes where, one byte each
            yield Volume("", "ep", "counts", "all-gather", ranks, 1, ranks * s * spec.num_experts, 1)
        return
    pairs = s * spec.top_k
    yield Volume("", "ep", "dispatch", "all-to-all", p.ep, p.etp, pairs * (wide + gate), 2)
    yield Volume("", "ep", "combine", "all-to-all", p.ep, p.etp, pairs * wide, 1)
    out, back = ("reduce-scatter", "all-gather") if backward else ("all-gather", "reduce-scatter")
    yield Volume("", "etp", "dispatch", out, p.etp, 1, p.etp * pairs * (wide + gate), 2)
    yield Volume("", "etp", "combine", back, p.etp, 1, p.etp * pairs * wide, 1)
    if not backward:  # tokens for each expert, int64
        yield Volume("", "ep", "counts", "all-gather", ranks, 1, 8 * spec.num_experts * ranks, 1)


def _ends(layout: Layout, stage: int, backward: bool) -> Iterator[Volume]:
    """Embedding and output layer; the latter's log-probs need four numbers of a token from every part of the vocabulary."""
    p, width = layout.cfg.parallel, layout.shape.spec.hidden_size
    size = layout.tokens * width * layout.item
    if stage == 0:
        yield _tp(layout, "embedding", "all-gather" if backward else "reduce-scatter", size)
    if stage == p.pp - 1:
        yield _tp(layout, "output layer", "reduce-scatter" if backward else "all-gather", size)
        if not backward:
            yield replace(_tp(layout, "log-probs", "all-reduce", 4 * 4 * layout.tokens), calls=2)


def _boundary(layout: Layout, stage: int, backward: bool) -> Iterator[Volume]:
    """What a stage sends to the next one, and the gradient that it sends back; virtual stages go around the ring."""
    p = layout.cfg.parallel
    chunks = p.vpp or 1
    sends = chunks - (stage == (0 if backward else p.pp - 1))
    size = layout.tokens / p.tp * layout.shape.spec.hidden_size * layout.item
    yield Volume("", "pp", "activations", "send", p.pp, layout.world // p.pp, sends * size, sends)


def _data_parallel(layout: Layout, stage: int) -> Iterator[Volume]:
    """Gradients are summed, and with the distributed optimizer parameters gathered, once an optimizer step."""
    p = layout.cfg.parallel
    dense, experts = layout.parameters(stage)
    model, ends = layout.cfg.model, layout.ends(stage)
    mxfp8 = model.fp8_params and model.fp8 == "mxfp8"  # gathered in bfloat16, together
    item = 1 if model.fp8_params and not mxfp8 else layout.item
    groups = [
        ("dp", dense, layout.dp * p.cp, p.tp, layout.item * ends + item * (dense - ends)),
        ("edp", experts, layout.edp, p.etp * p.ep, item * experts),
    ]
    for group, count, ranks, stride, gathered in groups:
        if p.distributed_optimizer and layout.cfg.model.dtype != "float64":
            yield Volume("update", group, "gradients", "reduce-scatter", ranks, stride, GRADIENT_BYTES * count, 1)
            yield Volume("update", group, "parameters", "all-gather", ranks, stride, gathered, 1)
        else:
            size = max(GRADIENT_BYTES, layout.item)
            yield Volume("update", group, "gradients", "all-reduce", ranks, stride, size * count, 1)
    if p.tp > 1:  # of weights that all tensor-parallel ranks have, which saw other tokens: norms and routers
        spec = layout.shape.spec
        own = sum(
            2 * spec.hidden_size + (spec.hidden_size * spec.num_experts if i in spec.moe_layers else 0)
            for i in layout.stage_layers(stage)
        )
        yield Volume("update", "tp", "shared gradients", "all-reduce", p.tp, 1, GRADIENT_BYTES * own, 1)


# -- weight sync and checkpoint ------------------------------------------------------------------------------------


def sync_plan(cfg: Config, spec: ModelSpec, world: int) -> SyncPlan:
    """The plan that a run of `cfg` executes on `world` ranks, but for the portions that it takes a block's experts in."""
    r = cfg.rollout
    learner = LearnerLayout.of(cfg.parallel, world, spec.num_layers)
    degrees = EngineDegrees(r.tensor_parallel, r.data_parallel, r.expert_parallel)
    fp8 = Fp8Weights.of(spec, cfg.model, r)
    return SyncPlan(spec, cfg.rollout_dtype, learner, degrees, whole=is_reloaded(spec), fp8=fp8)


def is_reloaded(spec: ModelSpec) -> bool:
    """Whether vLLM's layers of a family cannot be written into, so that every rank is given full tensors for its reload.

    Known without an engine: of latent attention vLLM keeps products of weights, and gpt-oss's experts are loaded stacked.
    On a GPU one more reason is an expert kernel that is not Triton's, which a run says at its first sync.
    """
    return bool(spec.kv_lora_rank) or spec.family == "gpt_oss"


@dataclass(frozen=True)
class SyncVolume:
    """Bytes of one rank in one weight sync."""

    local: float  # copied on the rank
    node: float  # received from other ranks of its node
    network: float  # received from other nodes
    bound: float  # the least it could receive


def sync_volume(plan: SyncPlan, rank: int, gpus_per_node: int) -> SyncVolume:
    """What a rank receives, by where it comes from."""
    found = {"local": 0, "node": 0, "network": 0}
    for sender, size in plan.received(rank).items():
        near = sender // gpus_per_node == rank // gpus_per_node
        found["local" if sender == rank else "node" if near else "network"] += size
    return SyncVolume(**found, bound=plan.traffic(rank).bound)


def checkpoint_bytes(layout: Layout) -> float:
    """Of one checkpoint, over all ranks: weights, and with Adam the moments and the float32 weights beside bfloat16 ones."""
    optimizer = layout.cfg.rl.optimizer.type if layout.cfg.rl is not None else "adam"
    main = 4 if layout.item < 4 else 0
    return layout.shape.parameters * (layout.item + main + (2 * 4 if optimizer == "adam" else 0))
