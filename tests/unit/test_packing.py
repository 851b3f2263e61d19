"""Packing: sequences are partitioned exactly, within the budget, and padding takes part in nothing."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megarl.data.packing import BatchLayout, micro_batches, pack, plan_micro_batches
from megarl.errors import BadInput
from megarl.types import Batch, MicroBatch, SequenceShards

LAYOUTS = st.fixed_dictionaries(
    {
        "lengths": st.lists(st.integers(1, 60), max_size=40),
        "token_budget": st.integers(64, 200),
        "dp_size": st.integers(1, 5),
        "pad_multiple": st.sampled_from([1, 2, 4, 8]),
        "attention": st.sampled_from([0.0, 0.05]),
        "count_multiple": st.integers(1, 3),
    }
)


def make_batch(lengths: list[int]) -> Batch:
    generator = torch.Generator().manual_seed(len(lengths))
    total = sum(lengths)
    return Batch(
        tokens=torch.randint(1, 100, (total,), generator=generator),
        lengths=torch.tensor(lengths, dtype=torch.int64),
        response_mask=torch.randint(0, 2, (total,), generator=generator).float(),
        group_index=torch.arange(len(lengths)),
        token_weights=torch.rand(total, generator=generator, dtype=torch.float64),
    )


@settings(max_examples=150, deadline=None)
@given(LAYOUTS)
def test_plan_is_an_exact_partition_within_the_budget(layout):
    lengths, multiple = layout["lengths"], layout["pad_multiple"]
    plan = plan_micro_batches(**layout)
    held = sorted(index for rank in plan for sequences in rank for index in sequences)
    assert held == list(range(len(lengths)))
    assert len(plan) == layout["dp_size"]
    counts = {len(rank) for rank in plan}
    assert len(counts) == 1 and counts.pop() % layout["count_multiple"] == 0
    for rank in plan:
        for sequences in rank:
            padded = -(-sum(lengths[index] for index in sequences) // multiple) * multiple
            assert padded <= layout["token_budget"]
        if sum(map(len, rank)) >= len(rank):
            assert all(rank), "an empty micro-batch on a rank that has a sequence for each"
    assert plan == plan_micro_batches(**layout)


@settings(max_examples=60, deadline=None)
@given(LAYOUTS)
def test_ranks_are_balanced_by_cost(layout):
    """Longest-processing-time leaves no two ranks further apart than one sequence costs."""
    plan = plan_micro_batches(**layout)
    costs = [length + layout["attention"] * length**2 for length in layout["lengths"]]
    loads = [sum(costs[index] for sequences in rank for index in sequences) for rank in plan]
    assert max(loads) - min(loads) <= max(costs, default=0) + 1e-9


def test_quadratic_term_moves_long_sequences_apart():
    """One of 100 tokens against ten of 10: equal in tokens, ten times as dear in attention."""
    lengths = [100] + [10] * 12
    by_tokens = plan_micro_batches(lengths, 400, 2)
    by_attention = plan_micro_batches(lengths, 400, 2, attention=1.0)
    assert sum(lengths[index] for sequences in by_tokens[0] for index in sequences) == 110
    assert by_attention[0] == [[0]] and by_attention[1] == [list(range(1, 13))]


def test_where_balancing_by_cost_breaks_the_budget_the_dense_packing_is_split_instead():
    """Balanced by attention, the sixteen short ones would share one micro-batch of 160 tokens."""
    lengths = [100] * 4 + [10] * 16
    (plan,) = plan_micro_batches(lengths, 150, 1, attention=1.0, count_multiple=5)
    assert len(plan) == 5 and all(plan)
    assert max(sum(lengths[index] for index in sequences) for sequences in plan) <= 150


def test_micro_batch_count_is_what_the_tokens_need():
    plan = plan_micro_batches([50] * 8, 100, 2)
    assert [len(sequences) for rank in plan for sequences in rank] == [2, 2, 2, 2]


def test_sequence_above_the_budget_names_the_budget_to_set():
    with pytest.raises(BadInput, match=r"micro_batch_tokens: 64, .* 65 tokens; set at least 72"):
        plan_micro_batches([3, 65], 64, 1, 8)
    with pytest.raises(BadInput, match="set at least 64"):
        plan_micro_batches([64], 63, 1, 4)


LAYOUT = st.builds(
    lambda dp, cp, row_multiple, count_multiple, attention, equal_rows: BatchLayout(
        dp=dp,
        cp=cp,
        row_multiple=row_multiple,
        count_multiple=count_multiple,
        attention=attention,
        equal_rows=equal_rows,
    ),
    st.integers(1, 4),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 3, 8]),
    st.integers(1, 3),
    st.sampled_from([0.0, 0.05]),
    st.booleans(),
)


def on_every_rank(batch: Batch, budget: int, layout: BatchLayout) -> list[list[list[MicroBatch]]]:
    """[dp rank][cp rank][micro-batch]"""
    return [
        [micro_batches(batch, budget, replace(layout, dp_rank=d, cp_rank=c)) for c in range(layout.cp)]
        for d in range(layout.dp)
    ]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 60), max_size=30), st.integers(96, 200), LAYOUT)
def test_every_token_is_computed_and_scored_once_whatever_the_layout(lengths, budget, layout):
    batch = make_batch(lengths)
    computed, scored = Counter(), Counter()
    total, sums = 0.0, torch.zeros(len(lengths), dtype=torch.float64)
    rows: dict[int, set[int]] = {}
    for data_rank in on_every_rank(batch, budget, layout):
        for number, shards in enumerate(zip(*data_rank, strict=True)):
            whole, at_last = shards[0].batch, Counter()
            rows.setdefault(number, set()).add(shards[0].tokens.numel())
            offsets = whole.offsets()
            for micro in shards:
                n = micro.tokens.numel()
                assert n and n % layout.row_multiple == 0 and n * layout.cp <= budget
                assert micro.cu_seqlens[-1] == n * layout.cp and micro.cu_seqlens.dtype == torch.int32
                assert (micro.cu_seqlens.diff() % layout.document_multiple == 0).all() and (
                    micro.cu_seqlens.diff() > 0
                ).all()
                owned, has_target = micro.owned, micro.targets >= 0
                assert (owned.diff() > 0).all()
                ids = whole.sequence_ids()
                assert torch.equal(micro.tokens[has_target], whole.tokens[owned - 1])
                assert torch.equal(micro.position_ids[has_target], owned - 1 - offsets[ids[owned]])
                local = micro.local_batch()
                assert torch.equal(local.tokens, whole.tokens[owned]) and torch.equal(local.sequence_ids(), ids[owned])
                for index, row in enumerate(micro.last_rows.tolist()):
                    if row >= 0:
                        at_last[index] += 1
                        assert micro.tokens[row] == whole.tokens[offsets[index + 1] - 1]
                        assert micro.position_ids[row] == whole.lengths[index] - 1 and micro.targets[row] == -1
                for place, token in zip(local.group_index[local.sequence_ids()].tolist(), owned.tolist()):
                    scored[place, token - int(offsets[ids[token]])] += 1
                total += (local.token_weights * local.response_mask).sum()
                part = SequenceShards(local.sequence_ids(), len(local)).sum(local.token_weights)[:, 0]
                sums.index_add_(0, local.group_index, part)
            assert at_last == Counter(range(len(whole)))
            computed.update(whole.group_index.tolist())
    if layout.equal_rows:
        assert all(len(sizes) == 1 for sizes in rows.values())
    assert computed == Counter(range(len(lengths)))
    assert scored == Counter({(s, t): 1 for s, n in enumerate(lengths) for t in range(1, n)})
    first = batch.offsets()[:-1]
    batch.token_weights[first] = 0
    whole = SequenceShards(batch.sequence_ids(), len(batch)).sum(batch.token_weights)[:, 0]
    torch.testing.assert_close(
        torch.as_tensor(total), (batch.token_weights * batch.response_mask).sum(), check_dtype=False
    )
    torch.testing.assert_close(sums, whole)


def test_context_parallel_ranks_hold_an_early_and_a_late_chunk():
    micros = [pack(make_batch([8, 3]), [0, 1], BatchLayout(cp=2, cp_rank=rank)) for rank in range(2)]
    assert [micro.position_ids.tolist() for micro in micros] == [[0, 1, 6, 7, 0, 3], [2, 3, 4, 5, 1, 2]]
    assert [micro.targets.tolist() for micro in micros] == [[1, 2, 7, -1, 9, -1], [3, 4, 5, 6, 10, -1]]
    assert [micro.last_rows.tolist() for micro in micros] == [[3, -1], [-1, 5]]
    assert micros[0].cu_seqlens.tolist() == micros[1].cu_seqlens.tolist() == [0, 8, 12]


def test_rank_without_sequences_gets_one_padded_document_and_no_trained_token():
    batch = make_batch([5])
    empty = micro_batches(batch, 64, BatchLayout(dp=2, dp_rank=1, row_multiple=4))
    assert len(empty) == len(micro_batches(batch, 64, BatchLayout(dp=2, row_multiple=4))) == 1
    micro = empty[0]
    assert len(micro.batch) == 0 and micro.batch.response_mask.numel() == 0
    assert micro.tokens.tolist() == [0] * 4 and micro.cu_seqlens.tolist() == [0, 4]
    assert micro.targets.tolist() == [-1] * 4 and micro.last_rows.tolist() == []


def test_pack_by_hand():
    batch = make_batch([3, 2, 4])
    micro = pack(batch, [2, 0], BatchLayout(row_multiple=4), pad_token=7)
    tokens = batch.tokens.tolist()
    assert micro.tokens.tolist() == tokens[5:9] + tokens[0:3] + [7]
    assert micro.cu_seqlens.tolist() == [0, 4, 7, 8]
    assert micro.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2, 0]
    assert micro.targets.tolist() == [1, 2, 3, -1, 5, 6, -1, -1] and micro.last_rows.tolist() == [3, 6]
    assert micro.batch.group_index.tolist() == [2, 0]
