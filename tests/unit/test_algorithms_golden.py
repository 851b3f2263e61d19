"""Every golden case and vector, in any split, against the independent float64 reference they come from."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor

from megarl.algorithms import (
    Algorithm,
    Counts,
    LossInputs,
    count,
    effective_sample_size,
    mismatch_weights,
    policy_loss,
)
from megarl.algorithms.gate import Gated
from megarl.algorithms.ratio import Ratio, compute_ratio
from megarl.metrics import Metric, Sum, merge
from megarl.types import SequenceShards
from megarl.verify import algorithms as verify
from megarl.verify.algorithms import CASES, GOLDEN, PRECISIONS, Vectors, algorithm_of, policy_case
from tests.unit.algorithm_steps import side_by_side

VECTORS = Vectors(GOLDEN)
PARALLEL = json.loads(GOLDEN.read_text())["parallel"]
OWNER = torch.tensor(PARALLEL["owner_rank_of_response_logprob"])  # -1 on padding
POLICY = [name for name, case in VECTORS.cases.items() if case["axes"]["loss"] == "policy"]
MASK = VECTORS.inputs["mask"] > 0
TIGHT = {"atol": 1e-12, "rtol": 0}


def having(*keys: str) -> list[str]:
    return [name for name, case in VECTORS.cases.items() if any(case.get(key) for key in keys)]


def float64(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def run(name: str, dtype: torch.dtype = torch.float64, parts: list[list[int]] | None = None) -> Any:
    axes = VECTORS.cases[name]["axes"]
    return CASES[axes["loss"]](VECTORS, axes, dtype, parts)


def same_as_stored(name: str, loss: Tensor, gradient: Tensor, loss_tolerance=1e-12, gradient_tolerance=1e-12) -> None:
    case = VECTORS.cases[name]
    assert loss.double().item() == pytest.approx(case["loss"], abs=loss_tolerance, rel=0)
    torch.testing.assert_close(gradient.double(), float64(case["grad"]), atol=gradient_tolerance, rtol=0)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", VECTORS.cases)
def test_loss_and_gradient(name: str, precision: str) -> None:
    """Padding holds NaN in a policy case (U5), and its gradient must still be exactly the stored 0."""
    dtype, *tolerances = PRECISIONS[precision]
    loss, gradient, _ = run(name, dtype)
    same_as_stored(name, loss, gradient, *tolerances)
    assert gradient[VECTORS.mask(VECTORS.cases[name]["axes"]["mask"]) == 0].eq(0).all()


@pytest.mark.parametrize("name", VECTORS.axes)
def test_vectors(name: str) -> None:
    torch.testing.assert_close(VECTORS.vector(VECTORS.axes[name]).double(), VECTORS.tensor(name), **TIGHT)


METRIC_NAMES = {
    "ratio_mean": "policy/ratio_mean",
    "ratio_min": "policy/ratio_min",
    "ratio_max": "policy/ratio_max",
    "kl_old_new_k1": "policy/kl_old_k1",
    "kl_old_new_k3": "policy/kl_old_k3",
    "clip_high_frac": "policy/clip_high_frac",
    "clip_low_frac": "policy/clip_low_frac",
    "dual_clip_frac": "policy/clip_dual_frac",
    "clip_frac": "policy/clip_frac",
    "clip_frac_token": "policy/clip_frac",
    "clip_frac_seq": "policy/clip_seq_frac",
    "kl_mean": "policy/kl_ref",
    "gate_mean": "policy/gate_mean",
    "gate_min": "policy/gate_min",
    "gate_mean_pos": "policy/gate_mean_pos",
    "gate_mean_neg": "policy/gate_mean_neg",
    "value_clip_frac": "critic/clip_frac",
    "weight_mean": "mismatch/weight_mean",
    "kept_frac": "mismatch/kept_frac",
}


@pytest.mark.parametrize("name", having("metrics"))
def test_metrics(name: str) -> None:
    metrics = {key: metric.value() for key, metric in run(name)[2].items()}
    stored = dict(VECTORS.cases[name]["metrics"])
    if "ess" in stored:
        ess = effective_sample_size(metrics["mismatch/weight_mean"], metrics["mismatch/weight_squared"])
        assert ess == pytest.approx(stored.pop("ess"), abs=1e-12, rel=0)
    got = {key: metrics[METRIC_NAMES[key]] for key in stored}
    assert got == pytest.approx(stored, abs=1e-12, rel=0)


@pytest.mark.parametrize("name", [name for name in POLICY if not VECTORS.cases[name]["axes"]["kl"]])
def test_zero_gradient_fraction_is_the_share_of_zeros_in_the_stored_gradient(name: str) -> None:
    trained = VECTORS.mask(VECTORS.cases[name]["axes"]["mask"]) > 0
    zeros = (float64(VECTORS.cases[name]["grad"])[trained] == 0).double().mean().item()
    assert run(name)[2]["policy/zero_grad_frac"].value() == pytest.approx(zeros, abs=1e-12)


def ratio_and_gate(name: str) -> tuple[Ratio, Gated, Tensor]:
    """The ratio and the gate of a case, and its advantages [n]."""
    axes, x = VECTORS.cases[name]["axes"], VECTORS.inputs
    algorithm, given = algorithm_of(axes), VECTORS.tensor(axes["advantage"])
    flat = (given if given.dim() == 2 else given[:, None].expand_as(MASK)).flatten()
    shards = SequenceShards(VECTORS.ids, VECTORS.rows)
    old = x["logp_rollout" if axes["ratio_base"] == "rollout" else "logp_old"]
    ratio = compute_ratio(algorithm.ratio, x["logp"].flatten(), old.flatten(), MASK.flatten(), shards)
    return ratio, algorithm.gate(ratio, flat), flat


@pytest.mark.parametrize("name", having("seq_ratio"))
def test_sequence_ratios(name: str) -> None:
    ratio, gated, advantages = ratio_and_gate(name)
    stored = float64(VECTORS.cases[name]["seq_ratio"])[VECTORS.ids]
    if ratio.level == "geometric-mean-of-clipped":  # only known where the sign of the advantage says what is clipped
        known = MASK.flatten() & (advantages != 0)
        torch.testing.assert_close((gated.objective / advantages)[known], stored[known], **TIGHT)
    else:
        torch.testing.assert_close(ratio.detached, stored, **TIGHT)


@pytest.mark.parametrize("name", having("seq_active"))
def test_which_sequences_the_clip_drops(name: str) -> None:
    _, gated, _ = ratio_and_gate(name)
    dropped = float64(VECTORS.cases[name]["seq_active"])[VECTORS.ids] == 0
    assert torch.equal(gated.flags["clip_frac"][MASK.flatten()], dropped[MASK.flatten()])


@pytest.mark.parametrize("name", having("gate"))
def test_soft_gates(name: str) -> None:
    _, gated, _ = ratio_and_gate(name)
    torch.testing.assert_close(gated.weight[MASK.flatten()], float64(VECTORS.cases[name]["gate"])[MASK], **TIGHT)


@pytest.mark.parametrize("name", having("is_weight", "seq_keep"))
def test_mismatch_weights_and_dropped_sequences(name: str) -> None:
    case, x = VECTORS.cases[name], VECTORS.inputs
    algorithm, shards = algorithm_of(case["axes"]), SequenceShards(VECTORS.ids, VECTORS.rows)
    old, engine = x["logp_old"].flatten(), x["logp_rollout"].flatten()
    found = mismatch_weights(algorithm.correction, algorithm.veto, old, engine, x["mask"].flatten(), shards)
    if "is_weight" in case:
        weights = found.weights.reshape(MASK.shape)[MASK]
        torch.testing.assert_close(weights, float64(case["is_weight"])[MASK], **TIGHT)
    if "seq_keep" in case:
        kept = float64(case["seq_keep"])[:, None].expand_as(MASK)[MASK] > 0
        without_gradient = run(name)[1][MASK] == 0
        assert without_gradient[~kept].all()
        assert not without_gradient[kept].all()
        if algorithm.veto is not None:
            assert torch.equal(found.vetoed.reshape(MASK.shape)[MASK], ~kept)


SPLITS = [
    [part for rank in PARALLEL["micro_batches"] for part in rank],
    [[14, 3, 11], [10], [], [0, 2, 1, 4], [13, 5, 12, 6, 7, 8, 9]],
    [[11], [*range(11), *range(12, VECTORS.rows)]],  # the first has no trained token
    [[i] for i in reversed(range(VECTORS.rows))],
]


@pytest.mark.parametrize("parts", SPLITS, ids=["ranks", "any", "empty", "single"])
@pytest.mark.parametrize("name", VECTORS.cases)
def test_any_split_of_the_sequences_is_the_same_step(name: str, parts: list[list[int]]) -> None:
    """U3, U4 and U6, renormalised denominators included."""
    loss, gradient, _ = run(name, parts=parts)
    same_as_stored(name, loss, gradient)


def sharded_loss(shares: list[Tensor]) -> Any:
    """`policy_loss` over the golden context-parallel ranks; the last call's share of each rank is left in `shares`."""

    def loss(algorithm: Algorithm, inputs: LossInputs, shards: SequenceShards) -> tuple[Tensor, dict[str, Metric]]:
        own = OWNER.flatten()

        def rank(number: int, reduce: Any) -> tuple[Tensor, dict[str, Metric]]:
            here = own == number
            mine = {name: None if x is None else x[here] for name, x in vars(inputs).items()}
            ids = shards.sequence_ids[here]
            return policy_loss(algorithm, LossInputs(**mine), SequenceShards(ids, shards.num_sequences, reduce))

        results, metrics = side_by_side(PARALLEL["cp"], rank), {}
        for _, found in results:
            merge(metrics, found)
        shares[:] = [share.detach() for share, _ in results]
        return sum(share for share, _ in results), metrics

    return loss


@pytest.mark.parametrize("name", POLICY)
def test_context_parallel_shards_add_up(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the golden owner map, with every all-reduce a loss makes: the same loss, gradient and metrics."""
    _, _, whole = run(name)
    monkeypatch.setattr(verify, "policy_loss", sharded_loss([]))
    loss, gradient, sharded = run(name)
    same_as_stored(name, loss, gradient)
    of = lambda metrics: {key: metric.value() for key, metric in metrics.items()}  # noqa: E731
    assert of(sharded) == pytest.approx(of(whole), abs=1e-12, rel=1e-10, nan_ok=True)


def test_every_response_token_has_one_owner() -> None:
    assert torch.equal(OWNER >= 0, VECTORS.inputs["gen_mask"] > 0)


def test_the_share_of_every_rank_and_micro_batch() -> None:
    """The golden partial sums of DAPO's loss: data-parallel rank, micro-batch, context-parallel rank."""
    axes, x = VECTORS.cases["dapo"]["axes"], VECTORS.inputs
    algorithm = algorithm_of(axes)
    counts = Counts.from_tensor(count(x["mask"].flatten(), VECTORS.ids, VECTORS.rows))
    weights = algorithm.token_weights(x["mask"].flatten(), VECTORS.ids, counts)
    fields = {
        "log_probs": x["logp"],
        "old_log_probs": x["logp_old"],
        "advantages": VECTORS.tensor(axes["advantage"])[:, None].expand_as(MASK),
        "token_weights": weights.reshape(MASK.shape),
        "mask": x["mask"],
    }
    got = {}
    for dp, micro_batches in enumerate(PARALLEL["micro_batches"]):
        for number, part in enumerate(micro_batches):
            ids = torch.arange(len(part))[:, None].expand(-1, VECTORS.columns)
            for cp in range(PARALLEL["cp"]):
                here = OWNER[part] == cp
                inputs = LossInputs(**{name: y[part][here] for name, y in fields.items()})
                share, metrics = policy_loss(algorithm, inputs, SequenceShards(ids[here], len(part)))
                got[f"dp{dp}_mb{number}_cp{cp}"] = share.item()
                assert metrics["policy/loss"] == Sum(share)
    assert got == pytest.approx(PARALLEL["token_mean_partial_sums"], abs=1e-12, rel=0)
    assert sum(got.values()) == pytest.approx(PARALLEL["dapo_loss_exact"]["token-mean"], abs=1e-12, rel=0)


def test_local_sums_and_sequence_ratios_of_the_golden_sharding() -> None:
    z, mask = VECTORS.inputs["logp"] - VECTORS.inputs["logp_old"], VECTORS.inputs["mask"]
    ids = VECTORS.ids.reshape(MASK.shape)
    alone = float64(PARALLEL["WRONG_seq_ratio_from_local_tokens_only"])
    sums = []
    for rank in range(PARALLEL["cp"]):
        here = rank == OWNER
        shards = SequenceShards(ids[here], VECTORS.rows)
        sums.append(shards.sum((z * mask)[here], mask[here]))
        expected = [float64(PARALLEL[key])[:, rank] for key in ("local_log_ratio_sum", "local_token_count")]
        torch.testing.assert_close(sums[rank], torch.stack(expected, 1), **TIGHT)
        torch.testing.assert_close(shards.mean(z[here], mask[here]).exp(), alone[:, rank], **TIGHT)
    together = SequenceShards(ids[OWNER == 0], VECTORS.rows, reduce=lambda local: local + sums[1])
    mean = together.mean((z * mask)[OWNER == 0], mask[OWNER == 0])
    torch.testing.assert_close(mean.exp(), float64(PARALLEL["seq_ratio"]), **TIGHT)


def alone(part: list[int]) -> Vectors:
    """The given sequences as if they were all there are."""
    out = copy.copy(VECTORS)
    out.inputs = {name: x[part] for name, x in VECTORS.inputs.items()}
    out.named = {name: [x[i] for i in part] for name, x in VECTORS.named.items() if len(x) == VECTORS.rows}
    out.rows, out.ids = len(part), torch.arange(len(part)).repeat_interleave(VECTORS.columns)
    return out


@pytest.mark.parametrize("aggregate", ["token-mean", "seq-mean-token-mean"])
def test_a_mean_of_micro_batch_means_comes_out_wrong(aggregate: str) -> None:
    """The golden wrong value, when each micro-batch has its own denominators: the global ones matter."""
    axes = VECTORS.cases["dapo"]["axes"] | {"aggregate": aggregate}
    losses = [policy_case(alone(part), axes, torch.float64)[0].item() for part in SPLITS[0]]
    exact, wrong = (PARALLEL[key][aggregate] for key in ("dapo_loss_exact", "WRONG_dapo_loss_mean_of_microbatch_means"))
    assert sum(losses) / len(losses) == pytest.approx(wrong, abs=1e-12, rel=0)
    loss, *_ = policy_case(VECTORS, axes, torch.float64, SPLITS[0])
    assert loss.item() == pytest.approx(exact, abs=1e-12, rel=0)
