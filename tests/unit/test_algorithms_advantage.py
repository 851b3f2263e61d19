"""Every advantage estimator and filter against plain-Python loops (the specification's b.1, b.3, b.7 and b.8)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from megarl.algorithms import Outcomes, advantage, explained_variance, group_filter
from tests.unit.algorithm_steps import CLOSE, NAN, Rollout, examples, make_rollout, outcomes, rollouts

usual = examples(30)


def mean(x: list[float]) -> float:
    return sum(x) / len(x)


def std(x: list[float], ddof: int = 1) -> float:
    return math.sqrt(sum((v - mean(x)) ** 2 for v in x) / max(len(x) - ddof, 1))


class ByHand:
    """A rollout batch as lists: rewards by sequence, trained tokens by sequence."""

    def __init__(self, r: Rollout, coef: float) -> None:
        self.reward, self.group = r.rewards.tolist(), r.group_index.tolist()
        self.penalty = [coef * x for x in r.ref_log_probs.tolist()]
        self.value, self.n = r.values.tolist(), len(r.ids)
        self.tokens: list[list[int]] = [[] for _ in self.reward]
        for token, sequence in enumerate(r.ids.tolist()):
            if r.mask[token] > 0:
                self.tokens[sequence].append(token)
        self.scored = [i for i, x in enumerate(self.reward) if not math.isnan(x)]

    def sequence_rewards(self) -> dict[int, float]:
        """Scored sequences: the reward minus the penalties of its tokens."""
        return {i: self.reward[i] - sum(self.penalty[t] for t in self.tokens[i]) for i in self.scored}

    def grouped(self, scale: str, ddof: int, eps: float, singleton: str) -> list[float]:
        rewards, out = self.sequence_rewards(), [0.0] * len(self.reward)
        for i, reward in rewards.items():
            mates = [x for j, x in rewards.items() if self.group[j] == self.group[i]]
            if len(mates) == 1:
                out[i] = {"zero": 0.0, "raw": reward / (1 + eps if scale == "std" else 1)}[singleton]
            elif std(mates, ddof) > 1e-6:
                by = {"std": std(mates, ddof) + eps, "none": 1.0, "batch": std(list(rewards.values()), ddof) + eps}
                out[i] = (reward - mean(mates)) / by[scale]
        return out

    def leave_one_out(self, singleton: str) -> list[float]:
        rewards, out = self.sequence_rewards(), [0.0] * len(self.reward)
        for i, reward in rewards.items():
            others = [x for j, x in rewards.items() if self.group[j] == self.group[i] and j != i]
            out[i] = reward - mean(others) if others else {"zero": 0.0, "raw": reward}[singleton]
        return out

    def token_rewards(self) -> dict[int, float]:
        """Minus its penalty on every trained token of a scored sequence, plus the reward on the last."""
        out = {}
        for i in self.scored:
            for t in self.tokens[i]:
                out[t] = -self.penalty[t] + (self.reward[i] if t == self.tokens[i][-1] else 0.0)
        return out

    def scanned(self, gamma: float, lam: float, critic: bool) -> dict[int, float]:
        """GAE by its definition: the sum of (gamma lam)^k delta over the trained tokens from a token on."""
        rewards, out = self.token_rewards(), {}
        for i in self.scored:
            row = self.tokens[i]
            ahead = [self.value[t] if critic else 0.0 for t in row] + [0.0]
            deltas = [rewards[t] + gamma * ahead[k + 1] - ahead[k] for k, t in enumerate(row)]
            for k, t in enumerate(row):
                out[t] = sum((gamma * lam) ** (j - k) * deltas[j] for j in range(k, len(row)))
        return out

    def whitened(self, x: dict[int, float]) -> dict[int, float]:
        if not x:
            return x
        scale = math.sqrt(std(list(x.values())) ** 2 + 1e-8)
        return {t: (v - mean(list(x.values()))) / scale for t, v in x.items()}

    def spread(self, x: dict[int, float]) -> torch.Tensor:
        """[n], 0 elsewhere."""
        return torch.tensor([x.get(t, 0.0) for t in range(self.n)], dtype=torch.float64)


def seen(r: Rollout, coef: float) -> Outcomes:
    """The batch with junk off the mask."""
    return outcomes(r.padded_with(NAN), coef * r.padded_with(NAN).ref_log_probs if coef else None)


@usual
@given(
    rollouts,
    st.sampled_from(["std", "none", "batch"]),
    st.sampled_from([0, 1]),
    st.sampled_from([1e-6, 1e-4]),
    st.sampled_from(["zero", "raw"]),
    st.sampled_from([0.0, 0.1]),
)
def test_group(r: Rollout, scale: str, ddof: int, eps: float, singleton: str, coef: float) -> None:
    estimator = advantage("group", scale=scale, ddof=ddof, eps=eps, singleton=singleton)
    expected = ByHand(r, coef).grouped(scale, ddof, eps, singleton)
    got = estimator(seen(r, coef))
    torch.testing.assert_close(got.advantages, torch.tensor(expected, dtype=torch.float64), **CLOSE)
    assert got.returns is None


@usual
@given(rollouts, st.sampled_from(["zero", "raw"]), st.sampled_from([0.0, 0.1]))
def test_leave_one_out(r: Rollout, singleton: str, coef: float) -> None:
    got = advantage("leave-one-out", singleton=singleton)(seen(r, coef)).advantages
    expected = torch.tensor(ByHand(r, coef).leave_one_out(singleton), dtype=torch.float64)
    torch.testing.assert_close(got, expected, **CLOSE)


@usual
@given(rollouts)
def test_leave_one_out_is_the_centred_reward_times_k_over_k_minus_one(r: Rollout) -> None:
    assume(not r.rewards.isnan().any())
    k = torch.bincount(r.group_index)[r.group_index].double()
    centred = advantage("group", scale="none")(outcomes(r)).advantages
    expected = centred * k / (k - 1).clamp(min=1)
    torch.testing.assert_close(advantage("leave-one-out")(outcomes(r)).advantages, expected, **CLOSE)


@usual
@given(rollouts, st.sampled_from([0.0, 0.1]))
def test_group_mean_then_whiten(r: Rollout, coef: float) -> None:
    hand = ByHand(r, coef)
    centred = hand.grouped("none", 1, 0.0, "zero")
    expected = hand.whitened({t: centred[i] for i in hand.scored for t in hand.tokens[i]})
    got = advantage("group-mean-then-whiten")(seen(r, coef)).advantages[r.ids]
    torch.testing.assert_close(torch.where(r.mask > 0, got, 0.0), hand.spread(expected), **CLOSE)


@usual
@given(rollouts, st.sampled_from([0.0, 0.1]))
def test_token_reward(r: Rollout, coef: float) -> None:
    hand = ByHand(r, coef)
    got = advantage("token-reward")(seen(r, coef)).advantages
    torch.testing.assert_close(got, hand.spread(hand.token_rewards()), **CLOSE)


@usual
@given(rollouts, st.sampled_from([1.0, 0.9, 0.0]), st.booleans(), st.sampled_from([0.0, 0.1]))
def test_return_to_go(r: Rollout, gamma: float, whiten: bool, coef: float) -> None:
    hand = ByHand(r, coef)
    expected = hand.scanned(gamma, 1.0, critic=False)
    got = advantage("return-to-go", gamma=gamma, whiten=whiten)(seen(r, coef)).advantages
    torch.testing.assert_close(got, hand.spread(hand.whitened(expected) if whiten else expected), **CLOSE)


@usual
@given(rollouts, st.sampled_from([1.0, 0.9]), st.sampled_from([1.0, 0.8, 0.0]), st.booleans())
def test_gae(r: Rollout, gamma: float, lam: float, whiten: bool) -> None:
    hand = ByHand(r, 0.1)
    expected = hand.scanned(gamma, lam, critic=True)
    got = advantage("gae", gamma=gamma, lam=lam, whiten=whiten)(seen(r, 0.1))
    torch.testing.assert_close(got.advantages, hand.spread(hand.whitened(expected) if whiten else expected), **CLOSE)
    returns = {t: expected.get(t, 0.0) + hand.value[t] for row in hand.tokens for t in row}
    torch.testing.assert_close(got.returns, hand.spread(returns), **CLOSE)


def test_a_tool_s_tokens_are_no_steps_and_the_reward_reaches_across_them() -> None:
    """b.1's defect to avoid: a return that a masked span in the middle of a response sets to 0."""
    mask = torch.tensor([0, 1, 0, 0, 1.0])
    ids = torch.zeros(5, dtype=torch.int64)
    values = torch.tensor([9, 0.5, 9, 9, 0.25])
    one = Outcomes(torch.tensor([1.0]), torch.tensor([0]), mask, ids, values=values)
    assert advantage("return-to-go", gamma=0.5, whiten=False)(one).advantages.tolist() == [0, 0.5, 0, 0, 1]
    found = advantage("gae", gamma=1.0, lam=0.5, whiten=False)(one)
    assert found.advantages.tolist() == [0, -0.25 + 0.5 * 0.75, 0, 0, 0.75]
    assert found.returns.tolist() == [0, 0.625, 0, 0, 1]


def test_gae_asks_for_values() -> None:
    with pytest.raises(ValueError, match="gae needs values"):
        advantage("gae")(Outcomes(torch.tensor([1.0]), torch.tensor([0]), torch.ones(1), torch.tensor([0])))


def test_a_reward_of_nan_in_a_group_of_two_leaves_a_group_of_one() -> None:
    two = Outcomes(torch.tensor([0.5, NAN]), torch.tensor([0, 0]))
    assert advantage("group")(two).advantages.tolist() == [0, 0]
    assert advantage("group", scale="none", singleton="raw")(two).advantages.tolist() == [0.5, 0]
    assert advantage("leave-one-out", singleton="raw")(two).advantages.tolist() == [0.5, 0]


def test_estimators_take_an_empty_batch() -> None:
    r = make_rollout(0, sequences=1)
    none = Outcomes(*(x[:0] for x in (r.rewards, r.group_index, r.mask, r.ids, r.values, r.values)))
    for kind in ("group", "leave-one-out", "group-mean-then-whiten", "token-reward", "return-to-go", "gae"):
        assert advantage(kind)(none).advantages.shape == (0,)


@usual
@given(st.lists(st.tuples(st.integers(0, 4), st.sampled_from([0.0, 1.0, 0.5, 0.1 + 0.2, 0.3, NAN])), max_size=14))
def test_dynamic_sampling_keeps_groups_whose_scores_differ(rows: list[tuple[int, float]]) -> None:
    kept = []
    for group in sorted({g for g, _ in rows}):
        scores = [s for g, s in rows if g == group and not math.isnan(s)]
        if any(abs(a - b) > 1e-6 for a in scores for b in scores):
            kept.append(group)
    scores = torch.tensor([s for _, s in rows], dtype=torch.float64)
    index = torch.tensor([g for g, _ in rows], dtype=torch.int64)
    assert group_filter("dynamic-sampling")(scores, index).tolist() == kept


def test_explained_variance() -> None:
    assert explained_variance(return_std=2.0, error_std=1.0) == 0.75
    assert explained_variance(return_std=0.0, error_std=1.0) == 0
