"""The plan of a weight sync, as a value: for any two layouts everything arrives once, and nothing travels for nothing."""

from __future__ import annotations

import functools
import itertools
import time
import zlib
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megarl import platform
from megarl.config.schema import Generate, Parallel
from megarl.models.generate import spec_of
from megarl.rollout.engine_shards import EngineDegrees
from megarl.rollout.exchange import message_key
from megarl.rollout.learner_shards import LearnerLayout, layer_stages
from megarl.rollout.sync_plan import SyncPlan, message_bytes

platform.setup()
SHAPE = dict(hidden_size=16, num_layers=4, num_heads=8, num_kv_heads=2, head_dim=4, intermediate_size=16)
EXPERTS = dict(num_experts=8, top_k=2, moe_intermediate_size=8)
SPEC = replace(spec_of(Generate(**SHAPE, **EXPERTS)), vocab_size=131, moe_layers=(0, 2, 3))
DENSE = replace(spec_of(Generate(family="qwen3", tie_embeddings=True, **SHAPE)), vocab_size=131)


@st.composite
def plans(draw):
    spec = draw(st.sampled_from([SPEC, DENSE]))
    tp, pp, dp, cp = (draw(st.sampled_from(sizes)) for sizes in ((1, 2, 4), (1, 2, 4), (1, 2), (1, 2)))
    world = tp * pp * dp * cp
    assume(world <= 16)
    rest = world // pp
    etp, ep = draw(st.sampled_from([(t, e) for t in (1, 2) for e in (1, 2, 4, 8) if rest % (t * e) == 0]))
    vpp = draw(st.sampled_from([None, 2])) if pp == 2 else None
    tensor, data = draw(st.sampled_from([(t, d) for t in (1, 2, 4) for d in (1, 2, 3, 8) if world % (t * d) == 0]))
    learner = LearnerLayout.of(Parallel(tp=tp, pp=pp, cp=cp, ep=ep, etp=etp, vpp=vpp), world, spec.num_layers)
    degrees = EngineDegrees(tensor, data, data > 1 or draw(st.booleans()))
    return SyncPlan(
        spec, "bfloat16", learner, degrees, whole=draw(st.integers(0, 5)) == 0, portion=draw(st.sampled_from([0, 1500]))
    )


@settings(max_examples=25, deadline=None, derandomize=True)
@given(plans())
def test_every_element_arrives_once_from_a_rank_that_holds_it(plan):
    learner, world = plan.learner, range(plan.learner.world)
    tensors = {entry.hf_name: numbers(entry.hf_name, entry.shape) for entry in plan.entries}
    sent = {(block, r): plan.outgoing(block, r) for block in range(len(plan.blocks)) for r in world}
    for rank in world:
        hosted = {name: np.zeros([s.stop - s.start for s in box]) for name, box in plan.hosted(rank).items()}
        size, by_sender = {"local": 0, "received": 0}, Counter()
        for block, rules in enumerate(plan.blocks):
            parameters = {rule.megatron: rule for rule, _ in rules}
            incoming = plan.incoming(block, rank)
            for sender, pieces in incoming.items():
                by_sender[sender] += message_bytes(pieces)
            for sender, pieces in incoming.items():
                if sender != rank:
                    assert sent[block, sender][rank] == pieces
                for piece in pieces:
                    rule = parameters[piece.entry.source]
                    assert learner.stage(rule.megatron) == sender // (len(world) // learner.pp)
                    shard = parameter(plan.spec, rule, learner.shard(sender))
                    found = shard[piece.local]
                    assert (found == tensors[piece.entry.hf_name][piece.box]).all() and found.shape == piece.shape
                    hosted[piece.entry.hf_name][piece.target] += found
                    size["local" if sender == rank else "received"] += found.size * 2
                    if sender != rank:  # what a rank has itself does not travel
                        mine = parameter(plan.spec, rule, learner.shard(rank))
                        held = learner.stage(rule.megatron) == rank // (len(world) // learner.pp)
                        assert not held or not np.isin([found.flat[0], found.flat[-1]], mine).any()
        for name, box in plan.hosted(rank).items():
            assert (hosted[name] == tensors[name][box]).all(), name
        traffic = plan.traffic(rank)
        assert plan.received(rank) == by_sender
        assert (traffic.local, traffic.received) == (size["local"], size["received"])
        assert traffic.bound <= traffic.received and (plan.whole or traffic.bound == traffic.received)
    assert sum(len(to) for to in sent.values()) == sum(
        len(plan.incoming(b, r).keys() - {r}) for b in range(len(plan.blocks)) for r in world
    )


@functools.cache
def numbers(name, shape):
    """A different number, none of them 0, in every element of all tensors."""
    start = (1 + zlib.crc32(name.encode())) * 4096
    return np.arange(start, start + int(np.prod(shape)), dtype=float).reshape(shape)


@functools.cache
def parameter(spec, rule, shard):
    out, shapes = np.zeros(rule.local_shape(spec, shard)), rule.hf_shapes(spec)
    for region in rule.regions(spec, shard):
        out[region.local] = numbers(region.hf_name, shapes[region.hf_name])[region.hf]
    return out


@pytest.mark.parametrize("tensor, data, experts", [(1, 1, False), (2, 1, False), (4, 1, True), (2, 2, True), (1, 3, True)])
def test_an_engine_hosts_every_element(tensor, data, experts):
    """Once over its tensor-parallel ranks, or on each of them; experts once over all its ranks."""
    degrees = EngineDegrees(tensor, data, experts)
    ranks = [degrees.hosted(SPEC, rank) for rank in range(degrees.ranks)]
    for entry in plan_of(degrees).entries:
        boxes = [rank[entry.hf_name] for rank in ranks if entry.hf_name in rank]
        covered = np.zeros(entry.shape)
        for box in boxes:
            covered[box] += 1
        copies = 1 if ".experts." in entry.hf_name and experts else degrees.data
        assert covered.min() >= copies and covered.min() == covered.max()
        if "k_proj" in entry.hf_name and tensor == 4:
            heads = [(box[0].start // SPEC.head_dim, box[0].stop // SPEC.head_dim) for box in boxes]
            assert heads == [(0, 1), (0, 1), (1, 2), (1, 2)]  # neighbours share a head, as their queries do


def plan_of(degrees):
    return SyncPlan(SPEC, "float32", LearnerLayout(degrees.ranks, stages=(0,) * 4), degrees)


def test_senders_share_the_work():
    """A pipeline stage gives its layers to the other's ranks one to one, and no rank sends twice what another does."""
    learner = LearnerLayout.of(Parallel(pp=2, ep=2), 8, 4)
    plan = SyncPlan(SPEC, "float32", learner, EngineDegrees())
    sent = [sum(p.bytes for pieces in plan.outgoing(2, r).values() for p in pieces) for r in range(8)]
    assert max(sent[:4]) <= 1.5 * min(sent[:4]) and sent[4:] == [0] * 4


@pytest.mark.parametrize(
    "settings, expected",
    [
        (dict(pp=2), (0, 0, 0, 0, 1, 1, 1, 1)),
        (dict(pp=2, vpp=2), (0, 0, 1, 1, 0, 0, 1, 1)),
        (dict(pp=4, first_stage_layers=1, last_stage_layers=3), (0, 1, 1, 2, 2, 3, 3, 3)),
    ],
)
def test_layers_of_stages(settings, expected):
    assert layer_stages(Parallel(**settings), 8) == expected


def test_layers_of_stages_are_megatrons():
    """Against the functions that Megatron builds stages with."""
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    names = dict(
        first_stage_layers="num_layers_in_first_pipeline_stage",
        last_stage_layers="num_layers_in_last_pipeline_stage",
        embedding_in_split="account_for_embedding_in_pipeline_split",
        loss_in_split="account_for_loss_in_pipeline_split",
        pp="pipeline_model_parallel_size",
        vpp="virtual_pipeline_model_parallel_size",
    )
    cases = [dict(pp=pp, vpp=vpp) for pp, vpp in itertools.product((2, 4), (None, 2, 3))]
    cases += [dict(pp=3, first_stage_layers=4), dict(pp=3, last_stage_layers=2, first_stage_layers=6)]
    cases += [dict(pp=2, embedding_in_split=True, loss_in_split=True, layers=22)]
    cases += [dict(pp=2, vpp=2, embedding_in_split=True, loss_in_split=True, layers=22), dict(pp=5, loss_in_split=True)]
    for case in cases:
        layers = case.pop("layers", 24)
        config = TransformerConfig(
            num_layers=layers,
            hidden_size=8,
            num_attention_heads=2,
            pipeline_dtype="float32",
            **{names[key]: value for key, value in case.items()},
        )
        expected = [-1] * layers
        for stage, chunk in itertools.product(range(case["pp"]), range(case.get("vpp") or 1)):
            chunk = chunk if case.get("vpp") else None
            start = get_transformer_layer_offset(config, chunk, stage)
            for layer in range(start, start + get_num_layers_to_build(config, chunk, stage)):
                expected[layer] = stage
        assert layer_stages(Parallel(**case), layers) == tuple(expected), case


def test_a_plan_for_512_ranks_takes_seconds():
    """Of one rank: 48 layers, 128 experts, tp 2, pp 4, ep 16 to engines of 8 ranks."""
    shape = dict(hidden_size=2048, num_heads=32, num_kv_heads=4, head_dim=128, moe_intermediate_size=768)
    spec = spec_of(Generate(num_layers=48, num_experts=128, top_k=8, **shape))
    learner = LearnerLayout.of(Parallel(tp=2, pp=4, ep=16), 512, 48)
    plan = SyncPlan(spec, "bfloat16", learner, EngineDegrees(8, 1, True))
    start = time.perf_counter()
    outgoing = [plan.outgoing(block, 5) for block in range(len(plan.blocks))]
    traffic = plan.traffic(5)
    assert time.perf_counter() - start < 20
    assert traffic.written < plan.bytes / 4 and sum(map(bool, outgoing)) == 25


def test_a_thousand_ranks_share_the_sending_and_none_holds_the_model():
    """Every rank of 1,024: what it is sent is what it hosts and has not, a little at a time; in seconds."""
    shape = dict(hidden_size=256, num_heads=16, num_kv_heads=4, head_dim=32, moe_intermediate_size=64)
    spec = spec_of(Generate(num_layers=16, num_experts=64, top_k=4, **shape))
    learner, engine = LearnerLayout.of(Parallel(tp=2, pp=4, ep=16), 1024, 16), EngineDegrees(8, 4, True)
    plan, start = SyncPlan(spec, "bfloat16", learner, engine), time.perf_counter()
    hosts = [
        sum(2 * int(np.prod([s.stop - s.start for s in box])) for box in plan.hosted(index).values())
        for index in range(engine.ranks)
    ]
    sent = np.zeros(1024, dtype=int)
    for rank in range(1024):
        received = plan.received(rank)
        assert sum(received.values()) == hosts[rank % engine.ranks] < plan.bytes / 8
        for sender, size in received.items():
            sent[sender] += size * (sender != rank)
        outgoing = learner.receivers(0, "tp", learner.shard(rank), rank) if rank < 256 else ()
        assert all(learner.sender(0, "tp", learner.shard(rank), other) == rank for other in outgoing)
    for index in range(engine.ranks):
        sizes = [sum(shares.values()) for shares in plan.shares(index)]
        assert max(a + b for a, b in itertools.pairwise(sizes)) < plan.bytes / 32  # two blocks are held at once
    assert sent.max() < 2 * sent.mean() and time.perf_counter() - start < 20


@pytest.mark.parametrize("whole", [False, True])
def test_what_is_packed_once_for_several_receivers_is_the_same_for_all(whole):
    """Two ranks that host the same get different parts of it from one sender, where each has another holder nearer."""
    learner = LearnerLayout.of(Parallel(tp=2, pp=2, ep=4), 32, 4)
    plan, different = SyncPlan(SPEC, "bfloat16", learner, EngineDegrees(2), whole), 0
    for rank, block in itertools.product(range(32), range(len(plan.blocks))):
        packed, by_index = {}, {}
        for receiver, pieces in plan.outgoing(block, rank).items():
            assert packed.setdefault(message_key(plan, receiver, pieces), pieces) == pieces
            different += by_index.setdefault(receiver % 2, pieces) != pieces
        assert not whole or len(packed) <= 3  # not one for each rank of an engine
    assert different > 10
