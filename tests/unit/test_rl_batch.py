"""From prompt groups to micro-batches: what is decided does not depend on ranks, and the pool loses no group."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megarl.algorithms import (
    KL,
    PRESETS,
    Algorithm,
    Correction,
    LossInputs,
    Outcomes,
    ValueLoss,
    advantage,
    gate,
    mismatch_weights,
    policy_loss,
)
from megarl.algorithms.aggregate import AGGREGATIONS
from megarl.data.packing import BatchLayout, micro_batches
from megarl.metrics import Metric, Sum, merge
from megarl.trainers import rl_batch
from megarl.trainers.group_pool import GroupPool
from megarl.types import Batch, MicroBatch, Prompt, PromptGroup, SequenceShards, Trajectory
from tests.unit.algorithm_steps import examples

usual = examples(25)
SCORES = (0.0, 1.0, 0.5, None)


def trajectory(draw: np.random.Generator, group_id: str, prompt: list[int], index: int) -> Trajectory:
    length = int(draw.integers(1, 6))
    score = SCORES[draw.integers(0, len(SCORES))]
    return Trajectory(
        group_id=group_id,
        sample_index=index,
        prompt_ids=prompt,
        response_ids=draw.integers(10, 99, length).tolist(),
        response_mask=(draw.random(length) < 0.8).astype(np.uint8),
        rollout_log_probs=-draw.random(length).astype(np.float32) - 0.1,
        finish_reason=str(draw.choice(["stop", "length"])),
        policy_version=np.full(length, 3, np.int32),
        text=f"response {index}",
        routed_experts=draw.integers(0, 8, (len(prompt) + length - 1, 2, 2)).astype(np.uint8),
        score=score,
        shaped_reward=None if score is None else score - float(draw.random()),
        rewards={"right": 1.0},
    )


def make_groups(seed: int, prompts: int = 3, first: int = 0) -> list[PromptGroup]:
    draw, out = np.random.default_rng(seed), []
    for place in range(first, first + prompts):
        ids = draw.integers(1, 9, draw.integers(1, 4)).tolist()
        prompt = Prompt(f"p{place}", tuple(ids), "7", None, "source", f"text {place}", {"k": [place]})
        group_id, size = f"p{place}/1", int(draw.integers(1, 5))
        out.append(PromptGroup(group_id, prompt, [trajectory(draw, group_id, ids, i) for i in range(size)]))
    return out


groups_of = st.builds(make_groups, st.integers(0, 2**31), st.integers(1, 5))
TOKEN_LEVEL = Algorithm(
    advantage("gae", gamma=0.99, lam=0.9),
    "token",
    gate("clip", low=0.2, high=0.3),
    "token-mean",
    kl=KL("k1", 0.1, "reward"),
    value=ValueLoss(0.2),
    correction=Correction("token", "mask", 0.8, 1.3, renormalise=True),
    veto=0.5,
    fixed_length=8,
)
KINDS = [
    TOKEN_LEVEL,
    dataclasses.replace(TOKEN_LEVEL, advantage=advantage("return-to-go", gamma=0.9), value=None),
    dataclasses.replace(TOKEN_LEVEL, advantage=advantage("group"), value=None, correction=Correction("sequence-mean")),
    dataclasses.replace(TOKEN_LEVEL, advantage=advantage("leave-one-out"), value=None, drop_truncated=True),
    dataclasses.replace(PRESETS["reinforce_pp_baseline"], ratio_base="rollout"),
    dataclasses.replace(PRESETS["dr_grpo"], fixed_length=8),
    PRESETS["grpo"],
]
algorithms = st.builds(
    lambda a, aggregate, n_seq: dataclasses.replace(a, aggregate=aggregate, n_seq=n_seq, fixed_length=8),
    st.sampled_from(KINDS),
    st.sampled_from(list(AGGREGATIONS)),
    st.sampled_from(["all", "valid"]),
)


def passes(batch: Batch) -> Batch:
    """The batch with what the learner, the reference and the critic would find; junk off the responses."""
    draw = np.random.default_rng(len(batch.tokens))

    def found(scale: float) -> torch.Tensor:
        noise = torch.from_numpy(draw.normal(0, scale, len(batch.tokens)).astype(np.float32))
        out = torch.where(batch.response_mask > 0, batch.rollout_log_probs + noise, math.nan)
        out[batch.offsets()[:-1]] = 0.0  # nothing predicts a first token
        return out

    return batch.replace(old_log_probs=found(0.2), ref_log_probs=found(0.3), values=found(1.0))


def values(metrics: dict[str, Metric]) -> dict[str, float]:
    return {name: metric.value() for name, metric in metrics.items()}


def exactly(metrics: dict[str, Metric]) -> object:
    return pytest.approx(values(metrics), abs=0, rel=0, nan_ok=True)


@dataclasses.dataclass
class Ranks:
    """One rollout batch over 2 (x 2 context-parallel) ranks, each with its micro-batches of every optimizer step."""

    batch: Batch  # whole, as assembled
    parts: list[Batch]
    packed: list[list[list[MicroBatch]]]  # [rank][optimizer step][micro-batch]

    @classmethod
    def of(cls, groups: list[PromptGroup], algorithm: Algorithm, steps: int, seed: int, cp: int = 1) -> Ranks:
        batch = rl_batch.assemble(groups, algorithm)
        parts = rl_batch.split(batch, steps, seed)
        layouts = [BatchLayout(dp=2, dp_rank=rank // cp, cp=cp, cp_rank=rank % cp) for rank in range(2 * cp)]
        return cls(batch, parts, [[micro_batches(part, 24, layout) for part in parts] for layout in layouts])

    def micros(self, rank: int) -> list[MicroBatch]:
        return [micro for step in self.packed[rank] for micro in step]

    def record(self, truth: Batch, names: tuple[str, ...]) -> None:
        """Each rank's passes find `names` at the tokens it scores."""
        for micro in (m for rank in range(len(self.packed)) for m in self.micros(rank)):
            own = truth.select(micro.batch.sequence_index.tolist())
            for name in names:
                whole = getattr(own, name)
                setattr(micro.batch, name, torch.zeros_like(whole).index_copy_(0, micro.owned, whole[micro.owned]))

    def gathered(self) -> Batch:
        ranks = [rl_batch.recorded(self.micros(rank)) for rank in range(len(self.packed))]
        return rl_batch.with_recorded(self.batch, (item for rank in ranks for item in rank))


def same(got: torch.Tensor | None, expected: torch.Tensor | None, name: str) -> None:
    assert (got is None) == (expected is None), name
    if expected is not None:
        assert got.dtype == expected.dtype, name
        torch.testing.assert_close(got, expected, atol=0, rtol=0, equal_nan=True, msg=name)


@usual
@given(groups_of, algorithms, st.integers(1, 4), st.integers(0, 9))
def test_what_ranks_found_apart_decides_the_same_as_the_whole(
    groups: list[PromptGroup], algorithm: Algorithm, steps: int, seed: int
) -> None:
    """Two ranks record, gather and decide; then every micro-batch holds its slice of it, and only that."""
    sharded = Ranks.of(groups, algorithm, steps, seed, cp=2)
    ranks = Ranks.of(groups, algorithm, steps, seed)
    truth = passes(ranks.batch)
    sharded.record(truth, rl_batch.RECORDED)
    for name in rl_batch.RECORDED:
        same(getattr(sharded.gathered(), name), getattr(truth, name), name)
    ranks.record(truth, rl_batch.RECORDED)
    gathered = ranks.gathered()
    for name in rl_batch.RECORDED:
        same(getattr(gathered, name), getattr(truth, name), name)
    expected, expected_metrics = rl_batch.with_decisions(truth, ranks.parts, algorithm)
    for rank in range(2):
        decided, metrics = rl_batch.with_decisions(ranks.gathered(), ranks.parts, algorithm)
        assert values(metrics) == exactly(expected_metrics)
        rl_batch.decide(ranks.micros(rank), decided)
    seen: list[int] = []
    for micro in ranks.micros(0) + ranks.micros(1):
        seen += micro.batch.sequence_index.tolist()
        own = expected.select(micro.batch.sequence_index.tolist())
        for name in (field.name for field in dataclasses.fields(Batch)):
            same(getattr(micro.batch, name), getattr(own, name), name)
    assert sorted(seen) == list(range(len(ranks.batch)))


@usual
@given(groups_of, algorithms, st.integers(1, 3))
def test_decisions_are_those_of_the_algorithm_on_the_whole_batch(
    groups: list[PromptGroup], algorithm: Algorithm, steps: int
) -> None:
    batch = passes(rl_batch.assemble(groups, algorithm))
    decided, metrics = rl_batch.with_decisions(batch, rl_batch.split(batch, steps, seed=1), algorithm)
    ids, on = batch.sequence_ids(), batch.response_mask > 0
    penalty = None
    if algorithm.kl is not None and algorithm.kl.placement == "reward":
        penalty = torch.where(on, 0.1 * (batch.old_log_probs.double() - batch.ref_log_probs.double()), 0.0)
    outcomes = Outcomes(batch.rewards, batch.group_index, batch.response_mask, ids, penalty, batch.values)
    estimate = algorithm.advantages(outcomes)
    found = estimate.advantages if len(estimate.advantages) == len(ids) else estimate.advantages[ids]
    torch.testing.assert_close(decided.advantages, found.float(), atol=0, rtol=0)
    assert decided.advantages[batch.rewards.isnan()[ids] & on].eq(0).all()
    assert metrics["reward/unscored"].value() == batch.rewards.isnan().sum()
    same(decided.returns, None if estimate.returns is None else estimate.returns.float(), "returns")
    if algorithm.needs_old_log_probs:
        shards = SequenceShards(ids, len(batch))
        mismatch = mismatch_weights(
            algorithm.correction, algorithm.veto, batch.old_log_probs, batch.rollout_log_probs, on.float(), shards
        )
        same(decided.mismatch_weights, mismatch.weights, "mismatch_weights")
    else:
        assert decided.mismatch_weights is None


@usual
@given(groups_of, st.sampled_from(KINDS))
def test_the_gap_to_the_engine_is_that_of_all_ranks_together(groups: list[PromptGroup], algorithm: Algorithm) -> None:
    ranks = Ranks.of(groups, algorithm, steps=2, seed=0)
    assert rl_batch.mismatch_metrics(ranks.micros(0), algorithm) == {}, "no pass found old log-probs"
    truth = passes(ranks.batch)
    ranks.record(truth, ("old_log_probs",))
    got = rl_batch.mismatch_metrics(ranks.micros(0), algorithm)
    merge(got, rl_batch.mismatch_metrics(ranks.micros(1), algorithm))
    shards = SequenceShards(truth.sequence_ids(), len(truth))
    fields = (truth.old_log_probs, truth.rollout_log_probs, truth.response_mask)
    whole = mismatch_weights(algorithm.correction, algorithm.veto, *fields, shards).metrics
    assert values(got) == pytest.approx(values(whole), rel=1e-6, abs=1e-7, nan_ok=True)


@usual
@given(groups_of, algorithms, st.integers(1, 4))
def test_token_weights_sum_as_the_aggregation_says_in_every_optimizer_step(
    groups: list[PromptGroup], algorithm: Algorithm, steps: int
) -> None:
    ranks = Ranks.of(groups, algorithm, steps, seed=0)
    truth = passes(ranks.batch)
    decided, _ = rl_batch.with_decisions(truth, ranks.parts, algorithm)
    for rank in range(2):
        rl_batch.decide(ranks.micros(rank), decided)
    renormalised = algorithm.correction is not None and algorithm.correction.renormalise
    for step, part in enumerate(ranks.parts):
        weights = [m.batch.token_weights for rank in range(2) for m in ranks.packed[rank][step]]
        rows = [decided.select([s]) for s in part.sequence_index.tolist()]
        counted = [
            row.response_mask * (row.mismatch_weights > 0) if renormalised else row.response_mask for row in rows
        ]
        trained = [int(c.sum()) for c in counted]
        nonempty = sum(n > 0 for n in trained)
        sequences = len(rows) if algorithm.n_seq == "all" else max(nonempty, 1)
        expected = {
            "token-mean": float(nonempty > 0),
            "seq-mean-token-mean": nonempty / sequences,
            "seq-mean": nonempty / sequences,
            "seq-mean-token-sum": sum(trained) / sequences,
            "fixed-length": sum(trained) / sequences / 8,
        }[algorithm.aggregate]
        assert float(torch.cat(weights).sum()) == pytest.approx(expected, rel=1e-5, abs=1e-7)


@usual
@given(groups_of, st.sampled_from(["token", "sequence"]), st.integers(1, 3))
def test_the_micro_batches_of_all_ranks_add_up_to_the_step_s_gradient(
    groups: list[PromptGroup], ratio: str, steps: int
) -> None:
    algorithm = Algorithm(advantage("group"), ratio, gate("clip", low=0.1, high=0.1), "seq-mean-token-mean")
    ranks = Ranks.of(groups, algorithm, steps, seed=0)
    truth = passes(ranks.batch)
    ranks.record(truth, ("old_log_probs",))
    decided, _ = rl_batch.with_decisions(truth, ranks.parts, algorithm)
    for rank in range(2):
        rl_batch.decide(ranks.micros(rank), decided)

    def gradient(batches: list[Batch]) -> torch.Tensor:
        """By token of the whole batch: the reference stands for the policy after a few updates."""
        leaf = truth.ref_log_probs.clone().requires_grad_()
        offsets, total = truth.offsets(), torch.zeros(())
        for b in batches:
            pieces = [torch.arange(offsets[s], offsets[s + 1]) for s in b.sequence_index.tolist()]
            index = torch.cat([torch.zeros(0, dtype=torch.int64), *pieces])
            inputs = LossInputs(leaf[index], b.advantages, b.token_weights, b.response_mask, b.old_log_probs)
            total = total + policy_loss(algorithm, inputs, SequenceShards(b.sequence_ids(), len(b)))[0]
        total.backward()
        return leaf.grad

    whole = [decided.select(part.sequence_index.tolist()) for part in ranks.parts]
    split = [micro.batch for rank in range(2) for micro in ranks.micros(rank)]
    torch.testing.assert_close(gradient(split), gradient(whole), atol=1e-6, rtol=1e-5)


def test_assembled_fields_lie_at_their_tokens() -> None:
    groups = make_groups(3)
    batch = rl_batch.assemble(groups, PRESETS["gspo"])
    for place, t in enumerate(t for group in groups for t in group.trajectories):
        own, start = batch.select([place]), len(t.prompt_ids)
        assert own.tokens.tolist() == t.prompt_ids + t.response_ids
        assert own.sequence_index.tolist() == [place] and own.lengths.tolist() == [t.num_tokens]
        for name in ("response_mask", "rollout_log_probs", "policy_version"):
            assert getattr(own, name)[:start].eq(0).all()
            assert getattr(own, name)[start:].tolist() == getattr(t, name).tolist()
        assert groups[int(own.group_index)].group_id == t.group_id
        reward = own.rewards.item()
        assert math.isnan(reward) if t.shaped_reward is None else reward == t.shaped_reward
        assert own.routed_experts[:-1].tolist() == t.routed_experts.tolist()
        assert own.routed_experts[-1].tolist() == [[0, 1], [0, 1]], "the engine never routes the last token"
    groups[0].trajectories[0].routed_experts = None
    assert rl_batch.assemble(groups, PRESETS["gspo"]).routed_experts is None


def test_overlong_filtering_masks_truncated_responses_and_keeps_their_rewards() -> None:
    groups = make_groups(5, prompts=4)
    trajectories = [t for group in groups for t in group.trajectories]
    assert {t.finish_reason for t in trajectories} == {"stop", "length"}
    plain = rl_batch.assemble(groups, PRESETS["dapo"])
    filtered = rl_batch.assemble(groups, dataclasses.replace(PRESETS["dapo"], drop_truncated=True))
    same(filtered.rewards, plain.rewards, "rewards")
    for place, t in enumerate(trajectories):
        expected = plain.select([place]).response_mask * (t.finish_reason == "stop")
        assert torch.equal(filtered.select([place]).response_mask, expected)


@usual
@given(groups_of, st.integers(1, 30), st.integers(0, 5))
def test_a_split_deals_every_sequence_to_one_step_and_leaves_none_empty(
    groups: list[PromptGroup], steps: int, seed: int
) -> None:
    batch = rl_batch.assemble(groups, PRESETS["gspo"])
    parts = rl_batch.split(batch, steps, seed)
    dealt = [s for part in parts for s in part.sequence_index.tolist()]
    assert sorted(dealt) == list(range(len(batch)))
    sizes = [len(part) for part in parts]
    assert len(parts) == min(steps, len(batch)) and max(sizes) - min(sizes) <= 1
    again = rl_batch.split(batch, steps, seed)
    assert [p.sequence_index.tolist() for p in again] == [p.sequence_index.tolist() for p in parts]


def test_the_order_of_a_split_follows_its_seed() -> None:
    batch = rl_batch.assemble(make_groups(1, prompts=8), PRESETS["gspo"])
    orders = {tuple(rl_batch.split(batch, 1, seed)[0].sequence_index.tolist()) for seed in range(5)}
    assert len(orders) == 5


def test_a_token_without_a_log_prob_carries_no_penalty() -> None:
    """-inf: outside the learner's or the reference's support; the loss leaves the token out."""
    algorithm = dataclasses.replace(PRESETS["rloo"], kl=KL("k1", 1.0, "reward"), advantage=advantage("token-reward"))
    batch = passes(rl_batch.assemble(make_groups(2), algorithm))
    place = int(batch.response_mask.nonzero()[0])
    batch.old_log_probs[place] = -math.inf
    decided, metrics = rl_batch.with_decisions(batch, [batch], algorithm)
    assert decided.advantages.isfinite().all()
    assert math.isfinite(metrics["policy/kl_ref"].value())


def test_group_metrics_and_the_share_without_signal() -> None:
    groups = make_groups(0, prompts=4)
    wanted = [(0.0, 0.0), (1.0, 1.0), (1.0, 0.0, None), (None,)]
    for group, scores in zip(groups, wanted, strict=True):
        draw = np.random.default_rng(1)
        group.trajectories = [trajectory(draw, group.group_id, [1], i) for i in range(len(scores))]
        for t, score in zip(group.trajectories, scores, strict=True):
            t.score, t.shaped_reward, t.reward_failed = score, score and score - 0.25, score is None
    got = {name: metric.value() for name, metric in rl_batch.group_metrics(groups).items()}
    lengths = [len(t.response_ids) for group in groups for t in group.trajectories]
    assert got["reward/score"] == pytest.approx(3 / 6)
    assert got["reward/mean"] == pytest.approx((3 - 3 * 0.25) / 6)
    assert got["reward/failed_fraction"] == 2 / 8
    assert got["response/length_mean"] == sum(lengths) / 8 and got["response/length_max"] == max(lengths)
    assert got["groups/zero_std_fraction"] == 3 / 4 == rl_batch.without_signal(groups).value()
    assert got["groups/all_right_fraction"] == got["groups/all_wrong_fraction"] == 1 / 4
    assert got["groups/count"] == 4


def scored(first: int, *scores: tuple[float | None, ...], shaped: Any = None) -> list[PromptGroup]:
    """Groups p<first>, p<first + 1>, ... with these scores; the shaped reward differs from sample to sample."""
    groups = make_groups(first, prompts=len(scores), first=first)
    draw = np.random.default_rng(first)
    for group, row in zip(groups, scores, strict=True):
        prompt = list(group.prompt.token_ids)
        group.trajectories = [trajectory(draw, group.group_id, prompt, i) for i in range(len(row))]
        for i, (t, score) in enumerate(zip(group.trajectories, row, strict=True)):
            t.score, t.shaped_reward = score, None if score is None else (i if shaped is None else shaped)
    return groups


def names(groups: list[PromptGroup]) -> list[str]:
    return [group.prompt.prompt_id for group in groups]


DYNAMIC = PRESETS["dapo"]


def test_the_pool_decides_on_the_unshaped_score() -> None:
    pool = GroupPool(DYNAMIC)
    pool.add(scored(0, (0.0, 0.0), (1.0, 1.0), (0.0, None), (None, None)))  # only the shaped rewards differ
    assert pool.waiting == []
    pool.add(scored(4, (0.0, 1.0), (1.0, 0.5, 0.5), shaped=0.0))  # only the scores differ
    assert names(pool.waiting) == ["p4", "p5"]


def test_the_pool_keeps_the_surplus_and_refills() -> None:
    good, bad = (0.0, 1.0), (1.0, 1.0)
    pool = GroupPool(DYNAMIC)
    assert pool.missing(4) == 4
    pool.add(scored(0, good, bad, bad, bad))
    assert pool.missing(4) == 4, "3 short at a kept share of 1 / 4 would be 12, but never more than a step's at once"
    pool.add(scored(4, good, good, bad, good))
    assert pool.missing(4) == 0
    pool.add(scored(8, good, good))
    groups, metrics = pool.take(4)
    assert names(groups) == ["p0", "p4", "p5", "p7"]
    assert names(pool.waiting) == ["p8", "p9"], "the surplus waits, in the order it was sampled"
    assert metrics == {
        "groups/sampled": Sum(10),
        "groups/kept": Sum(6),
        "groups/sampling_rounds": Sum(3),
        "groups/carried_over": Sum(2),
    }
    assert pool.missing(4) == 2 and pool.missing(2) == 0
    groups, metrics = pool.take(4)
    assert names(groups) == ["p8", "p9"] and pool.waiting == []
    assert metrics["groups/sampled"] == metrics["groups/kept"] == metrics["groups/sampling_rounds"] == Sum(0)


def test_the_pool_asks_for_more_when_few_were_kept() -> None:
    good, bad = (0.0, 1.0), (0.0, 0.0)
    pool = GroupPool(DYNAMIC)
    pool.add(scored(0, good, bad, good, good, bad, good, bad, bad))
    assert pool.missing(8) == 8, "4 short, half are kept"
    pool.add(scored(8, good, good, good, bad))
    assert pool.missing(8) == math.ceil(1 / (7 / 12))
    nothing = GroupPool(DYNAMIC)
    nothing.add(scored(0, bad, bad))
    assert nothing.missing(8) == 8


def test_without_a_filter_every_group_is_taken() -> None:
    pool = GroupPool(PRESETS["grpo"])
    pool.add(scored(0, (1.0, 1.0), (None,), (0.0, 1.0)))
    assert pool.missing(3) == 0
    groups, _ = pool.take(3)
    assert names(groups) == ["p0", "p1", "p2"] and pool.waiting == []


@usual
@given(st.integers(0, 2**31), st.integers(0, 5))
def test_what_waits_survives_a_checkpoint(seed: int, prompts: int) -> None:
    """Through JSON and back: every field of every trajectory, bit by bit."""
    pool, again = GroupPool(PRESETS["grpo"]), GroupPool(PRESETS["grpo"])
    pool.add(make_groups(seed, prompts) if prompts else [])
    again.load_state_dict(json.loads(json.dumps(pool.state_dict())))
    assert [g.group_id for g in again.waiting] == [g.group_id for g in pool.waiting]
    for got, expected in zip(again.waiting, pool.waiting, strict=True):
        assert got.prompt == expected.prompt
        for a, b in zip(got.trajectories, expected.trajectories, strict=True):
            for field in dataclasses.fields(Trajectory):
                one, other = getattr(a, field.name), getattr(b, field.name)
                if isinstance(other, np.ndarray):
                    assert one.dtype == other.dtype and np.array_equal(one, other), field.name
                else:
                    assert one == other, field.name
    assert again.take(9)[1]["groups/sampled"] == Sum(0), "nothing of the step before is counted again"
