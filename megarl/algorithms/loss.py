"""The policy loss of one micro-batch, for any composition of axes, and what is logged about it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megarl.algorithms.correction import CURRENT, current_weights
from megarl.algorithms.gate import Gated
from megarl.algorithms.presets import Algorithm
from megarl.algorithms.ratio import TOKEN_CLAMP, Ratio, compute_ratio
from megarl.metrics import Max, Mean, Metric, Min, Quantile, Std, Sum
from megarl.types import SequenceShards


@dataclass(frozen=True)
class LossInputs:
    """The local tokens of a micro-batch: every field `[n]`; entries with mask 0 may hold anything, NaN included."""

    log_probs: Tensor  # differentiable
    advantages: Tensor
    token_weights: Tensor
    mask: Tensor  # 1 on trained tokens
    old_log_probs: Tensor | None = None  # None: this is the first update of its rollout, the ratio is 1
    ref_log_probs: Tensor | None = None
    rollout_log_probs: Tensor | None = None  # the engine's
    mismatch_weights: Tensor | None = None  # of `mismatch_weights`; None: 1
    entropy: Tensor | None = None  # of the full softmax, for the log


def policy_loss(algorithm: Algorithm, inputs: LossInputs, shards: SequenceShards) -> tuple[Tensor, dict[str, Metric]]:
    """loss = -(token_weights * mismatch * gate(ratio, advantage)).sum() + coef * (token_weights * kl).sum(), metrics.

    The loss is this micro-batch's share of the optimizer step's loss: shares of all micro-batches, data-parallel and
    context-parallel ranks add up. Without a trained token it is exactly 0, with gradient 0. A trained token whose
    log-prob is -inf (outside the learner's support) is left out and counted; NaN is not, so that it reaches the
    trainer's finite check. Work is in float32, or float64 if the log-probs are.
    Raises ValueError when the algorithm needs log-probs that are None.
    """
    log_probs = _wide(inputs.log_probs)
    masked_in = inputs.mask > 0
    base = _base(algorithm, inputs, log_probs)
    mask = masked_in & (log_probs.detach() != -math.inf) & (base != -math.inf)
    weights = torch.where(mask, _wide(inputs.token_weights), 0.0)
    advantages = torch.where(mask, _wide(inputs.advantages), 0.0)

    ratio = compute_ratio(algorithm.ratio, log_probs, base, mask, shards)
    gated = algorithm.gate(ratio, advantages)
    correction = _correction(algorithm, inputs, ratio, advantages)
    metrics = _metrics(ratio, gated, correction, advantages)
    metrics["policy/dropped_tokens"] = Sum((masked_in & ~mask).sum())
    loss = -torch.where(mask, weights * correction * gated.objective, 0.0).sum()
    if algorithm.kl is not None and algorithm.kl.placement == "loss":
        penalty = _penalty(algorithm, ratio, inputs.ref_log_probs)
        metrics["policy/kl_ref"] = Mean.of(penalty, mask)
        loss = loss + algorithm.kl.coef * torch.where(mask, weights * penalty, 0.0).sum()
    if inputs.entropy is not None:
        metrics["policy/entropy"] = Mean.of(inputs.entropy, mask)
    metrics["policy/loss"] = Sum(loss.detach())
    return loss, metrics


def _base(algorithm: Algorithm, inputs: LossInputs, log_probs: Tensor) -> Tensor:
    """What the ratio is taken to: the learner before the first update, or (bypass) the engine."""
    if algorithm.ratio_base == "rollout":
        return _wide(_given(inputs.rollout_log_probs, "ratio_base rollout", "rollout_log_probs"))
    return log_probs.detach() if inputs.old_log_probs is None else _wide(inputs.old_log_probs)


def _correction(algorithm: Algorithm, inputs: LossInputs, ratio: Ratio, advantages: Tensor) -> Tensor:
    """[n], detached: what the policy term of each token is multiplied with."""
    weights = torch.ones_like(ratio.detached)
    if inputs.mismatch_weights is not None:
        weights = torch.where(ratio.mask, _wide(inputs.mismatch_weights), 0.0)
    if algorithm.correction is not None and algorithm.correction.level == CURRENT:
        rollout = _given(inputs.rollout_log_probs, f"correction level {CURRENT}", "rollout_log_probs")
        weights = weights * current_weights(algorithm.correction, ratio.log_probs, _wide(rollout), ratio.mask)
    if algorithm.off_policy_sequence_mask is not None:  # DeepSeek-V3.2, arXiv 2512.02556
        moved = ratio.shards.expand(-ratio.sequences.log_ratio) > algorithm.off_policy_sequence_mask
        weights = torch.where(moved & (advantages < 0), 0.0, weights)
    return weights


def _given(tensor: Tensor | None, what: str, name: str) -> Tensor:
    if tensor is None:
        raise ValueError(f"{what}: {name} must be given")
    return tensor


def _penalty(algorithm: Algorithm, ratio: Ratio, ref_log_probs: Tensor | None) -> Tensor:
    ref = _given(ref_log_probs, "the algorithm has a KL term", "ref_log_probs")
    old = ratio.log_probs.detach() - ratio.token_log_ratio
    token_ratio = (ratio.log_probs - old).clamp(-TOKEN_CLAMP, TOKEN_CLAMP).exp()
    return algorithm.kl(ratio.log_probs, torch.where(ratio.mask, _wide(ref), 0.0), token_ratio)


def _metrics(ratio: Ratio, gated: Gated, correction: Tensor, advantages: Tensor) -> dict[str, Metric]:
    mask, z = ratio.mask, ratio.token_log_ratio
    sequences = ratio.sequences
    trained = sequences.counts > 0
    clamped_z = z.clamp(-TOKEN_CLAMP, TOKEN_CLAMP)
    metrics: dict[str, Metric] = {f"policy/{name}": Mean.of(flag, mask) for name, flag in gated.flags.items()}
    metrics |= {
        "policy/advantage_abs": Mean.of(advantages.abs(), mask),
        "policy/clamped_frac": Mean.of(ratio.clamped, mask),
        "policy/ratio_mean": Mean.of(ratio.detached, mask),
        "policy/ratio_min": Min.of(ratio.detached, mask),
        "policy/ratio_max": Max.of(ratio.detached, mask),
        "policy/ratio_p99": Quantile.of(ratio.detached, mask, 0.99, centre=1.0),
        "policy/log_ratio_token_std": Std.of(z, mask),
        "policy/log_ratio_token_max_abs": Max.of(z.abs(), mask),
        "policy/log_ratio_seq_mean": Mean.of(sequences.log_ratio, trained),
        "policy/log_ratio_seq_std": Std.of(sequences.log_ratio, trained),
        "policy/log_ratio_seq_min": Min.of(sequences.log_ratio, trained),
        "policy/log_ratio_seq_max": Max.of(sequences.log_ratio, trained),
        "policy/log_ratio_within_seq_var": Mean.of(sequences.variance, trained),
        "policy/kl_old_k1": Mean.of(-z, mask),
        "policy/kl_old_k3": Mean.of(clamped_z.expm1() - clamped_z, mask),
    }
    if "clip_frac" in gated.flags:
        metrics["policy/clip_seq_frac"] = _per_sequence(gated.flags["clip_frac"], ratio)
    if gated.weight is not None:
        positive, negative = mask & (advantages > 0), mask & (advantages < 0)
        metrics |= {
            "policy/gate_mean": Mean.of(gated.weight, mask),
            "policy/gate_min": Min.of(gated.weight, mask),
            "policy/gate_mean_pos": Mean.of(gated.weight, positive),
            "policy/gate_mean_neg": Mean.of(gated.weight, negative),
            "policy/gate_min_pos": Min.of(gated.weight, positive),
            "policy/gate_min_neg": Min.of(gated.weight, negative),
        }
    if gated.objective.requires_grad:
        objective = correction * gated.objective
        (gradient,) = torch.autograd.grad(objective.sum(), ratio.log_probs, retain_graph=True)
        metrics["policy/zero_grad_frac"] = Mean.of(gradient == 0, mask)
    return metrics


def _per_sequence(flag: Tensor, ratio: Ratio) -> Mean:
    """Mean over sequences of a token flag's mean over each: every token counts 1 / n_i, so shards just add up."""
    share = ratio.mask.double() / ratio.shards.expand(ratio.sequences.counts).double().clamp(min=1)
    return Mean((flag * share).sum(), share.sum())


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
