"""Every golden case whose axes exist: loss and gradient against an independent float64 NumPy reference.

Cases are built from their `axes`, never from their names, so a case starts to run when its last axis is registered.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megarl.algorithms import KL, Algorithm, Counts, LossInputs, advantage, count, gate, policy_loss
from megarl.algorithms.advantage import ESTIMATORS
from megarl.algorithms.aggregate import AGGREGATIONS
from megarl.algorithms.gate import GATES
from megarl.algorithms.ratio import LEVELS
from megarl.types import SequenceShards

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "golden.json").read_text())


def float64(values: list) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


INPUTS = {name: float64(value) for name, value in GOLDEN["inputs"].items()}
B, T = INPUTS["mask"].shape


def is_implemented(axes: dict) -> bool:
    return (
        axes["loss"] == "policy"
        and axes["ratio"] in LEVELS
        and axes["gate"]["type"] in GATES
        and axes["aggregate"] in AGGREGATIONS
        and axes["correction"] is axes["veto"] is axes["off_policy_sequence_mask"] is None
    )


def algorithm_of(axes: dict) -> Algorithm:
    kl = axes["kl"]
    return Algorithm(
        advantage=advantage("group"),
        ratio=axes["ratio"],
        gate=gate(**axes["gate"]),
        aggregate=axes["aggregate"],
        kl=kl and KL(kl["estimator"], kl["coef"], kl["input_clamp"], kl["output_clamp"]),
        n_seq=axes["n_seq"],
        fixed_length=axes["fixed_length"],
    )


def mask_of(axes: dict) -> torch.Tensor:
    if axes["mask"] == "drop-truncated":
        return INPUTS["mask"] * (1 - INPUTS["truncated"])[:, None]
    if axes["mask"] == "kept-groups":
        kept = torch.tensor(GOLDEN["advantages"]["dynamic_sampling_kept_groups"])
        return INPUTS["mask"] * torch.isin(INPUTS["group"].long(), kept)[:, None]
    return INPUTS["mask"]


def advantages_of(axes: dict) -> torch.Tensor:
    values = GOLDEN["advantages"].get(axes["advantage"])
    values = INPUTS[axes["advantage"]] if values is None else float64(values)
    return values if values.dim() == 2 else values[:, None].expand(B, T)


def flat_fields(axes: dict) -> dict[str, torch.Tensor]:
    """The case's per-token tensors [B, T], without weights."""
    base = "logp_old" if axes["ratio_base"] == "old" else "logp_rollout"
    fields = {"log_probs": INPUTS["logp"], "old_log_probs": INPUTS[base], "advantages": advantages_of(axes)}
    if axes["kl"]:
        fields["ref_log_probs"] = INPUTS[axes["kl"]["reference"]]
    return fields | {"mask": mask_of(axes)}


def run(
    axes: dict, parts: list[list[int]], dtype: torch.dtype, padding: float = float("nan")
) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Loss and gradient [B, T] when the sequences are split into the given parts, and the last part's metrics."""
    algorithm, fields = algorithm_of(axes), flat_fields(axes)
    mask = fields.pop("mask")
    ids = torch.arange(B).repeat_interleave(T)
    counts = Counts.from_tensor(count(mask.flatten(), ids, B))
    log_probs = fields.pop("log_probs").where(mask > 0, padding).to(dtype).requires_grad_()
    loss, metrics = torch.zeros((), dtype=dtype), {}
    for part in parts:
        own = torch.arange(len(part)).repeat_interleave(T)
        weights = algorithm.token_weights(mask[part].flatten(), own, counts)
        inputs = LossInputs(
            log_probs=log_probs[part].flatten(),
            token_weights=weights.to(dtype),
            mask=mask[part].flatten(),
            **{name: x.where(mask > 0, padding)[part].flatten().to(dtype) for name, x in fields.items()},
        )
        share, metrics = policy_loss(algorithm, inputs, SequenceShards(own, len(part)))
        loss = loss + share
    loss.backward()
    return loss.detach(), log_probs.grad, metrics


POLICY_CASES = {name: case for name, case in GOLDEN["cases"].items() if is_implemented(case["axes"])}
WHOLE = [list(range(B))]


@pytest.mark.parametrize(
    ("dtype", "loss_tol", "grad_tol"), [(torch.float64, 1e-12, 1e-12), (torch.float32, 2e-7, 1e-7)]
)
@pytest.mark.parametrize("name", POLICY_CASES)
def test_loss_and_gradient(name, dtype, loss_tol, grad_tol):
    case = POLICY_CASES[name]
    loss, grad, _ = run(case["axes"], WHOLE, dtype)
    assert loss.double().item() == pytest.approx(case["loss"], abs=loss_tol, rel=0)
    # Padding holds NaN here (U5), and its gradient must still be exactly the golden 0.
    torch.testing.assert_close(grad.double(), float64(case["grad"]), atol=grad_tol, rtol=0)


def test_the_axes_of_this_version_cover_their_cases():
    assert len(POLICY_CASES) >= 24


METRIC_NAMES = {
    "ratio_mean": "ratio_mean",
    "ratio_min": "ratio_min",
    "ratio_max": "ratio_max",
    "kl_old_new_k1": "kl_old_k1",
    "kl_old_new_k3": "kl_old_k3",
    "clip_high_frac": "clip_high_frac",
    "clip_low_frac": "clip_low_frac",
    "dual_clip_frac": "clip_dual_frac",
    "clip_frac_token": "clip_frac",
    "clip_frac_seq": "clip_seq_frac",
    "kl_mean": "kl_ref",
}


@pytest.mark.parametrize("name", [name for name, case in POLICY_CASES.items() if case.get("metrics")])
def test_metrics(name):
    case = POLICY_CASES[name]
    _, _, metrics = run(case["axes"], WHOLE, torch.float64)
    compared = {METRIC_NAMES[key]: value for key, value in case["metrics"].items() if key in METRIC_NAMES}
    assert compared
    got = {key: metrics[f"policy/{key}"].value() for key in compared}
    assert got == pytest.approx(compared, abs=1e-12, rel=0)


@pytest.mark.parametrize("name", [name for name, case in POLICY_CASES.items() if not case["axes"]["kl"]])
def test_zero_gradient_fraction_is_the_share_of_zeros_in_the_golden_gradient(name):
    case = POLICY_CASES[name]
    _, _, metrics = run(case["axes"], WHOLE, torch.float64)
    trained = mask_of(case["axes"]) > 0
    zeros = (float64(case["grad"])[trained] == 0).double().mean().item()
    assert metrics["policy/zero_grad_frac"].value() == pytest.approx(zeros, abs=1e-12)


@pytest.mark.parametrize("name", POLICY_CASES)
def test_any_split_of_the_sequences_gives_the_same_loss_and_gradient(name):
    """Permuted and cut into micro-batches, one of them without a trained token (U3, U4, U6)."""
    case = POLICY_CASES[name]
    for parts in ([[14, 3, 11], [10], [0, 2, 1, 4], [13, 5, 12, 6, 7, 8, 9]], [[11], [*range(11), *range(12, B)]]):
        loss, grad, _ = run(case["axes"], parts, torch.float64)
        assert loss.item() == pytest.approx(case["loss"], abs=1e-12, rel=0)
        torch.testing.assert_close(grad, float64(case["grad"]), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", POLICY_CASES)
def test_context_parallel_shards_add_up(name):
    """The golden sharding over 2 context-parallel ranks: the same loss and gradient as unsharded."""
    case, owner = POLICY_CASES[name], torch.tensor(GOLDEN["parallel"]["owner_rank_of_response_logprob"])
    algorithm, fields = algorithm_of(case["axes"]), flat_fields(case["axes"])
    ids = torch.arange(B).repeat_interleave(T)
    mask = fields["mask"].flatten()
    weights = algorithm.token_weights(mask, ids, Counts.from_tensor(count(mask, ids, B)))
    log_probs = INPUTS["logp"].clone().requires_grad_()
    flat = {name: x.flatten() for name, x in (fields | {"log_probs": log_probs}).items()} | {"token_weights": weights}
    own = [(owner == rank).flatten() for rank in (0, 1)]

    def shard(rank: int, reduce=None) -> tuple[LossInputs, SequenceShards]:
        inputs = LossInputs(**{name: x[own[rank]] for name, x in flat.items()})
        return inputs, SequenceShards(ids[own[rank]], B, reduce)

    local_sums = []

    def record(sums):
        local_sums.append(sums)
        return sums

    for rank in (0, 1):
        policy_loss(algorithm, *shard(rank, record))
    total = sum(policy_loss(algorithm, *shard(rank, lambda _: local_sums[0] + local_sums[1]))[0] for rank in (0, 1))
    assert len(local_sums) == 2, "one all-reduce per micro-batch"
    total.backward()
    assert total.item() == pytest.approx(case["loss"], abs=1e-12, rel=0)
    torch.testing.assert_close(log_probs.grad, float64(case["grad"]), atol=1e-12, rtol=0)


def test_local_sums_and_sequence_ratios_of_the_golden_sharding():
    parallel = GOLDEN["parallel"]
    owner = torch.tensor(parallel["owner_rank_of_response_logprob"])
    z, mask = INPUTS["logp"] - INPUTS["logp_old"], INPUTS["mask"]
    ids = torch.arange(B).repeat_interleave(T).reshape(B, T)
    sums = [
        SequenceShards(ids[owner == rank], B).sum((z * mask)[owner == rank], mask[owner == rank]) for rank in (0, 1)
    ]
    for rank in (0, 1):
        expected = [float64(parallel[key])[:, rank] for key in ("local_log_ratio_sum", "local_token_count")]
        torch.testing.assert_close(sums[rank], torch.stack(expected, 1), atol=1e-12, rtol=0)
    total, counts = (sums[0] + sums[1]).unbind(1)
    torch.testing.assert_close((total / counts.clamp(min=1)).exp(), float64(parallel["seq_ratio"]), atol=1e-12, rtol=0)


VECTORS = {name: axes for name, axes in GOLDEN["vector_axes"].items() if axes.get("estimator") in ESTIMATORS}
VECTORS = {name: axes for name, axes in VECTORS.items() if axes["singleton"] == "zero" and axes["scale"] != "batch"}


@pytest.mark.parametrize("name", VECTORS)
def test_advantages(name):
    axes = VECTORS[name]
    reward = INPUTS["reward"]
    for extra in axes["reward"].split(" + ")[1:]:
        reward = reward + float64(GOLDEN["advantages"][extra])
    estimate = advantage(axes["estimator"], scale=axes["scale"], eps=axes["eps"], ddof=axes["ddof"])
    expected = float64(GOLDEN["advantages"][name])
    torch.testing.assert_close(estimate(reward, INPUTS["group"].long()), expected, atol=1e-12, rtol=0)


def test_mean_of_micro_batch_means_would_be_wrong():
    """The golden wrong value comes out when each part is given its own denominators: the global ones matter."""
    axes = GOLDEN["cases"]["dapo"]["axes"]
    algorithm, fields = algorithm_of(axes), flat_fields(axes)
    parts = [part for rank in GOLDEN["parallel"]["micro_batches"] for part in rank]
    losses = []
    for part in parts:
        ids = torch.arange(len(part)).repeat_interleave(T)
        flat = {name: x[part].flatten() for name, x in fields.items()}
        weights = algorithm.token_weights(flat["mask"], ids, Counts.from_tensor(count(flat["mask"], ids, len(part))))
        losses.append(
            policy_loss(algorithm, LossInputs(token_weights=weights, **flat), SequenceShards(ids, len(part)))[0]
        )
    wrong = GOLDEN["parallel"]["WRONG_dapo_loss_mean_of_microbatch_means"]["token-mean"]
    assert (sum(losses) / len(losses)).item() == pytest.approx(wrong, abs=1e-12)
