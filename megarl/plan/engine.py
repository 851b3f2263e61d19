"""What a vLLM rank holds, and what a weight sync needs beside it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

from megarl.config.schema import Config
from megarl.models.spec import ModelSpec
from megarl.platform import cpu, cuda
from megarl.rollout.engine_shards import VOCAB, VOCAB_PADDING
from megarl.rollout.exchange import message_key
from megarl.rollout.sync_plan import ITEM_BYTES, SyncPlan, message_bytes

STACKED = re.compile(r"\.experts\.[a-z_]+$")  # all experts of a layer in one tensor, as gpt-oss has them
SAMPLED_COPIES = 3  # float32 tensors of [sequences, vocabulary]: logits, their softmax, the sampler's
BATCHED_TOKENS = 8192  # of one engine step, at least, see `VLLMEngine`


def weight_bytes(plan: SyncPlan, rank: int, is_cpu: bool) -> int:
    """Of what vLLM hosts on a rank, with the vocabulary padded as vLLM pads it, and its table of rotary positions.

    A CPU keeps the output layer twice: as it was loaded and in its kernel's order.
    """
    spec, total = plan.spec, 0
    dtypes = {entry.hf_name: entry.dtype for entry in plan.entries}
    rows = -(-spec.vocab_size // VOCAB_PADDING) * VOCAB_PADDING // plan.engine.tensor
    # a plan of whole tensors says what a rank is given, not what it keeps; nor does it cut experts in one tensor
    stacked = plan.engine.ranks if plan.engine.experts else plan.engine.tensor
    for name, box in replace(plan, whole=False).hosted(rank).items():
        sizes = [s.stop - s.start for s in box]
        if name.rpartition(".")[0].rpartition(".")[2] in VOCAB:
            sizes[0] = rows
        share = stacked if STACKED.search(name) else 1
        total += math.prod(sizes) * ITEM_BYTES[dtypes.get(name, plan.dtype)] // share
    item = ITEM_BYTES[plan.dtype]
    packed = rows * spec.hidden_size * item if is_cpu else 0
    return total + packed + spec.max_position_embeddings * spec.rope.width * item


def cache_bytes_per_token(spec: ModelSpec, tensor: int, item: int) -> int:
    """Of keys and values of all layers on one rank; a latent is on every rank. Sliding windows save nothing here."""
    if spec.kv_lora_rank:
        return spec.num_layers * (spec.kv_lora_rank + spec.rope_head_dim) * item
    return spec.num_layers * 2 * max(1, spec.num_kv_heads // tensor) * spec.head_dim * item


def workspace_bytes(cfg: Config, spec: ModelSpec) -> int:
    """What vLLM's profile run finds in use beside weights: one step of the most tokens, and of the most sequences' logits.

    Hidden states before and after a layer, the largest MLP's or the experts' input, gate and up, and output.
    """
    r, item = cfg.rollout, ITEM_BYTES[cfg.rollout_dtype]
    tokens = max(BATCHED_TOKENS, r.max_context or 0)
    tensor = r.tensor_parallel
    experts = 1 if r.expert_parallel else tensor
    dense = 2 * spec.intermediate_size / tensor + spec.hidden_size if len(spec.moe_layers) < spec.num_layers else 0
    moe = spec.top_k * (2 * spec.moe_intermediate_size / experts + spec.hidden_size) if spec.is_moe else 0
    heads = (2 * spec.num_heads + 2 * spec.num_kv_heads) / tensor * spec.head_dim
    layer = tokens * item * (4 * spec.hidden_size + max(dense, moe, heads))
    return int(layer + SAMPLED_COPIES * 4 * r.max_concurrent * spec.vocab_size)


@dataclass(frozen=True)
class Cache:
    """The key/value cache of one engine rank, and what it is of use for."""

    bytes: int
    tokens: int  # that it holds
    sequence: int  # tokens of the longest sequence

    @property
    def sequences(self) -> float:
        """Of the longest kind, at once."""
        return self.tokens / self.sequence


def cache_of(cfg: Config, spec: ModelSpec, weights: int, device_bytes: float | None) -> Cache:
    """On a GPU what `gpu_memory_utilization` leaves beside weights and workspace; on a CPU (`device_bytes` none) as set."""
    r = cfg.rollout
    each = cache_bytes_per_token(spec, r.tensor_parallel, ITEM_BYTES[cfg.rollout_dtype])
    if device_bytes is None:
        size = int(r.kv_cache_gib * 2**30)
    else:
        size = int(r.gpu_memory_utilization * device_bytes) - weights - workspace_bytes(cfg, spec)
    context = min(r.max_context or spec.max_position_embeddings, spec.max_position_embeddings)
    return Cache(max(0, size), max(0, size) // each, context)


def buffer_bytes(plan: SyncPlan, rank: int, is_cpu: bool) -> int:
    """What `Exchange` needs on a rank: the messages of two blocks, on their way and in use.

    On a CPU ranks read each other's parameters in place, and need none; only codes of FP8, which are made anew in every
    sync, lie in windows. Of layers of one kind on the same side of this rank's stage one stands for all.
    """
    if plan.learner.world == 1 or (is_cpu and plan.fp8 is None):
        return 0
    sizes: dict[tuple, tuple[int, int]] = {}
    found = []
    for number, block in enumerate(plan.blocks):
        key = _kind(plan, block, rank)
        if key not in sizes:
            received = sum(message_bytes(p) for sender, p in plan.incoming(number, rank).items() if sender != rank)
            distinct = {message_key(plan, r, p): message_bytes(p) for r, p in plan.outgoing(number, rank).items()}
            sizes[key] = received, sum(distinct.values())
        found.append(sizes[key])
    if is_cpu:  # windows hold what is sent: even blocks before odd ones
        return sum(max((sent for _, sent in found[half::2]), default=0) for half in (0, 1))
    both = [sum(pair) for pair in found]
    return max(a + b for a, b in zip(both, [*both[1:], 0]))


def _kind(plan: SyncPlan, block: list, rank: int) -> tuple:
    """What decides the sizes of a block's messages: shapes of its tensors, and whether this rank has a part of them."""
    mine = rank // (plan.learner.world // plan.learner.pp)
    stages = tuple(plan.learner.stage(rule.megatron) for rule, _ in block)
    shapes = tuple((entry.family, entry.shape, entry.dtype) for _, entries in block for entry in entries.values())
    return tuple(stage == mine for stage in stages), shapes


def portion_bytes(is_cpu: bool) -> int:
    """What the experts of a block are taken in portions of."""
    return cpu.BLOCK_BYTES if is_cpu else cuda.BLOCK_BYTES
