"""What holds for any composition of axes, and how a configuration becomes one."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from megarl.algorithms import (
    GRPO,
    GSPO,
    KL,
    Algorithm,
    Counts,
    LossInputs,
    advantage,
    check,
    count,
    from_config,
    gate,
    group_relative,
    policy_loss,
    token_weights,
)
from megarl.algorithms.aggregate import AGGREGATIONS
from megarl.algorithms.gate import GATES
from megarl.algorithms.ratio import LEVELS
from megarl.types import SequenceShards

LENGTHS = torch.tensor([5, 1, 7, 3])
IDS = torch.repeat_interleave(torch.arange(4), LENGTHS)
N = int(LENGTHS.sum())


def compose(ratio: str, gate_type: str, aggregate: str = "seq-mean-token-mean", kl: KL | None = None) -> Algorithm:
    bounds = {"low": 0.2, "high": 0.28} if gate_type == "clip" else {}
    return Algorithm(advantage("group"), ratio, gate(gate_type, **bounds), aggregate, kl=kl, fixed_length=8)


WITHIN_REASON = [pair for pair in itertools.product(LEVELS, GATES) if pair != ("none", "clip")]
COMPOSITIONS = [compose(*pair, aggregate) for pair in WITHIN_REASON for aggregate in AGGREGATIONS]
COMPOSITIONS += [compose(*pair, kl=kl) for pair in WITHIN_REASON for kl in (KL("k3"), KL("k3-is"))]


def random_fields(seed: int = 0, drift: float = 0.3) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    old = -torch.rand(N, generator=random, dtype=torch.float64) * 3
    return {
        "log_probs": old + drift * torch.randn(N, generator=random, dtype=torch.float64),
        "old_log_probs": old,
        "ref_log_probs": old + drift * torch.randn(N, generator=random, dtype=torch.float64),
        "advantages": torch.randn(4, generator=random, dtype=torch.float64)[IDS],
        "mask": (torch.rand(N, generator=random) > 0.3).double(),
    }


def loss_and_gradient(algorithm: Algorithm, fields: dict[str, torch.Tensor], mask_all: torch.Tensor | None = None):
    mask = fields["mask"]
    counts = Counts.from_tensor(count(mask if mask_all is None else mask_all, IDS, 4))
    leaf = fields["log_probs"].clone().requires_grad_()
    weights = algorithm.token_weights(mask, IDS, counts)
    inputs = LossInputs(token_weights=weights, **(fields | {"log_probs": leaf}))
    loss, metrics = policy_loss(algorithm, inputs, SequenceShards(IDS, 4))
    loss.backward()
    return loss.detach(), leaf.grad, metrics


@pytest.mark.parametrize("algorithm", COMPOSITIONS, ids=str)
def test_a_micro_batch_without_a_trained_token_gives_exactly_zero(algorithm):
    fields = random_fields() | {"mask": torch.zeros(N, dtype=torch.float64)}
    garbage = {name: torch.full((N,), math.nan, dtype=torch.float64) for name in fields if name != "mask"}
    loss, grad, metrics = loss_and_gradient(algorithm, fields | garbage, mask_all=torch.ones(N))
    assert loss.item() == 0
    assert torch.equal(grad, torch.zeros_like(grad))
    assert math.isnan(metrics["policy/ratio_max"].value()), "nothing was observed"


@pytest.mark.parametrize("algorithm", COMPOSITIONS, ids=str)
def test_what_is_outside_the_mask_has_no_effect(algorithm):
    fields = random_fields()
    loss, grad, _ = loss_and_gradient(algorithm, fields)
    for junk in (math.nan, math.inf, -math.inf, 1e30):
        dirty = {k: v if k == "mask" else v.where(fields["mask"] > 0, junk) for k, v in fields.items()}
        dirty_loss, dirty_grad, _ = loss_and_gradient(algorithm, dirty)
        assert torch.equal(loss, dirty_loss)
        assert torch.equal(grad, dirty_grad)


@pytest.mark.parametrize("algorithm", COMPOSITIONS, ids=str)
def test_on_the_first_update_every_algorithm_is_reinforce_with_its_own_weights(algorithm):
    """U1: at log_probs = old_log_probs no gate acts and the policy gradient is -W A."""
    fields = random_fields(drift=0.0)
    _, grad, _ = loss_and_gradient(algorithm, fields)  # with drift 0 the reference equals the policy: no KL gradient
    weights = algorithm.token_weights(fields["mask"], IDS, Counts.from_tensor(count(fields["mask"], IDS, 4)))
    torch.testing.assert_close(grad, -weights * fields["advantages"], atol=1e-15, rtol=1e-12)


@pytest.mark.parametrize("algorithm", COMPOSITIONS, ids=str)
def test_absent_old_log_probs_mean_the_ratio_is_one(algorithm):
    fields = random_fields()
    present = loss_and_gradient(algorithm, fields | {"old_log_probs": fields["log_probs"].clone()})
    absent = loss_and_gradient(algorithm, fields | {"old_log_probs": None})
    assert torch.equal(present[0], absent[0])
    assert torch.equal(present[1], absent[1])


def test_sequence_and_sequence_token_agree_for_an_advantage_per_sequence():
    fields = random_fields()
    a = loss_and_gradient(compose("sequence", "clip"), fields)
    b = loss_and_gradient(compose("sequence-token", "clip"), fields)
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])


def test_the_stop_gradient_form_has_the_gradient_of_the_sequence_objective():
    """Against autograd through GSPO as published: sum_i A_i min(s_i, clip(s_i)) with a differentiable s_i."""
    fields = random_fields(seed=3)
    leaf = fields["log_probs"].clone().requires_grad_()
    mask = fields["mask"]
    lengths = torch.zeros(4, dtype=torch.float64).index_add(0, IDS, mask)
    z = torch.zeros(4, dtype=torch.float64).index_add(0, IDS, (leaf - fields["old_log_probs"]) * mask)
    s, a = (z / lengths.clamp(min=1)).exp(), torch.zeros(4, dtype=torch.float64)
    a[IDS] = fields["advantages"]
    objective = torch.minimum(a * s, a * s.clamp(0.8, 1.28))[lengths > 0].sum() / 4
    (-objective).backward()
    loss, grad, _ = loss_and_gradient(compose("sequence", "clip"), fields)
    assert loss.item() == pytest.approx(-objective.item(), abs=1e-14)
    torch.testing.assert_close(grad, leaf.grad, atol=1e-15, rtol=1e-12)


def test_a_token_outside_the_support_is_left_out_and_counted():
    fields = random_fields() | {"mask": torch.ones(N, dtype=torch.float64)}
    kept = torch.ones(N, dtype=torch.float64)
    kept[6] = 0
    expected, expected_grad, _ = loss_and_gradient(GSPO, fields | {"mask": kept}, mask_all=torch.ones(N))
    fields["log_probs"][6] = -math.inf
    leaf = fields["log_probs"].requires_grad_()
    weights = GSPO.token_weights(kept, IDS, Counts.from_tensor(count(torch.ones(N), IDS, 4)))
    loss, metrics = policy_loss(GSPO, LossInputs(token_weights=weights, **fields), SequenceShards(IDS, 4))
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-15)
    torch.testing.assert_close(leaf.grad, expected_grad)
    assert metrics["policy/dropped_tokens"].value() == 1


def test_a_nan_log_prob_reaches_the_loss():
    fields = random_fields() | {"mask": torch.ones(N, dtype=torch.float64)}
    fields["log_probs"][2] = math.nan
    assert math.isnan(loss_and_gradient(GSPO, fields)[0])


@pytest.mark.parametrize(("level", "drift", "bound"), [("token", 25.0, 20.0), ("sequence", 12.0, 10.0)])
def test_beyond_the_clamp_the_ratio_stands_still_without_gradient(level, drift, bound):
    fields = random_fields() | {"mask": torch.ones(N, dtype=torch.float64)}
    fields["log_probs"] = fields["old_log_probs"] + drift
    fields["advantages"] = torch.ones(N, dtype=torch.float64)
    loss, grad, metrics = loss_and_gradient(compose(level, "none"), fields)
    assert loss.item() == pytest.approx(-math.exp(bound), rel=1e-12)
    assert torch.equal(grad, torch.zeros_like(grad))
    assert metrics["policy/clamped_frac"].value() == 1


def test_float32_keeps_the_gspo_band_apart():
    """A sequence just inside and one just outside a band of 3e-4, in float32."""
    ids = torch.tensor([0] * 100 + [1] * 100)
    old = torch.linspace(-4, -0.1, 200)
    new = old + torch.tensor([3.9e-4, 4.1e-4])[ids]
    inputs = LossInputs(new, torch.ones(200), torch.full((200,), 0.005), torch.ones(200), old)
    _, metrics = policy_loss(GSPO, inputs, SequenceShards(ids, 2))
    assert metrics["policy/clip_seq_frac"].value() == pytest.approx(0.5)


def test_k3_is_a_penalty_and_k3_plus_has_the_gradient_of_k2():
    """U10, with k3's value for k3+ and no clamp reached."""
    log_probs = torch.linspace(-3, 3, 61, dtype=torch.float64).requires_grad_()
    ref, ratio = torch.zeros(61, dtype=torch.float64), torch.ones(61, dtype=torch.float64)
    value = {e: KL(e, output_clamp=None)(log_probs, ref, ratio) for e in ("k2", "k3", "k3+")}
    grad = {e: torch.autograd.grad(v.sum(), log_probs)[0] for e, v in value.items()}
    assert (value["k3"] >= 0).all()
    assert (value["k3"][log_probs.abs() > 0.05] > 0).all()
    torch.testing.assert_close(value["k3+"], value["k3"], atol=0, rtol=0)
    torch.testing.assert_close(grad["k3+"], grad["k2"], atol=0, rtol=0)
    torch.testing.assert_close(grad["k3"], 1 - torch.exp(-log_probs.detach()), atol=1e-12, rtol=0)


GROUPS = torch.tensor([7, 7, 7, 2, 2, 2, 2])
REWARDS = torch.tensor([1.0, 0.0, 0.5, 1.0, 1.0, 0.0, -2.0], dtype=torch.float64)


def test_grpo_advantages_ignore_an_affine_change_of_reward_and_mean_only_ones_scale():
    """U7."""
    changed = 3 * REWARDS - 5
    torch.testing.assert_close(group_relative(changed, GROUPS), group_relative(REWARDS, GROUPS), atol=1e-5, rtol=0)
    mean_only = group_relative(REWARDS, GROUPS, scale="none")
    torch.testing.assert_close(group_relative(changed, GROUPS, scale="none"), 3 * mean_only)


@pytest.mark.parametrize("scale", ["std", "none"])
def test_groups_without_a_signal_get_zero(scale):
    one = group_relative(torch.tensor([5.0, 1.0, 0.0]), torch.tensor([0, 1, 1]), scale=scale)
    assert one[0] == 0
    assert one[1] > 0 > one[2]
    noise = torch.tensor([0.1, 0.1 + 1e-8, 0.1 - 1e-8], dtype=torch.float64)
    assert group_relative(noise, torch.zeros(3), scale=scale).eq(0).all()
    assert group_relative(torch.tensor([]), torch.tensor([], dtype=torch.int64), scale=scale).shape == (0,)


def test_an_unscored_trajectory_gets_zero_and_does_not_move_its_group():
    with_nan = torch.cat([REWARDS, torch.tensor([math.nan, math.nan], dtype=torch.float64)])
    groups = torch.cat([GROUPS, torch.tensor([7, 9])])
    got = group_relative(with_nan, groups)
    torch.testing.assert_close(got[:7], group_relative(REWARDS, GROUPS))
    assert got[7:].eq(0).all()


def test_two_scored_members_are_needed():
    assert group_relative(torch.tensor([1.0, math.nan]), torch.tensor([0, 0])).eq(0).all()


def test_weights_follow_their_definitions():
    mask = torch.tensor([1, 1, 0, 1, 0.0])
    ids = torch.tensor([0, 0, 0, 1, 2])
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


def config(preset: str = "gspo", **axes) -> SimpleNamespace:
    section = dict.fromkeys(("advantage", "ratio", "gate", "aggregate", "kl")) | axes
    return SimpleNamespace(preset=preset, **section)


def test_a_config_overrides_single_axes_and_single_settings():
    assert from_config(config("gspo")) == GSPO
    assert from_config(config("grpo")) == GRPO
    assert from_config(config("gspo", ratio="token")).gate == GSPO.gate
    wider = from_config(config("gspo", gate=SimpleNamespace(type="clip", low=None, high=0.01, dual=None)))
    assert wider.gate == gate("clip", low=3e-4, high=0.01)
    assert wider.ratio == "sequence"
    none = from_config(config("grpo", gate=SimpleNamespace(type="none", low=None, high=None, dual=None)))
    assert none.gate == gate("none")
    assert from_config(config(kl=SimpleNamespace(estimator="k2", coef=0.1))).kl == KL("k2", 0.1)
    assert not from_config(config("grpo", kl=SimpleNamespace(estimator="k3", coef=0.0))).needs_reference


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        (config(ratio="none"), "gate clip bounds a ratio"),
        (config("ppo2"), "preset ppo2 is unknown"),
        (config(ratio="word"), "ratio word is unknown"),
        (config(gate=SimpleNamespace(type="bounce")), "gate bounce is unknown"),
        (config(aggregate="mean"), "aggregate mean is unknown"),
        (config(aggregate="fixed-length"), "needs fixed_length"),
        (config(gate=SimpleNamespace(type="clip", low=0.2, high=0.2, dual=0.9)), "set it above 1"),
        (config(kl=SimpleNamespace(estimator="k9", coef=1.0)), "kl estimator k9 is unknown"),
    ],
)
def test_a_composition_that_means_nothing_is_refused_with_the_reason(section, reason):
    assert reason in check(section)
    assert check(config()) is None


def test_a_gate_refuses_settings_it_does_not_have_and_asks_for_those_it_lacks():
    with pytest.raises(ValueError, match="no setting tau; it has: low, high, dual"):
        gate("clip", low=0.2, high=0.2, tau=1.0)
    with pytest.raises(ValueError, match="needs a value for high"):
        gate("clip", low=0.2)
