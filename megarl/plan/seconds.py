"""Seconds of each phase of an RL step from a stated roofline: operations, bytes of memory, bytes between ranks.

Every phase is the sum over what it runs of max(operations / reached FLOP/s, bytes / reached bandwidth), plus what ranks
send each other (nothing is hidden behind computing but what `Parallel` overlaps), plus idle time: the pipeline bubble,
the tail of the rollout, the engine's steps between kernels. What is left out: data, rewards, start-up.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field, replace

from megarl.config.schema import Config
from megarl.plan.hardware import Hardware
from megarl.plan.shape import ModelShape, Rows, Workload
from megarl.plan.volume import (
    Layout,
    Volume,
    checkpoint_bytes,
    forward_volumes,
    layout_of,
    sync_plan,
    sync_volume,
    update_volumes,
)

PHASES = ("rollout", "sync", "old_log_probs", "update", "checkpoint")


@dataclass(frozen=True)
class PhaseTime:
    """One phase of one RL step on the slowest rank. `compute` and `memory` are what exceeds the other; all add up."""

    compute: float = 0.0
    memory: float = 0.0
    communication: float = 0.0
    idle: float = 0.0
    detail: dict[str, float] = field(default_factory=dict)  # parts of the above by name, and counts

    @property
    def seconds(self) -> float:
        return self.compute + self.memory + self.communication + self.idle

    @property
    def bound(self) -> str:
        """What most of the time goes to."""
        return max(("compute", "memory", "communication", "idle"), key=lambda name: getattr(self, name))

    def __add__(self, other: PhaseTime) -> PhaseTime:
        names = [*self.detail, *(name for name in other.detail if name not in self.detail)]
        detail = {name: self.detail.get(name, 0.0) + other.detail.get(name, 0.0) for name in names}
        parts = {name: getattr(self, name) + getattr(other, name) for name in ("compute", "memory", "communication", "idle")}
        return PhaseTime(**parts, detail=detail)

    def times(self, count: float) -> PhaseTime:
        parts = {name: getattr(self, name) * count for name in ("compute", "memory", "communication", "idle")}
        return PhaseTime(**parts, detail={name: value * count for name, value in self.detail.items()})


def phase_seconds(
    cfg: Config,
    shape: ModelShape,
    hardware: Hardware,
    world: int,
    work: Workload | None = None,
    cache_tokens: float | None = None,
) -> dict[str, PhaseTime]:
    """Phase -> its time in one RL step of `cfg.rl` on `world` ranks; the checkpoint's is that of one checkpoint.

    `work`: what is sampled and trained on; none: as `Workload.of` takes it from the configuration. `cache_tokens`: that
    the key/value cache of a replica has room for; none: for all that `rollout.max_concurrent` lets run. Raises ValueError
    when the layers do not divide over the stages.
    """
    work = work or Workload.of(cfg)
    p = cfg.parallel
    dp = world // (p.tp * p.cp * p.pp)
    layout = layout_of(cfg, shape, world, Rows.of(work, shape, dp, p.pp if p.vpp else 1))
    return {
        "rollout": rollout(cfg, shape, hardware, world, work, cache_tokens),
        "sync": sync(cfg, shape, hardware, world),
        "old_log_probs": old_log_probs(layout, hardware).times(work.optimizer_steps),
        "update": update(layout, hardware).times(work.optimizer_steps) + parked(layout, hardware),
        "checkpoint": checkpoint(layout, hardware),
    }


def step_seconds(times: dict[str, PhaseTime], checkpoint_every: int = 0) -> float:
    """Of one RL step, with its share of a checkpoint every so many steps; 0: none."""
    seconds = sum(times[name].seconds for name in times if name != "checkpoint")
    return seconds + (times["checkpoint"].seconds / checkpoint_every if checkpoint_every else 0.0)


# -- between ranks -------------------------------------------------------------------------------------------------


def send_seconds(volume: Volume, hardware: Hardware) -> float:
    """Of one group's collectives: its slowest wire, and a latency a call.

    Of a group over nodes a ring crosses between two nodes with as many adapters as it has members in one; an all-to-all
    sends what goes to other nodes through one adapter, and the rest through the links.
    """
    per_node = max(1, hardware.gpus_per_node // volume.stride)
    reached = hardware.efficiency
    link, network = hardware.link_bandwidth * reached.link, hardware.network_bandwidth * reached.network
    if _is_near(volume, hardware):
        return volume.wire / link + volume.calls * hardware.link_latency
    waits = volume.calls * hardware.network_latency
    if volume.operation == "all-to-all":
        near = volume.payload * (per_node - 1) / volume.ranks
        return max((volume.wire - near) / network, near / link) + waits
    if volume.operation == "send":
        return volume.wire / network + waits
    return volume.wire / min(link, per_node * network) + waits


def _is_near(volume: Volume, hardware: Hardware) -> bool:
    span = volume.stride * (2 if volume.operation == "send" else volume.ranks)
    return span <= hardware.gpus_per_node


# -- learner -------------------------------------------------------------------------------------------------------


def _row_flops(layout: Layout, stage: int) -> dict[str, float]:
    """Operations of one row's forward pass on one rank, by kind of product."""
    p, shape = layout.cfg.parallel, layout.shape
    tokens, layers = layout.tokens / p.tp, layout.stage_layers(stage)
    found = [shape.layers[i] for i in layers]
    return {
        "products": 2 * tokens * sum(layer.attention + layer.dense for layer in found),
        "experts": 2 * tokens * sum(layer.experts * layer.expert_share for layer in found),
        "attention": layout.rows.pairs * len(layers) / len(shape.layers) * shape.pair_flops / (p.cp * p.tp),
        "head": 2 * tokens * shape.head if stage == p.pp - 1 else 0.0,
    }


def _flops_seconds(flops: dict[str, float], layout: Layout, hardware: Hardware) -> float:
    """Of a forward pass. FP8 is for the layers' products; the output layer has its own precision."""
    model, reached = layout.cfg.model, hardware.efficiency
    layers = hardware.peak("float8" if model.fp8 != "none" else model.dtype)
    even = reached.balance if layout.cfg.parallel.ep > 1 else 1.0
    return (
        flops["products"] / (layers * reached.products)
        + flops["experts"] / (layers * reached.experts * even)
        + flops["attention"] / (hardware.peak(model.dtype) * reached.attention)
        + flops["head"] / (hardware.peak(model.head_dtype or model.dtype) * reached.products)
    )


def _passes(layout: Layout) -> dict[str, float]:
    """Forward passes that an update is worth, by kind: itself, its backward of two, and what is computed again."""
    again = {"none": (0, 0), "selective": (0, 1), "full": (1, 1)}[layout.cfg.parallel.recompute]
    moe = 3 + again[1]
    return {"products": 3 + again[0], "experts": moe, "attention": 3 + again[0], "head": 4}  # log-probs keep no logits


def _pipelined(layout: Layout, hardware: Hardware, backward: bool) -> PhaseTime:
    """All rows of one optimizer step through the stages: the slowest one works, the others wait."""
    p, rows = layout.cfg.parallel, layout.rows.micro_batches
    slowest = max((_row_time(layout, hardware, stage, backward) for stage in range(p.pp)), key=lambda t: t.seconds)
    bubble = slowest.seconds * (p.pp - 1) / (p.vpp or 1)
    return slowest.times(rows) + PhaseTime(idle=bubble, detail={"bubble": bubble})


def _row_time(layout: Layout, hardware: Hardware, stage: int, backward: bool) -> PhaseTime:
    flops, passes = _row_flops(layout, stage), 1.0
    if backward:
        factors = _passes(layout)
        flops = {kind: count * factors[kind] for kind, count in flops.items()}
        passes = 3.0 + (layout.cfg.parallel.recompute == "full")
    compute = _flops_seconds(flops, layout, hardware)
    weights = sum(layout.parameters(stage))
    moved = passes * weights * layout.item + (2 * 4 * weights if backward else 0)  # and gradients are added to
    memory = moved / (hardware.memory_bandwidth * hardware.efficiency.memory)
    volumes = update_volumes(layout, stage) if backward else forward_volumes(layout, stage)
    found: dict[str, float] = {}
    for volume in volumes:
        if volume.group not in ("dp", "edp"):
            seconds = send_seconds(volume, hardware) / layout.rows.micro_batches
            found[volume.group] = found.get(volume.group, 0.0) + seconds
    return PhaseTime(max(0.0, compute - memory) if memory > compute else compute, 0.0, sum(found.values()), 0.0, found) + (
        PhaseTime(memory=memory) if memory > compute else PhaseTime()
    )


def old_log_probs(layout: Layout, hardware: Hardware) -> PhaseTime:
    """One forward pass over the rows of one optimizer step."""
    return _pipelined(layout, hardware, backward=False)


def update(layout: Layout, hardware: Hardware) -> PhaseTime:
    """One optimizer step."""
    times = _pipelined(layout, hardware, backward=True)
    p, exposed = layout.cfg.parallel, {}
    stage = max(range(p.pp), key=lambda stage: sum(layout.parameters(stage)))
    for volume in update_volumes(layout, stage):
        hidden = {"gradients": p.overlap_grad_reduce, "parameters": p.overlap_param_gather}.get(volume.what, False)
        if volume.group in ("dp", "edp"):
            seconds = send_seconds(volume, hardware) * (0.2 if hidden else 1.0)  # the last bucket is not hidden
            exposed[volume.group] = exposed.get(volume.group, 0.0) + seconds
    return times + PhaseTime(communication=sum(exposed.values()), detail=exposed) + _optimizer(layout, hardware, stage)


def _own_shares(layout: Layout, stage: int) -> float:
    """Parameters of a rank whose optimizer state it has."""
    dense, experts = layout.parameters(stage)
    if not layout.cfg.parallel.distributed_optimizer:
        return dense + experts
    return dense / (layout.dp * layout.cfg.parallel.cp) + experts / layout.edp


def _optimizer(layout: Layout, hardware: Hardware, stage: int) -> PhaseTime:
    """Adam reads and writes gradient, weight and two moments; on the host about 20 operations a parameter as well."""
    own = _own_shares(layout, stage)
    moved = own * (4 + 2 * 12 + layout.item)
    if layout.cfg.rl is not None and layout.cfg.rl.optimizer.cpu_offload:
        seconds = max(moved / (hardware.host_bandwidth * hardware.efficiency.memory), 20 * own / hardware.host_flops)
    else:
        seconds = moved / (hardware.memory_bandwidth * hardware.efficiency.memory)
    return PhaseTime(memory=seconds, detail={"optimizer": seconds})


def parked(layout: Layout, hardware: Hardware) -> PhaseTime:
    """What `memory` moves to the host and back once a step. On a CPU the host is the device."""
    memory, rl = layout.cfg.memory, layout.cfg.rl
    if hardware.name.startswith("cpu"):
        return PhaseTime()
    stage = max(range(layout.cfg.parallel.pp), key=lambda stage: sum(layout.parameters(stage)))
    moved = 0.0
    if memory.optimizer_offload and not (rl is not None and rl.optimizer.cpu_offload):
        moved += _own_shares(layout, stage) * (8 + (4 if layout.item < 4 else 0))
    if memory.param_offload:
        moved += sum(layout.parameters(stage)) * layout.item
    seconds = 2 * moved / hardware.host_bandwidth
    return PhaseTime(memory=seconds, detail={"offload": seconds})


# -- sync and checkpoint -------------------------------------------------------------------------------------------


def sync(cfg: Config, shape: ModelShape, hardware: Hardware, world: int) -> PhaseTime:
    """From the plan that the run executes, on a sample of ranks; a rank sends on average what it receives."""
    plan = sync_plan(cfg, shape.spec, world)
    reached, worst = hardware.efficiency, PhaseTime()
    for rank in sorted({0, world // 2, world - 1}):
        found = sync_volume(plan, rank, hardware.gpus_per_node)
        copied = 2 * (found.local + found.node + found.network) / (hardware.memory_bandwidth * reached.memory)
        link = found.node / (hardware.link_bandwidth * reached.link)
        network = found.network / (hardware.network_bandwidth * reached.network)
        waits = len(plan.blocks) * (hardware.network_latency if found.network else hardware.link_latency)
        waits = waits if found.node + found.network else 0.0
        detail = {"bytes": found.node + found.network, "bound": found.bound, "local": found.local}
        time = PhaseTime(memory=copied, communication=link + network + waits, detail=detail)
        worst = max(worst, time, key=lambda t: t.seconds)
    return worst


def checkpoint(layout: Layout, hardware: Hardware) -> PhaseTime:
    """Every rank writes its share; with `async_save` the run waits for a copy to the host alone."""
    share = checkpoint_bytes(layout) / layout.world
    is_async = layout.cfg.checkpoint.async_save
    seconds = share / (hardware.host_bandwidth if is_async else hardware.storage_bandwidth)
    written = share / hardware.storage_bandwidth
    return PhaseTime(memory=seconds, detail={"bytes": share, "written": written})


# -- rollout -------------------------------------------------------------------------------------------------------


def rollout(
    cfg: Config, shape: ModelShape, hardware: Hardware, world: int, work: Workload, cache_tokens: float | None = None
) -> PhaseTime:
    """One engine's share of the prompts: their prefill, then step by step until its longest response has ended."""
    r = cfg.rollout
    replicas = world // r.tensor_parallel
    count = max(1, round(work.sequences / replicas))
    decode = _Decode(cfg, shape, hardware)
    prompts = max(1.0, work.prompts / replicas)  # the samples of a prompt share its cache
    first = decode.prefill(prompts * work.prompt)
    lengths = work.lengths(count)
    order = sorted(range(count), key=lambda i: (i * 0.6180339887) % 1)  # as prompts come: not by length
    slots = r.max_concurrent
    if cache_tokens is not None:  # of a sequence that runs, on average over its time
        occupied = work.prompt + sum(n * n for n in lengths) / (2 * sum(lengths))
        slots = max(1, min(slots, int(cache_tokens / occupied)))
    times = first + _serve([lengths[i] for i in order], slots, work.prompt, decode)
    return times + PhaseTime(detail={"slots": min(slots, count)})


def _serve(lengths: list[float], slots: int, prompt: float, decode: _Decode) -> PhaseTime:
    """Sequences in as many slots as there are; the next one starts where one has ended.

    The tail is what comes after fewer than half of the slots that were filled at first are.
    """
    waiting, running, now = list(reversed(lengths)), [], 0.0  # running: (the step it ends at, its length)
    total, tail = PhaseTime(), 0.0
    while waiting and len(running) < slots:
        running.append((waiting[-1], waiting.pop()))
    heapq.heapify(running)
    most, cached = len(running), len(running) * prompt
    while running:
        end, length = heapq.heappop(running)
        live, steps = len(running) + 1, end - now
        if steps > 0:
            time = decode.step(live, cached + live * steps / 2).times(steps)
            total += time
            tail += time.seconds if live < most / 2 and not waiting else 0.0
        cached += live * steps - prompt - length
        now = end
        if waiting:
            heapq.heappush(running, (now + waiting[-1], waiting.pop()))
            cached += prompt
    return replace(total, detail=total.detail | {"tail": tail, "decode steps": now})


@dataclass(frozen=True)
class _Decode:
    """Steps of one engine, on one of its ranks."""

    cfg: Config
    shape: ModelShape
    hardware: Hardware

    @property
    def weight_item(self) -> float:
        return 1.0 if self.cfg.rollout.fp8 != "none" else self.item

    @property
    def item(self) -> int:
        return 2 if self.cfg.rollout_dtype == "bfloat16" else 4

    def prefill(self, tokens: float) -> PhaseTime:
        """Of so many tokens of prompts on each replica."""
        r, reached = self.cfg.rollout, self.hardware.efficiency
        peak = self.hardware.peak("float8" if r.fp8 != "none" else self.cfg.rollout_dtype)
        flops = tokens * self.shape.forward_flops / r.tensor_parallel
        return PhaseTime(compute=flops / (peak * reached.experts), detail={"prefill": flops / (peak * reached.experts)})

    def step(self, live: float, cached: float) -> PhaseTime:
        """One token for each of `live` sequences of a replica with `cached` tokens in all."""
        r, reached, shape = self.cfg.rollout, self.hardware.efficiency, self.shape
        memory = self._bytes(live, cached) / (self.hardware.memory_bandwidth * reached.memory)
        peak = self.hardware.peak("float8" if r.fp8 != "none" else self.cfg.rollout_dtype)
        scores = cached * shape.spec.num_layers * shape.pair_flops / (peak * reached.attention)
        compute = (live * shape.forward_flops / (peak * reached.experts) + scores) / r.tensor_parallel
        both = PhaseTime(compute=compute) if compute > memory else PhaseTime(memory=memory)
        return both + PhaseTime(communication=self._sent(live), idle=self.hardware.decode_overhead)

    def _bytes(self, live: float, cached: float) -> float:
        """Read in one step: dense weights, the experts that some token chose, and the cache."""
        r, shape, spec = self.cfg.rollout, self.shape, self.shape.spec
        dense = sum(layer.attention + layer.dense for layer in shape.layers) * self.weight_item / r.tensor_parallel
        head = shape.head * (4 if self.cfg.model.head_dtype == "float32" else self.item) / r.tensor_parallel
        ranks = r.tensor_parallel * (r.data_parallel if r.expert_parallel else 1)
        chosen = 1 - (1 - spec.top_k / spec.num_experts) ** (live * r.data_parallel) if spec.num_experts else 0.0
        experts = shape.expert_parameters * chosen * self.weight_item / ranks
        shared = 1 if spec.kv_lora_rank else min(r.tensor_parallel, spec.num_kv_heads)
        return dense + head + experts + cached * shape.cache_bytes(self.item) / shared

    def _sent(self, live: float) -> float:
        """Two sums a layer over the tensor-parallel ranks; with replicas that share experts, tokens there and back."""
        r, spec = self.cfg.rollout, self.shape.spec
        size = live * spec.hidden_size * self.item
        seconds = 0.0
        if r.tensor_parallel > 1:
            sums = 2 * spec.num_layers + 1
            one = Volume("rollout", "tp", "", "all-reduce", r.tensor_parallel, 1, size, 1)
            seconds += sums * send_seconds(one, self.hardware)
        if r.data_parallel > 1:
            ranks = (r.data_parallel, r.tensor_parallel)
            there = Volume("rollout", "ep", "", "all-gather", *ranks, size * r.data_parallel, 1)
            back = replace(there, operation="reduce-scatter")
            seconds += len(spec.moe_layers) * (send_seconds(there, self.hardware) + send_seconds(back, self.hardware))
        return seconds
