"""Packing: sequences are partitioned exactly, within the budget, and padding takes part in nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megarl.data.packing import micro_batches, pack, plan_micro_batches
from megarl.errors import BadInput
from megarl.types import Batch, SequenceShards

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


@settings(max_examples=80, deadline=None)
@given(LAYOUTS)
def test_packed_documents_are_the_sequences_and_sums_do_not_depend_on_the_packing(layout):
    lengths = layout["lengths"]
    batch = make_batch(lengths)
    offsets = batch.offsets().tolist()
    total = per_group = 0
    for rank in range(layout["dp_size"]):
        for micro in micro_batches(
            batch,
            layout["token_budget"],
            rank,
            layout["dp_size"],
            layout["pad_multiple"],
            attention=layout["attention"],
            count_multiple=layout["count_multiple"],
        ):
            assert micro.tokens.numel() % layout["pad_multiple"] == 0 and micro.tokens.numel() > 0
            assert micro.cu_seqlens[-1] == micro.tokens.numel() and micro.cu_seqlens.dtype == torch.int32
            assert micro.num_padding < layout["pad_multiple"] or len(micro.batch) == 0
            for document, group in enumerate(micro.batch.group_index.tolist()):
                start, end = micro.cu_seqlens[document : document + 2].tolist()
                assert torch.equal(micro.tokens[start:end], batch.tokens[offsets[group] : offsets[group + 1]])
                assert micro.position_ids[start:end].tolist() == list(range(end - start))
                assert set(micro.sequence_ids[start:end].tolist()) == {document}
            padding = micro.tokens.numel() - micro.num_padding
            assert (micro.sequence_ids[padding:] == len(micro.batch)).all()
            total = total + (micro.batch.token_weights * micro.batch.response_mask).sum()
            shards = SequenceShards(micro.batch.sequence_ids(), len(micro.batch))
            sums = shards.sum(micro.batch.token_weights)[:, 0]
            per_group = per_group + torch.zeros(len(lengths), dtype=torch.float64).index_add_(
                0, micro.batch.group_index, sums
            )
    whole = SequenceShards(batch.sequence_ids(), len(batch)).sum(batch.token_weights)[:, 0]
    torch.testing.assert_close(torch.as_tensor(total), (batch.token_weights * batch.response_mask).sum())
    torch.testing.assert_close(per_group, whole)


def test_rank_without_sequences_gets_one_padded_document_and_no_trained_token():
    batch = make_batch([5])
    empty = micro_batches(batch, 64, 1, 2, 4)
    assert len(empty) == len(micro_batches(batch, 64, 0, 2, 4)) == 1
    micro = empty[0]
    assert len(micro.batch) == 0 and micro.batch.response_mask.numel() == 0
    assert micro.tokens.tolist() == [0] * 4 and micro.cu_seqlens.tolist() == [0, 4] and micro.max_seqlen == 4
    assert micro.sequence_ids.tolist() == [0] * 4


def test_pack_by_hand():
    batch = make_batch([3, 2, 4])
    micro = pack(batch, [2, 0], pad_multiple=4, pad_token=7)
    tokens = batch.tokens.tolist()
    assert micro.tokens.tolist() == tokens[5:9] + tokens[0:3] + [7]
    assert micro.cu_seqlens.tolist() == [0, 4, 7, 8]
    assert micro.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2, 0]
    assert micro.sequence_ids.tolist() == [0] * 4 + [1] * 3 + [2]
    assert micro.num_padding == 1 and micro.batch.group_index.tolist() == [2, 0]
