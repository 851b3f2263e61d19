"""Random rollout batches, random compositions of axes, and one optimizer step over any layout, all in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from megarl.algorithms import (
    KL,
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
)
from megarl.algorithms.aggregate import AGGREGATIONS
from megarl.algorithms.correction import CURRENT, MODES
from megarl.algorithms.correction import LEVELS as CORRECTION_LEVELS
from megarl.algorithms.presets import SEQUENCE_LEVELS
from megarl.algorithms.ratio import LEVELS
from megarl.metrics import Metric, merge
from megarl.types import SequenceShards

CLOSE = {"atol": 1e-12, "rtol": 1e-12}
NAN = math.nan
CONTEXT_PARALLEL = 3


def examples(count: int) -> settings:
    """Settings of a property that no slow machine can make fail."""
    return settings(max_examples=count, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@dataclass(frozen=True)
class Rollout:
    """S sequences in groups, n tokens end to end; every per-token field [n]."""

    ids: Tensor  # [n]
    group_index: Tensor  # [S]
    rewards: Tensor  # [S], NaN where not scored
    mask: Tensor
    log_probs: Tensor
    old_log_probs: Tensor
    rollout_log_probs: Tensor
    ref_log_probs: Tensor
    values: Tensor

    PER_TOKEN = ("log_probs", "old_log_probs", "rollout_log_probs", "ref_log_probs", "values")

    def __len__(self) -> int:
        return len(self.rewards)

    def replace(self, **changes: Any) -> Rollout:
        return replace(self, **changes)

    def padded_with(self, junk: float) -> Rollout:
        """The same with `junk` wherever the mask is 0."""
        changes = {name: getattr(self, name).where(self.mask > 0, junk) for name in self.PER_TOKEN}
        return replace(self, **changes)


def make_rollout(seed: int, sequences: int = 6, drift: float = 0.4, longest: int = 5) -> Rollout:
    """Some tokens masked, some sequences empty, some groups of one, some rewards missing."""
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (sequences,), generator=random)
    ids = torch.repeat_interleave(torch.arange(sequences), lengths)
    n = len(ids)
    normal = lambda: torch.randn(n, generator=random, dtype=torch.float64)  # noqa: E731
    old = -torch.rand(n, generator=random, dtype=torch.float64) * 3 - 0.05
    levels = torch.tensor([0.0, 1.0, 0.5, 1.0, 0.0, NAN], dtype=torch.float64)
    keep = (torch.rand(sequences, generator=random) > 0.15)[ids] & (torch.rand(n, generator=random) > 0.25)
    return Rollout(
        ids=ids,
        group_index=torch.randint(0, max(1, sequences // 3), (sequences,), generator=random),
        rewards=levels[torch.randint(0, len(levels), (sequences,), generator=random)],
        mask=keep.double(),
        log_probs=old + drift * normal(),
        old_log_probs=old,
        rollout_log_probs=old + drift * normal(),
        ref_log_probs=old + drift * normal(),
        values=normal(),
    )


rollouts = st.builds(make_rollout, st.integers(0, 2**31), st.integers(1, 8))


@st.composite
def gates(draw: st.DrawFn, ratio: str) -> Any:
    """A gate that means something at a ratio level, with random settings."""
    if ratio == "geometric-mean-of-clipped":
        kinds = ["log-clip"]
    elif ratio == "none":
        kinds = ["none", "ratio-mask"]
    else:
        kinds = ["none", "clip", "soft", "stop-gradient-weight", "log-clip", "ratio-mask"]
    kind = draw(st.sampled_from(kinds))
    if kind == "none":
        return gate(kind)
    if kind == "soft":
        return gate(kind, tau_pos=draw(st.sampled_from([0.5, 1.0, 4.0])), tau_neg=draw(st.sampled_from([1.05, 6.0])))
    settings = {"low": draw(st.sampled_from([0.03, 0.2, 0.5])), "high": draw(st.sampled_from([0.04, 0.28, 1.0]))}
    if kind == "clip":
        settings["dual"] = draw(st.sampled_from([None, 1.5, 3.0]))
    return gate(kind, **settings)


@st.composite
def estimators(draw: st.DrawFn, constant: bool) -> Any:
    """An advantage estimator; `constant`: one with the same advantage on all tokens of a sequence."""
    choices = [
        advantage("group", scale="std", ddof=draw(st.sampled_from([0, 1])), singleton="raw"),
        advantage("group", scale="none"),
        advantage("group", scale="batch"),
        advantage("leave-one-out", singleton=draw(st.sampled_from(["zero", "raw"]))),
        advantage("group-mean-then-whiten"),
    ]
    varying = [
        advantage("token-reward"),
        advantage("return-to-go", gamma=0.9, whiten=draw(st.booleans())),
        advantage("gae", gamma=0.99, lam=0.9, whiten=draw(st.booleans())),
    ]
    return draw(st.sampled_from(choices if constant else choices + varying))


@st.composite
def penalties(draw: st.DrawFn) -> KL | None:
    placement = draw(st.sampled_from(["loss", "reward"]))
    kinds = ["k1", "k2", "k3", "k3+", "k3-is"] if placement == "loss" else ["k1", "k2", "k3"]
    clamps = draw(st.sampled_from([(None, None), (20.0, 10.0), (0.3, 0.05)]))
    return draw(st.sampled_from([None, KL(draw(st.sampled_from(kinds)), 0.1, placement, *clamps)]))


@st.composite
def corrections(draw: st.DrawFn) -> Correction | None:
    level = draw(st.sampled_from([*CORRECTION_LEVELS, CURRENT]))
    low, high = draw(st.sampled_from([(0.0, 1.2), (0.7, 1.5)]))
    renormalise = level != CURRENT and draw(st.booleans())
    made = Correction(level, draw(st.sampled_from(list(MODES))), low, high, renormalise)
    return draw(st.sampled_from([None, made]))


@st.composite
def algorithms(draw: st.DrawFn, ratios: Sequence[str] = tuple(LEVELS)) -> Algorithm:
    """Any legal composition of advantage, ratio, gate, aggregation, KL and corrections."""
    ratio = draw(st.sampled_from(list(ratios)))
    kind = draw(estimators(constant=ratio in SEQUENCE_LEVELS))
    bypass = draw(st.integers(0, 4)) == 0
    return Algorithm(
        advantage=kind,
        ratio=ratio,
        gate=draw(gates(ratio)),
        aggregate=draw(st.sampled_from(list(AGGREGATIONS))),
        kl=draw(penalties()),
        value=ValueLoss() if kind.type == "gae" else None,
        correction=None if bypass else draw(corrections()),
        veto=None if bypass else draw(st.sampled_from([None, 0.5])),
        off_policy_sequence_mask=draw(st.sampled_from([None, 0.05])),
        ratio_base="rollout" if bypass else "old",
        n_seq=draw(st.sampled_from(["all", "valid"])),
        fixed_length=7,
    )


def token_advantages(algorithm: Algorithm, r: Rollout) -> Tensor:
    """[n]: what the algorithm's estimator says about the whole rollout batch."""
    penalty, kl = None, algorithm.kl
    if kl is not None and kl.placement == "reward":
        penalty = kl.coef * kl(r.old_log_probs, r.ref_log_probs, torch.ones_like(r.old_log_probs))
    return expand(algorithm.advantages(outcomes(r, penalty)).advantages, r.ids)


def outcomes(r: Rollout, penalty: Tensor | None = None) -> Outcomes:
    """What an estimator sees of the rollout batch."""
    return Outcomes(r.rewards, r.group_index, r.mask, r.ids, penalty, r.values)


def expand(advantages: Tensor, ids: Tensor) -> Tensor:
    """[n], from [n] or [S]."""
    return advantages if advantages.shape == ids.shape else advantages[ids]


@dataclass(frozen=True)
class Step:
    """What one optimizer step found: its loss, the gradient [n] with respect to the log-probs, and its metrics."""

    loss: Tensor
    gradient: Tensor
    metrics: dict[str, Metric] = field(repr=False)


def take_step(
    algorithm: Algorithm,
    r: Rollout,
    advantages: Tensor | None = None,
    parts: Sequence[Sequence[int]] | None = None,
    owner: Tensor | None = None,
) -> Step:
    """One optimizer step over the rollout batch.

    `advantages` [n]: instead of the estimator's. `parts`: the sequences of each micro-batch, of all data-parallel
    ranks. `owner` [n]: which of CONTEXT_PARALLEL ranks has a token.
    """
    given = token_advantages(algorithm, r) if advantages is None else advantages
    whole = SequenceShards(r.ids, len(r))
    mismatch = mismatch_weights(
        algorithm.correction, algorithm.veto, r.old_log_probs, r.rollout_log_probs, r.mask, whole
    )
    renormalised = algorithm.correction is not None and algorithm.correction.renormalise
    counted = r.mask * (mismatch.weights > 0) if renormalised else r.mask
    pieces = [_tokens(r.ids, part) for part in (parts if parts is not None else [range(len(r))])]
    counts = Counts.from_tensor(sum(count(counted[index], own, size) for index, own, size in pieces))
    leaf = r.log_probs.clone().requires_grad_()
    loss, metrics = torch.zeros((), dtype=torch.float64), {}
    for index, own, size in pieces:
        fields = {
            "log_probs": leaf[index],
            "advantages": given[index],
            "token_weights": algorithm.token_weights(counted[index], own, counts),
            "mask": r.mask[index],
            "old_log_probs": r.old_log_probs[index],
            "ref_log_probs": r.ref_log_probs[index],
            "rollout_log_probs": r.rollout_log_probs[index],
            "mismatch_weights": mismatch.weights[index] if algorithm.needs_old_log_probs else None,
        }
        for share, found in _on_ranks(algorithm, fields, own, size, None if owner is None else owner[index]):
            loss = loss + share
            merge(metrics, found)
    loss.backward()
    return Step(loss.detach(), leaf.grad, metrics)


def _on_ranks(
    algorithm: Algorithm, fields: dict[str, Tensor | None], ids: Tensor, sequences: int, owner: Tensor | None
) -> list[tuple[Tensor, dict[str, Metric]]]:
    """The shares of one micro-batch, its tokens spread over context-parallel ranks."""
    if owner is None:
        return [policy_loss(algorithm, LossInputs(**fields), SequenceShards(ids, sequences))]

    def share(rank: int, reduce: Callable[[Tensor], Tensor]) -> tuple[Tensor, dict[str, Metric]]:
        own = owner == rank
        inputs = LossInputs(**{name: None if x is None else x[own] for name, x in fields.items()})
        return policy_loss(algorithm, inputs, SequenceShards(ids[own], sequences, reduce))

    return side_by_side(CONTEXT_PARALLEL, share)


class _Asked(Exception):
    """A rank came to an all-reduce whose sum is not known yet."""


def side_by_side(ranks: int, work: Callable[[int, Callable[[Tensor], Tensor]], Any]) -> list[Any]:
    """`work(rank, reduce)` of every rank, as if they ran at the same time: the k-th `reduce` of each is one all-reduce.

    Every rank starts over whenever one more sum is known. Fails when a rank does not join an all-reduce.
    """
    sums: list[Tensor] = []
    while True:
        results, asked = [], []
        for rank in range(ranks):
            known = iter(sums)

            def reduce(local: Tensor, known=known, asked=asked) -> Tensor:
                total = next(known, None)
                if total is None:
                    asked.append(local)
                    raise _Asked
                return total.clone()

            try:
                results.append(work(rank, reduce))
            except _Asked:
                pass
        if not asked:
            return results
        assert len(asked) == ranks, f"{len(asked)} of {ranks} ranks joined all-reduce {len(sums)}"
        sums.append(torch.stack(asked).sum(0))


def _tokens(ids: Tensor, sequences: Sequence[int]) -> tuple[Tensor, Tensor, int]:
    """The tokens of the given sequences in that order: their indices, their local sequence ids, how many sequences."""
    pieces = [(ids == s).nonzero()[:, 0] for s in sequences]
    local = [torch.full_like(piece, place) for place, piece in enumerate(pieces)]
    empty = ids.new_zeros(0)
    return torch.cat([empty, *pieces]), torch.cat([empty, *local]), len(pieces)


@st.composite
def splits(draw: st.DrawFn, sequences: int) -> list[list[int]]:
    """The sequences in any order, cut into micro-batches, some of them empty."""
    order = draw(st.permutations(range(sequences)))
    cuts = sorted(draw(st.lists(st.integers(0, sequences), max_size=4)))
    return [list(order[a:b]) for a, b in zip([0, *cuts], [*cuts, sequences])]
