"""Loss and gradient of every gate at every ratio level, and every correction, against plain-Python closed forms.

The formulas are those of the specification's sections b.0, b.3, b.9 to b.14: per token, in floats, without autograd.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from megarl.algorithms import (
    PRESETS,
    Algorithm,
    Correction,
    Counts,
    LossInputs,
    ValueLoss,
    advantage,
    count,
    gate,
    mismatch_weights,
    policy_loss,
    token_weights,
    value_loss,
)
from megarl.algorithms.aggregate import AGGREGATIONS
from megarl.algorithms.correction import CURRENT, MODES
from megarl.algorithms.correction import LEVELS as CORRECTION_LEVELS
from megarl.algorithms.presets import SEQUENCE_LEVELS
from megarl.algorithms.ratio import LEVELS
from megarl.types import SequenceShards
from tests.unit.algorithm_steps import CLOSE, NAN, Rollout, examples, gates, rollouts, take_step

usual = examples(25)
AGGREGATES = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "fixed-length")
FIXED_LENGTH = 7


def members(r: Rollout) -> list[list[int]]:
    """The trained tokens of each sequence."""
    rows: list[list[int]] = [[] for _ in range(len(r))]
    for token, sequence in enumerate(r.ids.tolist()):
        if r.mask[token] > 0:
            rows[sequence].append(token)
    return rows


def weights_by_hand(aggregate: str, rows: list[list[int]], n_seq: str = "all") -> dict[int, float]:
    """W of b.0 for each trained token."""
    sequences = len(rows) if n_seq == "all" else sum(bool(row) for row in rows)
    total = sum(len(row) for row in rows)
    by_row = {
        "token-mean": lambda n: 1 / total,
        "seq-mean-token-mean": lambda n: 1 / (n * sequences),
        "seq-mean": lambda n: 1 / (n * sequences),
        "seq-mean-token-sum": lambda n: 1 / sequences,
        "fixed-length": lambda n: 1 / (sequences * FIXED_LENGTH),
    }
    return {token: by_row[aggregate](len(row)) for row in rows for token in row}


@dataclasses.dataclass(frozen=True)
class ByHand:
    """The objective of one token, its derivative with respect to that token's log-prob, and how near a bound it is."""

    objective: float
    slope: float
    margin: float = math.inf


def gate_by_hand(kind: str, s: dict, level: str, ratio: float, a: float, log_prob: float) -> ByHand:
    """What a gate makes of one token; `ratio` is the one at its level (the token's at level `none`)."""
    value, slope = (a * log_prob, a) if level == "none" else (a * ratio, a * ratio)
    if kind == "none":
        return ByHand(value, slope)
    if kind == "soft":
        tau = s["tau_pos"] if a > 0 else s["tau_neg"]
        p = 1 / (1 + math.exp(-tau * (ratio - 1)))
        return ByHand(a * 4 / tau * p, a * ratio / math.cosh(tau * (ratio - 1) / 2) ** 2)
    low, high = 1 - s["low"], 1 + s["high"]
    margin = min(abs(ratio - low), abs(ratio - high))
    if kind == "stop-gradient-weight":
        weight = min(max(ratio, low), high)
        return ByHand(weight * a * log_prob, weight * a, margin)
    closed = (a > 0 and ratio > high) or (a < 0 and ratio < low)
    if kind == "ratio-mask":
        return ByHand(0.0, 0.0, margin) if closed else ByHand(value, slope, margin)
    assert kind == "clip"
    value = min(a * ratio, a * min(max(ratio, low), high))
    if s["dual"] is not None and a < 0:
        margin = min(margin, abs(ratio - s["dual"]))
        closed, value = closed or ratio > s["dual"], max(value, a * s["dual"])
    return ByHand(value, 0.0 if closed else slope, margin)


def tokens_by_hand(algorithm: Algorithm, r: Rollout, advantages: Tensor) -> dict[int, ByHand]:
    """Every trained token of a batch under an algorithm's ratio and gate."""
    kind, s, level = algorithm.gate.type, dict(algorithm.gate.settings), algorithm.ratio
    new, old, a = r.log_probs.tolist(), r.old_log_probs.tolist(), advantages.tolist()
    out = {}
    for row in members(r):
        z = {t: new[t] - old[t] for t in row}
        mean = sum(z.values()) / max(len(row), 1)
        power = len(row) if level == "sequence-product" and kind != "stop-gradient-weight" else 1
        if kind == "log-clip":
            x = {"sequence": mean, "sequence-token": mean, "sequence-product": mean * len(row)}
            x = {t: x.get(level, z[t]) for t in row}
            beyond = {t: (a[t] > 0 and x[t] > s["high"]) or (a[t] < 0 and x[t] < -s["low"]) for t in row}
            clipped = {t: (s["high"] if a[t] > 0 else -s["low"]) if beyond[t] else x[t] for t in row}
            if level == "geometric-mean-of-clipped":
                clipped = dict.fromkeys(row, sum(clipped.values()) / max(len(row), 1))
            for t in row:
                value = a[t] * math.exp(clipped[t])
                margin = min(abs(x[t] - s["high"]), abs(x[t] + s["low"]))
                out[t] = ByHand(value, 0.0 if beyond[t] else power * value, margin)
            continue
        ratio = {"sequence": mean, "sequence-token": mean, "sequence-product": mean * len(row)}
        for t in row:
            found = gate_by_hand(kind, s, level, math.exp(ratio.get(level, z[t])), a[t], new[t])
            out[t] = dataclasses.replace(found, slope=power * found.slope)
    return out


def loss_and_gradient(
    found: dict[int, ByHand], weights: dict[int, float], n: int, factors: dict[int, float] | None = None
) -> tuple[float, Tensor]:
    """-sum W factor objective, and -W factor slope."""
    factors = factors or dict.fromkeys(found, 1.0)
    gradient = torch.zeros(n, dtype=torch.float64)
    for t, one in found.items():
        gradient[t] = -weights[t] * factors[t] * one.slope
    return -sum(weights[t] * factors[t] * one.objective for t, one in found.items()), gradient


def algorithm_with(ratio: str, made: object, aggregate: str) -> Algorithm:
    return Algorithm(advantage("group"), ratio, made, aggregate, fixed_length=FIXED_LENGTH)


def draw_advantages(r: Rollout, ratio: str, data: st.DataObject) -> Tensor:
    """Per sequence, or per token where the ratio level takes them; now and then 0."""
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    constant = ratio in SEQUENCE_LEVELS or data.draw(st.booleans())
    drawn = torch.randn(len(r) if constant else len(r.ids), generator=random, dtype=torch.float64)
    drawn = torch.where(torch.rand(drawn.shape, generator=random) < 0.1, 0.0, drawn)
    return drawn[r.ids] if constant else drawn


@pytest.mark.parametrize("ratio", LEVELS)
@usual
@given(r=rollouts, data=st.data())
def test_loss_and_gradient_at_random_points(ratio: str, r: Rollout, data: st.DataObject) -> None:
    algorithm = algorithm_with(ratio, data.draw(gates(ratio)), data.draw(st.sampled_from(AGGREGATES)))
    advantages = draw_advantages(r, ratio, data)
    found, rows = tokens_by_hand(algorithm, r, advantages), members(r)
    assume(all(one.margin > 1e-9 for one in found.values()))
    loss, gradient = loss_and_gradient(found, weights_by_hand(algorithm.aggregate, rows), len(r.ids))
    step = take_step(algorithm, r, advantages)
    assert step.loss.item() == pytest.approx(loss, abs=1e-12, rel=1e-12)
    torch.testing.assert_close(step.gradient, gradient, **CLOSE)


@pytest.mark.parametrize("ratio", LEVELS)
@usual
@given(r=rollouts, data=st.data())
def test_the_gradient_is_the_slope_of_the_loss(ratio: str, r: Rollout, data: st.DataObject) -> None:
    """Central differences along random directions; the weight of a stop-gradient gate held where it was.

    With one advantage per sequence: else the sequence-token ratio has, by design, a gradient of its own.
    """
    algorithm = algorithm_with(ratio, data.draw(gates(ratio)), data.draw(st.sampled_from(AGGREGATES)))
    advantages = draw_advantages(r, "sequence" if ratio == "sequence-token" else ratio, data)
    assume(all(one.margin > 1e-4 for one in tokens_by_hand(algorithm, r, advantages).values()))
    step, h = take_step(algorithm, r, advantages), 1e-6
    direction = torch.randn(len(r.ids), generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def loss_at(distance: float) -> float:
        moved = r.replace(log_probs=r.log_probs + distance * direction)
        if algorithm.gate.type != "stop-gradient-weight":
            return take_step(algorithm, moved, advantages).loss.item()
        held = tokens_by_hand(algorithm, r, advantages)
        weights = weights_by_hand(algorithm.aggregate, members(r))
        return -sum(weights[t] * one.slope * moved.log_probs[t].item() for t, one in held.items())

    slope = (loss_at(h) - loss_at(-h)) / (2 * h)
    rounding = 3e-9 * (1 + abs(step.loss.item()))  # of a difference over 2e-6
    assert (step.gradient * direction).sum().item() == pytest.approx(slope, abs=rounding, rel=1e-7)


@usual
@given(rollouts, st.data())
def test_a_sequence_ratio_has_the_gradient_of_the_sequence_objective(r: Rollout, data: st.DataObject) -> None:
    """Against autograd through s_i with the collective inside, as published: no stop-gradient form."""
    made = data.draw(gates("sequence").filter(lambda g: g.type in ("none", "clip", "soft")))
    product = data.draw(st.booleans())
    advantages = draw_advantages(r, "sequence", data)
    leaf = r.log_probs.clone().requires_grad_()
    lengths = torch.zeros(len(r), dtype=torch.float64).index_add(0, r.ids, r.mask)
    z = torch.zeros(len(r), dtype=torch.float64).index_add(0, r.ids, (leaf - r.old_log_probs) * r.mask)
    s = z.exp() if product else (z / lengths.clamp(min=1)).exp()
    a = torch.zeros(len(r), dtype=torch.float64).index_copy(0, r.ids, advantages)
    set_to, trained = dict(made.settings), lengths > 0
    if made.type == "soft":
        tau = torch.where(a > 0, a.new_tensor(set_to["tau_pos"]), a.new_tensor(set_to["tau_neg"]))
        objective = a * 4 / tau * torch.sigmoid(tau * (s - 1))
    else:
        low, high = (-9.0, 1e9) if made.type == "none" else (1 - set_to["low"], 1 + set_to["high"])
        objective = torch.minimum(a * s, a * s.clamp(low, high))
        if set_to.get("dual") is not None:
            objective = torch.where(a < 0, torch.maximum(objective, a * set_to["dual"]), objective)
    expected = -objective[trained].sum() / len(r)
    expected.backward()
    step = take_step(algorithm_with("sequence-product" if product else "sequence", made, "seq-mean"), r, advantages)
    torch.testing.assert_close(step.loss, expected.detach(), **CLOSE)
    torch.testing.assert_close(step.gradient, leaf.grad, **CLOSE)


@usual
@given(rollouts, st.data())
def test_gspo_token_is_gspo_for_an_advantage_per_sequence(r: Rollout, data: st.DataObject) -> None:
    made = data.draw(gates("sequence"))
    advantages = draw_advantages(r, "sequence", data)
    a = take_step(algorithm_with("sequence", made, "seq-mean-token-mean"), r, advantages)
    b = take_step(algorithm_with("sequence-token", made, "seq-mean-token-mean"), r, advantages)
    assert torch.equal(a.loss, b.loss)
    assert torch.equal(a.gradient, b.gradient)


def moved_by(log_ratio: list[float], algorithm: Algorithm) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Loss, gradient and metrics of one sequence with these token log-ratios, advantage and token weights 1."""
    leaf = torch.tensor(log_ratio, dtype=torch.float64).requires_grad_()
    one = torch.ones_like(leaf).detach()
    shards = SequenceShards(torch.zeros(len(leaf), dtype=torch.int64), 1)
    loss, metrics = policy_loss(algorithm, LossInputs(leaf, one, one, one, torch.zeros_like(one)), shards)
    loss.backward()
    return loss.detach(), leaf.grad, {name: metric.value() for name, metric in metrics.items()}


def test_the_soft_gate_s_table() -> None:
    """b.10: w(r) = sech^2(tau (r - 1) / 2), which multiplies the unbounded gradient A r."""
    table = {0.5: 0.940, 0.8: 0.990, 1.0: 1.0, 1.2: 0.990, 1.5: 0.940, 2.0: 0.786, 3.0: 0.420, 5.0: 0.071}
    soft = algorithm_with("token", gate("soft", tau_pos=1.0), "token-mean")
    _, gradient, metrics = moved_by([math.log(ratio) for ratio in table], soft)
    weight = -gradient / torch.tensor(list(table), dtype=torch.float64)
    torch.testing.assert_close(weight, torch.tensor(list(table.values())).double(), atol=5e-4, rtol=0)
    assert metrics["policy/gate_half_closed_frac"] == 2 / 8
    assert metrics["policy/gate_min_pos"] == pytest.approx(weight.min().item())


@pytest.mark.parametrize(
    ("level", "drift", "bound"), [("token", 25.0, 20.0), ("sequence", 12.0, 10.0), ("sequence-product", 9.0, 20.0)]
)
def test_beyond_the_clamp_the_ratio_stands_still_without_gradient(level: str, drift: float, bound: float) -> None:
    loss, gradient, metrics = moved_by([drift] * 3, algorithm_with(level, gate("none"), "token-mean"))
    assert loss.item() == pytest.approx(-3 * math.exp(bound), rel=1e-12)
    assert gradient.eq(0).all()
    assert metrics["policy/clamped_frac"] == 1


def test_float32_keeps_the_gspo_band_apart() -> None:
    """A sequence just inside and one just outside a band of 4e-4, in float32."""
    ids = torch.tensor([0] * 100 + [1] * 100)
    old = torch.linspace(-4, -0.1, 200)
    new = old + torch.tensor([3.9e-4, 4.1e-4])[ids]
    inputs = LossInputs(new, torch.ones(200), torch.full((200,), 0.005), torch.ones(200), old)
    _, metrics = policy_loss(PRESETS["gspo"], inputs, SequenceShards(ids, 2))
    assert metrics["policy/clip_seq_frac"].value() == pytest.approx(0.5)


@usual
@given(rollouts, st.sampled_from(list(AGGREGATIONS)), st.sampled_from(["all", "valid"]))
def test_weights_follow_their_definitions(r: Rollout, aggregate: str, n_seq: str) -> None:
    counts = Counts.from_tensor(count(r.mask, r.ids, len(r)))
    got = token_weights(aggregate, r.mask, r.ids, counts, n_seq=n_seq, fixed_length=FIXED_LENGTH)
    expected = torch.zeros_like(r.mask)
    for token, weight in weights_by_hand(aggregate, members(r), n_seq).items():
        expected[token] = weight
    torch.testing.assert_close(got, expected, **CLOSE)


def test_denominators_are_those_of_all_ranks() -> None:
    mask, ids = torch.tensor([1, 1, 0, 1, 0.0]), torch.tensor([0, 0, 0, 1, 2])
    counts = Counts.from_tensor(count(mask, ids, 3) + torch.tensor([7.0, 2.0, 1.0]))  # another rank's share
    assert counts == Counts(tokens=10, sequences=5, nonempty=3)
    expected = {
        ("token-mean", "all"): [0.1, 0.1, 0, 0.1, 0],
        ("seq-mean-token-mean", "all"): [0.1, 0.1, 0, 0.2, 0],
        ("seq-mean-token-mean", "valid"): [1 / 6, 1 / 6, 0, 1 / 3, 0],
        ("seq-mean-token-sum", "all"): [0.2, 0.2, 0, 0.2, 0],
        ("fixed-length", "all"): [0.05, 0.05, 0, 0.05, 0],
    }
    for (aggregate, n_seq), weights in expected.items():
        got = token_weights(aggregate, mask, ids, counts, n_seq=n_seq, fixed_length=4)
        torch.testing.assert_close(got, torch.tensor(weights))
    with pytest.raises(ValueError, match="needs fixed_length"):
        token_weights("fixed-length", mask, ids, counts)


def correction_by_hand(level: str, mode: str, low: float, high: float, d: dict[int, float]) -> dict[int, float]:
    """b.14 for the tokens of one sequence; d = log rho."""
    total = sum(d.values())
    at_level = {"sequence-product": total, "sequence-mean": total / max(len(d), 1)}
    out = {}
    for t, own in d.items():
        rho = math.exp(at_level.get(level, own))
        inside = low <= rho <= high
        out[t] = {
            "truncate": min(rho, high),
            "clip": min(max(rho, low), high),
            "mask": rho if inside else 0.0,
            "filter-then-token-weight": math.exp(own) if inside else 0.0,
        }[mode]
    return out


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("level", [*CORRECTION_LEVELS, CURRENT])
@usual
@given(
    r=rollouts,
    bounds=st.sampled_from([(0.0, 1.1), (0.7, 1.5)]),
    veto=st.sampled_from([None, 0.6]),
    opsm=st.sampled_from([None, 0.02]),
    renormalise=st.booleans(),
    data=st.data(),
)
def test_corrections_by_hand(
    level: str,
    mode: str,
    r: Rollout,
    bounds: tuple[float, float],
    veto: float | None,
    opsm: float | None,
    renormalise: bool,
    data: st.DataObject,
) -> None:
    """Loss and gradient with the weight, the veto, the off-policy sequence mask and renormalised denominators."""
    renormalise = renormalise and level != CURRENT
    plain = algorithm_with("token", gate("clip", low=0.2, high=0.28), data.draw(st.sampled_from(AGGREGATES)))
    algorithm = dataclasses.replace(
        plain, correction=Correction(level, mode, *bounds, renormalise), veto=veto, off_policy_sequence_mask=opsm
    )
    advantages = draw_advantages(r, "sequence", data)
    new, old, engine = r.log_probs.tolist(), r.old_log_probs.tolist(), r.rollout_log_probs.tolist()
    factors, counted = {}, []
    for row in members(r):
        before = {t: old[t] - engine[t] for t in row}
        now = {t: new[t] - engine[t] for t in row}
        weights = correction_by_hand(level, mode, *bounds, now if level == CURRENT else before)
        if veto is not None and any(math.exp(x) < veto for x in before.values()):
            weights = dict.fromkeys(row, 0.0)
        counted.append([t for t in row if weights[t] > 0] if renormalise else row)
        away = sum(old[t] - new[t] for t in row) / max(len(row), 1)
        if opsm is not None and row and advantages[row[0]] < 0 and away > opsm:
            weights = dict.fromkeys(row, 0.0)
        factors |= weights
    found = tokens_by_hand(plain, r, advantages)
    weights = dict.fromkeys(found, 0.0) | (weights_by_hand(plain.aggregate, counted) if any(counted) else {})
    loss, gradient = loss_and_gradient(found, weights, len(r.ids), factors)
    step = take_step(algorithm, r, advantages)
    assert step.loss.item() == pytest.approx(loss, abs=1e-12, rel=1e-12)
    torch.testing.assert_close(step.gradient, gradient, **CLOSE)


@usual
@given(rollouts)
def test_minirl_by_hand(r: Rollout) -> None:
    """b.13: -M min(pi / mu, 5) A log pi, the ratio of the mask to the learner before the update."""
    advantages = draw_fixed(r)
    rows = members(r)
    weights = weights_by_hand("seq-mean-token-sum", rows)
    expected = torch.zeros(len(r.ids), dtype=torch.float64)
    for t in (t for row in rows for t in row):
        ratio, a = math.exp(r.log_probs[t] - r.old_log_probs[t]), advantages[t].item()
        if not ((a > 0 and ratio > 1.27) or (a < 0 and ratio < 0.8)):
            expected[t] = -weights[t] * min(math.exp(r.log_probs[t] - r.rollout_log_probs[t]), 5.0) * a
    torch.testing.assert_close(take_step(PRESETS["minirl"], r, advantages).gradient, expected, **CLOSE)


def draw_fixed(r: Rollout) -> Tensor:
    random = torch.Generator().manual_seed(5)
    return torch.randn(len(r), generator=random, dtype=torch.float64)[r.ids]


@usual
@given(rollouts, st.data())
def test_mismatch_metrics_are_those_from_before_any_rejection(r: Rollout, data: st.DataObject) -> None:
    made = Correction(
        data.draw(st.sampled_from(list(CORRECTION_LEVELS))), data.draw(st.sampled_from(list(MODES))), 0.8, 1.1
    )
    found = mismatch_weights(made, 0.6, r.old_log_probs, r.rollout_log_probs, r.mask, SequenceShards(r.ids, len(r)))
    trained = [t for row in members(r) for t in row]
    assume(trained)
    d = [(r.old_log_probs[t] - r.rollout_log_probs[t]).item() for t in trained]
    rho = [math.exp(x) for x in d]
    means = [sum(d[trained.index(t)] for t in row) / len(row) for row in members(r) if row]
    weights = found.weights[trained].tolist()
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    expected = {
        "rho_mean": mean(rho),
        "rho_min": min(rho),
        "rho_max": max(rho),
        "rho_seq_mean": mean([math.exp(m) for m in means]),
        "rho_seq_min": math.exp(min(means)),
        "rho_seq_max": math.exp(max(means)),
        "rho_product_mean": mean([math.exp(sum(d[trained.index(t)] for t in row)) for row in members(r) if row]),
        "rho_squared": mean([x * x for x in rho]),
        "kl_k1": mean([-x for x in d]),
        "kl_k3": mean([math.exp(x) - 1 - x for x in d]),
        "logprob_gap": mean([abs(x) for x in d]),
        "log_ppl_difference": mean([-m for m in means]),
        "weight_mean": mean(weights),
        "weight_squared": mean([w * w for w in weights]),
        "kept_frac": mean([float(w > 0) for w in weights]),
    }
    got = {name.removeprefix("mismatch/"): metric.value() for name, metric in found.metrics.items()}
    assert got == pytest.approx(expected, abs=1e-12, rel=1e-12)


@usual
@given(rollouts, st.sampled_from([None, 0.1, 0.5]), st.data())
def test_the_critic_s_loss_by_hand(r: Rollout, clip: float | None, data: st.DataObject) -> None:
    """b.3: half the larger of two squares; no gradient where the clipped one wins outside the band."""
    target, rows = r.rollout_log_probs, members(r)
    new = r.values + 0.4 * r.log_probs
    weights = weights_by_hand(data.draw(st.sampled_from(AGGREGATES)), rows)
    loss, gradient, clipped = 0.0, torch.zeros_like(new), 0
    for t, weight in weights.items():
        v, old, ret = new[t].item(), r.values[t].item(), target[t].item()
        near = old + max(-clip, min(clip, v - old)) if clip and abs(v - old) > clip else v
        assume(clip is None or abs(abs(v - old) - clip) > 1e-9)
        wins = (near - ret) ** 2 > (v - ret) ** 2
        clipped += wins
        loss += weight * 0.5 * max((v - ret) ** 2, (near - ret) ** 2)
        gradient[t] = 0.0 if wins else weight * (v - ret)
    leaf = new.where(r.mask > 0, NAN).requires_grad_()
    given_weights = torch.tensor([weights.get(t, 0.0) for t in range(len(new))], dtype=torch.float64)
    old, returns = r.values.where(r.mask > 0, NAN), target.where(r.mask > 0, NAN)
    got, metrics = value_loss(ValueLoss(clip), leaf, old, returns, given_weights, r.mask)
    got.backward()
    assert got.item() == pytest.approx(loss, abs=1e-12, rel=1e-12)
    torch.testing.assert_close(leaf.grad, gradient, **CLOSE)
    if weights:
        assert metrics["critic/clip_frac"].value() == pytest.approx(clipped / len(weights))


def test_a_value_within_its_clip_does_not_count_as_clipped():
    """V_old + (V - V_old) is V but for rounding, so one of the two squares is a little larger."""
    generator = torch.Generator().manual_seed(0)
    old, returns = torch.randn(2, 1000, generator=generator)
    values = old + torch.rand(1000, generator=generator) * 0.38 - 0.19
    ones = torch.ones(1000)
    _, metrics = value_loss(ValueLoss(0.2), values, old, returns, ones, ones)
    assert metrics["critic/clip_frac"].value() == 0
