"""Bytes that a training step keeps between forward and backward, by a stated formula for each kind of layer.

A forward pass cannot run on tensors without data, since experts ask for their numbers of tokens. So what the layers of
`megarl.models` save for their backward is written down here, tensor by tensor; `tools/bench/plan.py` counts it in real
steps. Letters: T tokens of a row on one context-parallel rank, s = T / tp of them on one rank, H the hidden size, d a
head's width, k experts a token, r token-expert pairs on a rank, F an expert's width, b bytes of an element. Norms keep
their input and a number a row; linears their input; attention queries, keys, values, output and a number a query.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from megarl.config.schema import Parallel
from megarl.models.packing_params import Layout, attention_layout
from megarl.models.spec import ModelSpec
from megarl.platform import cpu, cuda

PADDING = 8  # rows that a CPU's expert is rounded up by on average, to multiples of 16
ROW_NUMBERS = 57  # bytes a scored token that log-probs and loss keep beside hidden states: targets, ratios, weights


@dataclass(frozen=True)
class Row:
    """One packed row on one context-parallel rank. `scored`: its tokens that a loss is computed of.

    `queries`, `keys`, `masks`: elements of what attention's kernels are given, by window: padding to buckets of similar
    lengths included. Example: four documents of 128 tokens are `Row.of([128] * 4, Parallel(), 504)`.
    """

    tokens: int
    scored: int
    queries: dict[int, int] = field(default_factory=dict)
    keys: dict[int, int] = field(default_factory=dict)
    masks: dict[int, int] = field(default_factory=dict)
    copies: bool = False  # queries, keys and values are copied into buckets

    @classmethod
    def of(
        cls, lengths: Sequence[int], parallel: Parallel, scored: int, windows: Sequence[int] = (), least: int = 0
    ) -> Row:
        """Of sequences of these lengths; the row is padded as packing pads it, and to `least` tokens. These and `scored`
        are over all context-parallel ranks."""
        cp, step = parallel.cp, 2 * parallel.cp if parallel.cp > 1 else 1
        documents = [-(-length // step) * step for length in lengths]
        multiple = step * parallel.tp
        tail = max(-(-sum(documents) // multiple) * multiple, least) - sum(documents)
        ends = torch.tensor([0, *documents, *([tail] if tail else [])]).cumsum(0).to(torch.int32)
        layouts = {window: attention_layout(ends, window, cp, 0) for window in {*windows} or {0}}
        sizes = {window: _sizes(layout, int(ends[-1]) // cp) for window, layout in layouts.items()}
        queries, keys, masks = ({window: found[i] for window, found in sizes.items()} for i in range(3))
        copies = any(bucket.index is not None for layout in layouts.values() for bucket in layout.buckets)
        return cls(int(ends[-1]) // cp, -(-scored // cp), queries, keys, masks, copies)


def _sizes(layout: Layout, tokens: int) -> tuple[int, int, int]:
    queries = keys = masks = 0
    for bucket in layout.buckets:
        queries += tokens if bucket.index is None else bucket.index.numel()
        keys += tokens if bucket.key_index is None else bucket.key_index.numel()
        masks += 0 if bucket.mask is None else bucket.mask.numel()
    return queries, keys, masks


@dataclass(frozen=True)
class Activations:
    """What the layers of one model keep of one row, on one rank. All results are bytes."""

    spec: ModelSpec
    parallel: Parallel
    row: Row
    item: int  # b
    provider: str  # torch or te
    is_cpu: bool
    head_item: int = 0  # of the output layer's product; 0: b
    balance: float = 1.0  # mean load of an expert-parallel rank over that of the fullest

    @property
    def s(self) -> float:
        return self.row.tokens / self.parallel.tp

    @property
    def wide(self) -> float:
        """One tensor of hidden states on this rank."""
        return self.s * self.spec.hidden_size * self.item

    def layer(self, number: int) -> float:
        """Kept of a layer under `parallel.recompute`."""
        recompute = self.parallel.recompute
        if recompute == "full":
            return self.wide
        if recompute == "none":
            return self.attention(number) + self.mlp(number)
        # the inputs of both norms; what they give is thrown away and made again. Transformer Engine's norms stay
        if self.provider == "torch":
            return self.attention(number) - self.norm(self.spec.hidden_size) + self.wide
        return self.attention(number) + 2 * self.wide

    def again(self, number: int) -> float:
        """Of a layer, while its part that is computed again goes through its backward."""
        if self.parallel.recompute == "none":
            return 0.0
        if self.parallel.recompute == "selective":
            return self.mlp(number)
        return self.attention(number) + self.mlp(number) - self.wide  # its input is what `layer` has

    def norm(self, width: float, rows: float | None = None) -> float:
        """Its input and a number a row; PyTorch's of bfloat16 computes in float32 and keeps that and what it gives."""
        rows = self.s if rows is None else rows
        if self.item == 2 and self.provider == "torch":
            return rows * (width * 6 + 4)
        return rows * (width * self.item + max(4, self.item))

    def attention(self, number: int) -> float:
        """The norm before it, its linears and its kernel."""
        first = self.norm(self.spec.hidden_size) + self.wide
        return first + (self._latent() if self.spec.kv_lora_rank else self._heads(number))

    def _heads(self, number: int) -> float:
        spec, tp, b, row = self.spec, self.parallel.tp, self.item, self.row
        window = spec.windows[number] if spec.windows else 0
        heads, groups, d = spec.num_heads / tp, max(1, spec.num_kv_heads / tp), spec.head_dim
        # more ranks than key/value heads gather the whole projection
        width = heads + 2 * groups if tp <= spec.num_kv_heads else spec.num_heads + 2 * spec.num_kv_heads
        is_torch = self.provider == "torch"
        copies = row.copies if is_torch else True
        queries, keys = (row.queries[window], row.keys[window]) if is_torch else (row.tokens, row.tokens)
        kept = 0.0
        if spec.qk_norm == "head" or not copies:  # otherwise nothing needs the projection's own output
            kept += row.tokens * width * d * b
        if spec.qk_norm == "head":
            kept += row.tokens * (heads + groups) * max(4, b)
            if b == 2 and is_torch:  # in float32, and what the norm gives
                kept += row.tokens * (heads + groups) * d * 6
        elif spec.qk_norm == "all":
            kept += row.tokens * (2 * (heads + groups) * d * max(4, b) + 16)  # before and after the division by the norm
        kept += 2 * queries * heads * d * b + keys * groups * d * b + queries * heads * max(4, b)
        kept += keys * groups * d * b if copies else 0.0
        if is_torch:
            kept += row.masks[window] * b
            kept += row.tokens * heads * d * b if copies else 0.0  # in the row's order again
        return kept

    def _latent(self) -> float:
        spec, tp, b, row = self.spec, self.parallel.tp, self.item, self.row
        heads, is_torch = spec.num_heads / tp, self.provider == "torch"
        queries, keys = (row.queries[0], row.keys[0]) if is_torch else (row.tokens, row.tokens)
        kept = 0.0
        if spec.q_lora_rank:
            kept += self.norm(spec.q_lora_rank) + self.s * spec.q_lora_rank * b
        kept += self.norm(spec.kv_lora_rank + spec.rope_head_dim) + self.s * spec.kv_lora_rank * b
        value = spec.head_dim if is_torch else spec.v_head_dim  # PyTorch's kernels take values as wide as keys
        kept += (queries + keys) * heads * spec.head_dim * b + (queries + keys) * heads * value * b
        kept += queries * heads * max(4, b) + (row.masks[0] * b if is_torch else 0)
        return kept + row.tokens * heads * spec.v_head_dim * b

    def mlp(self, number: int) -> float:
        """The norm before it, and an MLP or router, dispatch, experts and shared experts."""
        spec, tp, b = self.spec, self.parallel.tp, self.item
        kept = self.norm(spec.hidden_size) + self.wide
        if number not in spec.moe_layers:
            return kept + 5 * self.row.tokens * spec.intermediate_size / tp * b  # gate and up, silu, up, product
        if spec.shared_width:
            kept += 5 * self.row.tokens * spec.shared_width / tp * b
            kept += self.wide + 16 * self.s if spec.shared_gate else 0.0  # what the gate scales, and its own numbers
        return kept + self._router() + self._experts()

    @property
    def _gate(self) -> int:
        return max(4, self.item)  # routers compute in float32 at least

    def _router(self) -> float:
        spec, s = self.spec, self.s
        kept = s * spec.top_k * (8 + self._gate)
        if spec.router_score == "sigmoid":
            kept += s * (spec.num_experts + 1) * self._gate
        if self._local:
            return kept
        tokens = s if self.parallel.dispatcher == "alltoall" else s * self.parallel.etp
        return kept + tokens * spec.num_experts * (1 + self._gate)  # maps of tokens and experts

    @property
    def _local(self) -> bool:
        """Experts that read their tokens in place."""
        return self.provider == "torch" and self.parallel.ep * self.parallel.etp == 1

    @property
    def pairs(self) -> float:
        """r, on the fullest rank."""
        share = self.s * self.spec.top_k * self.parallel.etp
        return share / (self.balance if self.parallel.ep > 1 else 1.0)

    def _experts(self) -> float:
        spec, b, r = self.spec, self.item, self.pairs
        width, rows = spec.moe_intermediate_size / self.parallel.etp, spec.hidden_size * b
        kept = r * 8  # the order of the pairs
        if spec.expert_bias:
            return kept + r * (8 + 3 * rows + 3 * width * b + self._gate)
        if self.provider == "te":  # gate and up, silu, up, product, and that times the gate value
            return kept + r * (rows + 6 * width * b + self._gate)
        if self.is_cpu:
            padded = r + PADDING * spec.num_experts / self.parallel.ep
            return kept + (0 if self._local else r * rows) + padded * (8 + b + 2 * width * b)
        return kept + r * (rows + 3 * width * b + b + (8 if self._local else 0))

    def ends(self, is_first: bool) -> float:
        """What a row has once on a rank: rotary tables, the order of attention's buckets, and the first stage's tokens."""
        spec, row = self.spec, self.row
        kept = 2 * row.tokens * spec.rope.width * 4.0 + (8.0 * row.tokens if is_first else 0)
        if row.copies and self.provider == "torch":
            kept += sum(8 * (row.queries[w] + row.keys[w] + row.tokens) for w in row.queries)
        return kept

    def head(self) -> float:
        """The last norm, the scored hidden states and their log-probs; all logits only where one block holds them."""
        spec, m, item = self.spec, self.row.scored, self.head_item or self.item
        kept = self.norm(spec.hidden_size)
        if spec.head == "scalar":
            return kept + self.row.tokens * (spec.hidden_size * self.item + 8)
        logits = m * (spec.padded_vocab_size(self.parallel.tp) / self.parallel.tp) * max(4, item)
        return kept + m * (spec.hidden_size * item + ROW_NUMBERS) + (logits if logits <= self.block else 0)

    @property
    def block(self) -> int:
        return cpu.BLOCK_BYTES if self.is_cpu else cuda.BLOCK_BYTES

    def transient(self, layers: Sequence[int], is_last: bool) -> float:
        """What kernels of a backward pass need beside: gradients of the largest layer's tensors, or blocks of logits."""
        spec, b = self.spec, self.item
        grads = 4 * self.wide
        if any(number in spec.moe_layers for number in layers):
            grads += self.pairs * (2 * spec.hidden_size + 3 * spec.moe_intermediate_size / self.parallel.etp) * b
        logits = 2 * self.block + 2 * self.row.scored * spec.hidden_size * 4 if is_last else 0
        return max(grads, logits)

    def forward(self, layers: Sequence[int], is_last: bool) -> float:
        """Most of a pass without gradient: one layer's tensors, or the hidden states and blocks of logits."""
        largest = max((self.attention(number) + self.mlp(number) for number in set(layers)), default=0.0)
        logits = 2 * self.block + self.row.scored * self.spec.hidden_size * 4 if is_last else 0
        return self.wide + max(largest, logits)


def most_kept(
    rows: Sequence[Activations], chunks: Sequence[Sequence[int]], stage: int, micro_batches: int | None = None
) -> float:
    """Bytes that are kept at one time, at most, on a rank of a pipeline stage that has these layers, chunk by chunk.

    `rows`: in the order in which they are run; the last one stands for those that follow, `micro_batches` in all.
    """
    p = rows[0].parallel
    is_first, is_last = stage == 0, stage == p.pp - 1
    flying = in_flight(p.pp, len(chunks), stage, micro_batches or len(rows))
    layers = [number for chunk in chunks for number in chunk]
    most = 0.0
    for first in range(max(1, len(rows) - max(flying) + 1)):  # which rows are on their way
        own = [rows[min(first + i, len(rows) - 1)] for i in range(max(flying))]
        counted = zip(chunks, flying, strict=True)
        kept = sum(own[i].layer(number) for chunk, count in counted for i in range(count) for number in chunk)
        kept += sum(one.ends(is_first) for one in own)
        largest = max(own, key=lambda one: one.row.tokens)
        most = max(most, kept + max(largest.head() if is_last else 0, max(map(largest.again, set(layers)), default=0)))
    return most


def in_flight(pp: int, chunks: int, stage: int, micro_batches: int) -> list[int]:
    """Of each of a stage's chunks, the micro-batches whose forward is done and whose backward is not, when most are.

    1F1B: a stage is as many ahead as there are stages behind it, and has the one at work; with virtual stages the order of
    Megatron's interleaved schedule, in which groups of pp micro-batches go through a chunk at a time.
    """
    if pp == 1:
        return [1] * chunks
    if chunks == 1:
        return [min(micro_batches, pp - stage)]
    most = min(micro_batches * chunks, (pp - stage - 1) * 2 + (chunks - 1) * pp + 1)
    out = [0] * chunks
    for number in range(most):
        out[number % (pp * chunks) // pp] += 1
    return out
