"""What holds for any composition of axes: the specification's U1 and U3 to U8, U10 and U11, in float64."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from megarl.algorithms import (
    KL,
    PRESETS,
    Algorithm,
    Correction,
    Counts,
    LossInputs,
    Outcomes,
    ValueLoss,
    advantage,
    count,
    gate,
    mismatch_weights,
    policy_loss,
    shaping,
    token_weights,
    value_loss,
)
from megarl.algorithms.aggregate import AGGREGATIONS
from megarl.algorithms.correction import CURRENT, MODES, current_weights
from megarl.algorithms.correction import LEVELS as CORRECTION_LEVELS
from megarl.algorithms.ratio import LEVELS
from megarl.types import SequenceShards
from tests.unit.algorithm_steps import (
    CLOSE,
    CONTEXT_PARALLEL,
    NAN,
    Rollout,
    algorithms,
    estimators,
    examples,
    expand,
    gates,
    make_rollout,
    rollouts,
    splits,
    take_step,
    token_advantages,
)

many = examples(60)
some = examples(25)


def values(metrics: dict) -> dict[str, float]:
    return {name: metric.value() for name, metric in metrics.items()}


def reported(metrics: dict) -> object:
    return pytest.approx(values(metrics), abs=1e-12, rel=1e-10, nan_ok=True)


@many
@given(algorithms(), rollouts, st.data())
def test_any_split_over_ranks_micro_batches_and_order_is_the_same_step(
    algorithm: Algorithm, r: Rollout, data: st.DataObject
) -> None:
    """U3 and U4: loss, gradient and every metric."""
    whole = take_step(algorithm, r)
    split = take_step(algorithm, r, parts=data.draw(splits(len(r))))
    torch.testing.assert_close(split.loss, whole.loss, **CLOSE)
    torch.testing.assert_close(split.gradient, whole.gradient, **CLOSE)
    assert values(split.metrics) == reported(whole.metrics)


@many
@given(algorithms(), rollouts, st.data())
def test_any_sharding_of_the_tokens_over_context_parallel_ranks_is_the_same_step(
    algorithm: Algorithm, r: Rollout, data: st.DataObject
) -> None:
    """U3: however the tokens of a sequence are spread, also when a rank has none of them."""
    ranks = st.integers(0, CONTEXT_PARALLEL - 1)
    owner = torch.tensor(data.draw(st.lists(ranks, min_size=len(r.ids), max_size=len(r.ids))))
    whole = take_step(algorithm, r)
    sharded = take_step(algorithm, r, parts=data.draw(splits(len(r))), owner=owner)
    torch.testing.assert_close(sharded.loss, whole.loss, **CLOSE)
    torch.testing.assert_close(sharded.gradient, whole.gradient, **CLOSE)
    assert values(sharded.metrics) == reported(whole.metrics)


@some
@given(rollouts, st.sampled_from([None, 0.05, 0.5]), st.sampled_from(list(AGGREGATIONS)), st.data())
def test_any_split_is_the_same_step_of_the_critic(
    r: Rollout, clip: float | None, aggregate: str, data: st.DataObject
) -> None:
    counts = Counts.from_tensor(count(r.mask, r.ids, len(r)))
    weights = token_weights(aggregate, r.mask, r.ids, counts, fixed_length=7)
    new = r.values + 0.3 * r.log_probs

    def run(parts: list[list[int]]) -> tuple[Tensor, Tensor, dict]:
        leaf, loss, metrics = new.clone().requires_grad_(), torch.zeros((), dtype=torch.float64), {}
        for part in parts:
            own = torch.isin(r.ids, torch.tensor(part, dtype=torch.int64))
            share, metrics = value_loss(
                ValueLoss(clip), leaf[own], r.values[own], r.old_log_probs[own], weights[own], r.mask[own]
            )
            loss = loss + share
        loss.backward()
        return loss.detach(), leaf.grad, metrics

    whole, split = run([list(range(len(r)))]), run(data.draw(splits(len(r))))
    torch.testing.assert_close(split[0], whole[0], **CLOSE)
    torch.testing.assert_close(split[1], whole[1], **CLOSE)


@many
@given(algorithms(), rollouts, st.sampled_from([NAN, math.inf, -math.inf, 1e300]))
def test_what_is_outside_the_mask_has_no_effect(algorithm: Algorithm, r: Rollout, junk: float) -> None:
    """U5, from the advantages on."""
    clean, dirty = take_step(algorithm, r), take_step(algorithm, r.padded_with(junk))
    assert torch.equal(dirty.loss, clean.loss)
    assert torch.equal(dirty.gradient, clean.gradient)
    assert values(dirty.metrics) == reported(clean.metrics)


@many
@given(algorithms(), rollouts)
def test_a_batch_without_a_trained_token_gives_exactly_zero(algorithm: Algorithm, r: Rollout) -> None:
    """U6: what is not trained on may hold anything; nothing was observed either."""
    r = r.replace(mask=torch.zeros_like(r.mask)).padded_with(NAN)
    step = take_step(algorithm, r)
    assert token_advantages(algorithm, r).isfinite().all()
    assert step.loss == 0
    assert torch.equal(step.gradient, torch.zeros_like(step.gradient))
    assert math.isnan(step.metrics["policy/ratio_max"].value())


@many
@given(st.sampled_from(list(LEVELS)), rollouts, st.data())
def test_groups_without_a_signal_do_not_move_the_policy(ratio: str, r: Rollout, data: st.DataObject) -> None:
    """U6: groups of one, and groups whose rewards differ by rounding noise at most."""
    kind = data.draw(
        st.sampled_from(
            [advantage("group", scale=scale) for scale in ("std", "none", "batch")]
            + [advantage("leave-one-out"), advantage("group-mean-then-whiten")]
        )
    )
    if data.draw(st.booleans()):
        r = r.replace(group_index=torch.arange(len(r)))
    else:
        noise = 1e-8 if kind.type == "group" else 0.0
        r = r.replace(rewards=torch.where(torch.arange(len(r)) % 2 == 0, 0.1 + noise, 0.1).double())
    algorithm = Algorithm(kind, ratio, data.draw(gates(ratio)), "token-mean")
    assert token_advantages(algorithm, r).eq(0).all()
    assert take_step(algorithm, r).gradient.eq(0).all()


@some
@given(rollouts, st.data())
def test_an_empty_response_only_counts_in_the_denominator(r: Rollout, data: st.DataObject) -> None:
    """U6: n_seq `all` keeps its place, `valid` does not."""
    algorithm = data.draw(algorithms())
    empty = make_rollout(data.draw(st.integers(0, 99)), sequences=1)
    both = Rollout(
        ids=torch.cat([r.ids, empty.ids + len(r)]),
        group_index=torch.cat([r.group_index, torch.tensor([99])]),
        rewards=torch.cat([r.rewards, torch.tensor([NAN], dtype=torch.float64)]),
        mask=torch.cat([r.mask, torch.zeros_like(empty.mask)]),
        **{name: torch.cat([getattr(r, name), getattr(empty, name)]) for name in Rollout.PER_TOKEN},
    )
    before, after = take_step(algorithm, r), take_step(algorithm, both)
    nonempty = len(r.ids[r.mask > 0].unique())
    per_sequence = algorithm.aggregate != "token-mean" and algorithm.n_seq == "all" and nonempty > 0
    scale = len(r) / (len(r) + 1) if per_sequence else 1.0
    torch.testing.assert_close(after.loss, before.loss * scale, **CLOSE)
    torch.testing.assert_close(after.gradient[: len(r.ids)], before.gradient * scale, **CLOSE)
    assert after.gradient[len(r.ids) :].eq(0).all()


@many
@given(algorithms(), rollouts)
def test_before_the_first_update_every_algorithm_is_reinforce_with_its_own_weights(
    algorithm: Algorithm, r: Rollout
) -> None:
    """U1: with the learner, the old policy, the engine and the reference equal, no gate and no correction acts."""
    assume(algorithm.kl is None or algorithm.kl.placement == "reward" or algorithm.kl.estimator != "k1")
    same = dict.fromkeys(("old_log_probs", "rollout_log_probs", "ref_log_probs"), r.log_probs)
    step = take_step(algorithm, r.replace(**same))
    counts = Counts.from_tensor(count(r.mask, r.ids, len(r)))
    weights = algorithm.token_weights(r.mask, r.ids, counts)
    if algorithm.ratio == "sequence-product" and algorithm.gate.type != "stop-gradient-weight":
        # the ratio of a product moves n_i times as fast as that of a mean
        weights = weights * torch.zeros(len(r), dtype=torch.float64).index_add_(0, r.ids, r.mask)[r.ids]
    torch.testing.assert_close(step.gradient, -weights * token_advantages(algorithm, r.replace(**same)), **CLOSE)


@some
@given(rollouts, st.floats(0.1, 9.0))
def test_the_published_algorithms_start_with_one_gradient(r: Rollout, tau: float) -> None:
    """U1, by name: all with sequence-mean weights; DAPO and CISPO with a token mean."""
    r = r.replace(old_log_probs=r.log_probs)
    names = ("grpo", "gspo", "gspo_token", "sapo", "cispo", "gmpo")
    made = {name: dataclasses.replace(PRESETS[name], aggregate="seq-mean-token-mean", kl=None) for name in names}
    made["sapo, any tau"] = dataclasses.replace(made["sapo"], gate=gate("soft", tau_pos=tau, tau_neg=2 * tau))
    gradients = {name: take_step(algorithm, r).gradient for name, algorithm in made.items()}
    for gradient in gradients.values():
        torch.testing.assert_close(gradient, gradients["grpo"], **CLOSE)
    dapo = dataclasses.replace(PRESETS["dapo"], filter=None, shaping=None)
    torch.testing.assert_close(take_step(dapo, r).gradient, take_step(PRESETS["cispo"], r).gradient, **CLOSE)


@some
@given(algorithms(), rollouts)
def test_absent_old_log_probs_mean_that_the_ratio_is_one(algorithm: Algorithm, r: Rollout) -> None:
    algorithm = dataclasses.replace(algorithm, ratio_base="old", correction=None, veto=None)
    r = r.replace(old_log_probs=r.log_probs)
    counts = Counts.from_tensor(count(r.mask, r.ids, len(r)))
    leaf = r.log_probs.clone().requires_grad_()
    inputs = LossInputs(
        leaf,
        token_advantages(algorithm, r),
        algorithm.token_weights(r.mask, r.ids, counts),
        r.mask,
        ref_log_probs=r.ref_log_probs,
    )
    loss, _ = policy_loss(algorithm, inputs, SequenceShards(r.ids, len(r)))
    loss.backward()
    present = take_step(algorithm, r)
    assert torch.equal(loss.detach(), present.loss)
    assert torch.equal(leaf.grad, present.gradient)


@some
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=12),
    st.floats(0.1, 10),
    st.floats(-5, 5),
)
def test_an_affine_change_of_reward_leaves_grpo_alone_and_scales_dr_grpo(
    rows: list[tuple[int, int]], a: float, b: float
) -> None:
    """U7, up to the eps beside the std."""
    group_index, rewards = torch.tensor([g for g, _ in rows]), torch.tensor([float(x) for _, x in rows])
    plain, changed = Outcomes(rewards, group_index), Outcomes(a * rewards.double() + b, group_index)
    close = {"atol": 1e-11, "rtol": 1e-11}
    for scale in ("std", "batch"):
        exact, usual = advantage("group", scale=scale, eps=0.0), advantage("group", scale=scale, eps=1e-6)
        torch.testing.assert_close(exact(changed).advantages, exact(plain).advantages, **close)
        torch.testing.assert_close(usual(changed).advantages, usual(plain).advantages, atol=1e-3, rtol=0)
    for scaled in (advantage("group", scale="none"), advantage("leave-one-out")):
        torch.testing.assert_close(scaled(changed).advantages, a * scaled(plain).advantages, **close)


@some
@given(rollouts, st.sampled_from(list(CORRECTION_LEVELS)), st.sampled_from(list(MODES)))
def test_an_engine_that_agrees_with_the_learner_is_not_corrected(r: Rollout, level: str, mode: str) -> None:
    """U8, also for the weight of the policy as it is now, and the veto."""
    shards = SequenceShards(r.ids, len(r))
    found = mismatch_weights(Correction(level, mode, 0.5, 1.5), 0.99, r.old_log_probs, r.old_log_probs, r.mask, shards)
    assert found.weights.eq(1).all()
    assert not found.vetoed.any()
    current = Correction(CURRENT, mode, 0.5, 1.5)
    assert current_weights(current, r.log_probs, r.log_probs, r.mask).eq(1).all()


@some
@given(st.lists(st.floats(-3, 3), min_size=1, max_size=20))
def test_k3_is_a_penalty_and_k3_plus_has_its_value_and_the_gradient_of_k2(kappa: list[float]) -> None:
    """U10."""
    log_probs = torch.tensor(kappa, dtype=torch.float64).requires_grad_()
    ref, ratio = torch.zeros_like(log_probs), torch.ones_like(log_probs)
    value = {e: KL(e, input_clamp=None, output_clamp=None)(log_probs, ref, ratio) for e in ("k1", "k2", "k3", "k3+")}
    grad = {e: torch.autograd.grad(v.sum(), log_probs)[0] for e, v in value.items()}
    assert (value["k3"] >= 0).all()
    assert (value["k3"][log_probs.abs() > 1e-3] > 0).all()
    torch.testing.assert_close(value["k3+"], value["k3"], atol=1e-15, rtol=1e-14)
    torch.testing.assert_close(grad["k3+"], grad["k2"], atol=0, rtol=0)
    kappa = log_probs.detach()
    torch.testing.assert_close(value["k2"].detach(), kappa**2 / 2, **CLOSE)
    torch.testing.assert_close(value["k3"].detach(), torch.exp(-kappa) - 1 + kappa, **CLOSE)
    torch.testing.assert_close(grad["k2"], kappa, **CLOSE)
    torch.testing.assert_close(grad["k3"], 1 - torch.exp(-kappa), **CLOSE)
    torch.testing.assert_close(grad["k1"], torch.ones_like(kappa), **CLOSE)


def test_k3_weighted_with_the_ratio_has_the_gradient_of_the_kl() -> None:
    """d(r k3) = r kappa, where k3 alone has 1 - exp(-kappa)."""
    old, ref = torch.tensor([-1.0, -2.0, -0.5]).double(), torch.tensor([-1.5, -1.0, -0.7]).double()
    leaf = torch.tensor([-0.8, -2.2, -0.5]).double().requires_grad_()
    KL("k3-is", input_clamp=None, output_clamp=None)(leaf, ref, (leaf - old).exp()).sum().backward()
    torch.testing.assert_close(leaf.grad, (leaf - old).exp().detach() * (leaf - ref).detach(), **CLOSE)


def test_the_soft_overlong_penalty_at_its_four_corners() -> None:
    """U11, with the budget of the run standing for an unset max_length and a fifth of it for the cache."""
    longest, cache = 20480, 4096
    lengths = torch.tensor([0, longest - cache, longest - cache + 1, longest - cache // 2, longest, longest + 1])
    expected = torch.tensor([0.0, 0.0, -1 / cache, -0.5, -1.0, -1.0], dtype=torch.float64)
    for made in (shaping("soft-overlong", max_length=longest, cache=cache), shaping("soft-overlong")):
        torch.testing.assert_close(made(lengths, longest), expected, atol=0, rtol=0)
    with pytest.raises(ValueError, match="cache 11 must be between 1 and max_length 10"):
        shaping("soft-overlong", cache=11)(lengths, 10)


def one_token(r: Rollout, data: st.DataObject) -> int:
    trained = r.mask.nonzero()[:, 0].tolist()
    assume(trained)
    return data.draw(st.sampled_from(trained))


@some
@given(st.sampled_from(list(LEVELS)), rollouts, st.booleans(), st.data())
def test_a_token_outside_the_support_is_left_out_and_counted(
    ratio: str, r: Rollout, in_old: bool, data: st.DataObject
) -> None:
    """-inf from either policy: as if the token were masked, under the denominators from before."""
    place, plain = one_token(r, data), data.draw(algorithms([ratio]))
    algorithm = dataclasses.replace(plain, kl=None, correction=None, veto=None)
    advantages = token_advantages(algorithm, r)
    weights = algorithm.token_weights(r.mask, r.ids, Counts.from_tensor(count(r.mask, r.ids, len(r))))
    without = r.mask.clone()
    without[place] = 0
    base = "rollout_log_probs" if algorithm.ratio_base == "rollout" else "old_log_probs"
    name = base if in_old else "log_probs"

    def run(fields: dict[str, Tensor], mask: Tensor) -> tuple[Tensor, Tensor, dict]:
        leaf = fields["log_probs"].clone().requires_grad_()
        inputs = LossInputs(
            leaf, advantages, weights, mask, fields["old_log_probs"], rollout_log_probs=fields["rollout_log_probs"]
        )
        loss, metrics = policy_loss(algorithm, inputs, SequenceShards(r.ids, len(r)))
        loss.backward()
        return loss.detach(), leaf.grad, values(metrics)

    fields = {name: getattr(r, name) for name in Rollout.PER_TOKEN}
    lost = fields[name].clone()
    lost[place] = -math.inf
    expected, got = run(fields, without), run(fields | {name: lost}, r.mask)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])
    assert got[2].pop("policy/dropped_tokens") == 1
    assert expected[2].pop("policy/dropped_tokens") == 0
    assert got[2] == pytest.approx(expected[2], abs=0, rel=0, nan_ok=True)


@many
@given(algorithms(), rollouts, st.data())
def test_a_nan_log_prob_reaches_the_loss(algorithm: Algorithm, r: Rollout, data: st.DataObject) -> None:
    """Whatever gate, correction or filter the token falls under: the trainer's finite check has to see it."""
    broken = r.log_probs.clone()
    broken[one_token(r, data)] = NAN
    assert math.isnan(take_step(algorithm, r.replace(log_probs=broken)).loss)


@many
@given(rollouts, st.data())
def test_a_sequence_that_could_not_be_scored_moves_nobody_else(r: Rollout, data: st.DataObject) -> None:
    """A reward of NaN: advantage 0, and no part in any statistic."""
    estimator = data.draw(estimators(constant=False))
    unscored = r.rewards.isnan()
    trained, scored, kept = r.mask > 0, ~unscored[r.ids], (~unscored).nonzero()[:, 0]
    penalty = 0.1 * r.ref_log_probs
    ids = torch.searchsorted(kept, r.ids[scored])
    found = estimator(Outcomes(r.rewards, r.group_index, r.mask, r.ids, penalty, r.values))
    alone = estimator(
        Outcomes(r.rewards[kept], r.group_index[kept], r.mask[scored], ids, penalty[scored], r.values[scored])
    )
    per_token = expand(found.advantages, r.ids)
    assert per_token[~scored].eq(0).all()
    torch.testing.assert_close(per_token[scored], expand(alone.advantages, ids), **CLOSE)
    if found.returns is not None:  # and its values stay what they are
        torch.testing.assert_close(found.returns[scored], alone.returns, **CLOSE)
        torch.testing.assert_close(found.returns[trained & ~scored], r.values[trained & ~scored], **CLOSE)
