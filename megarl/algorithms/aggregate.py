"""Aggregation: how token losses become one number, as constant weights per token with global denominators.

The loss of an optimizer step is the sum over all its tokens of weight times token loss, whatever rank and micro-batch
a token sits in; so the counts are those of the whole optimizer-step batch, taken before the first micro-batch. A new
aggregation is a function here, a line in `AGGREGATIONS` and a test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Counts:
    """What the denominators are made of, over all ranks and micro-batches of one optimizer step."""

    tokens: float  # trained tokens
    sequences: float  # all sequences, also those without a trained token
    nonempty: float  # sequences with a trained token

    @classmethod
    def from_tensor(cls, counts: Tensor) -> Counts:
        """From the all-reduced sum of `count(...)`."""
        return cls(*counts.tolist())


def count(mask: Tensor, sequence_ids: Tensor, num_sequences: int) -> Tensor:
    """`[3]` float64: this rank's trained tokens, sequences and non-empty sequences; sum it over data-parallel ranks."""
    lengths = _lengths(mask, sequence_ids, num_sequences)
    return torch.stack([lengths.sum(), lengths.new_tensor(num_sequences), (lengths > 0).double().sum()])


def token_weights(
    aggregate: str,
    mask: Tensor,
    sequence_ids: Tensor,
    counts: Counts,
    *,
    n_seq: str = "all",
    fixed_length: int | None = None,
) -> Tensor:
    """W [n] in the dtype of `mask`, 0 where the mask is 0.

    mask [n], sequence_ids [n] in 0 .. S-1 with every sequence whole on this rank, `counts` global. `n_seq`: whether
    denominators count `all` sequences, or only `valid` ones with a trained token. `fixed_length`: the generation
    budget, for the aggregation of that name.
    Raises ValueError for an unknown name or a missing fixed_length.
    """
    if aggregate not in AGGREGATIONS:
        raise ValueError(f"aggregate {aggregate} is unknown; choose one of: {', '.join(AGGREGATIONS)}")
    if n_seq not in ("all", "valid"):
        raise ValueError(f"n_seq {n_seq} is unknown; choose one of: all, valid")
    num_sequences = int(sequence_ids.max()) + 1 if sequence_ids.numel() else 0
    own_length = _lengths(mask, sequence_ids, num_sequences)[sequence_ids].clamp(min=1)
    sequences = max(counts.sequences if n_seq == "all" else counts.nonempty, 1.0)
    denominator = AGGREGATIONS[aggregate](own_length, counts, sequences, fixed_length)
    return torch.where(mask > 0, 1.0 / denominator, 0.0).to(mask.dtype)


def _lengths(mask: Tensor, sequence_ids: Tensor, num_sequences: int) -> Tensor:
    return mask.new_zeros(num_sequences, dtype=torch.float64).index_add_(0, sequence_ids, (mask > 0).double())


def _token_mean(own_length: Tensor, counts: Counts, sequences: float, fixed_length: int | None) -> Tensor:
    """Mean over all trained tokens of the batch (DAPO, arXiv 2503.14476, section 3.3)."""
    return torch.full_like(own_length, max(counts.tokens, 1.0))


def _seq_mean_token_mean(own_length: Tensor, counts: Counts, sequences: float, fixed_length: int | None) -> Tensor:
    """Mean over sequences of the mean over a sequence's tokens (GRPO, arXiv 2402.03300; GSPO, arXiv 2507.18071)."""
    return own_length * sequences


def _seq_mean_token_sum(own_length: Tensor, counts: Counts, sequences: float, fixed_length: int | None) -> Tensor:
    """Mean over sequences of the sum over a sequence's tokens (REINFORCE, RLOO)."""
    return torch.full_like(own_length, sequences)


def _fixed_length(own_length: Tensor, counts: Counts, sequences: float, fixed_length: int | None) -> Tensor:
    """Sum over tokens / (sequences x generation budget) (Dr. GRPO, arXiv 2503.20783)."""
    if not fixed_length:
        raise ValueError("aggregate fixed-length needs fixed_length, the generation budget in tokens")
    return torch.full_like(own_length, sequences * fixed_length)


AGGREGATIONS: dict[str, Callable[[Tensor, Counts, float, int | None], Tensor]] = {
    "token-mean": _token_mean,
    "seq-mean-token-mean": _seq_mean_token_mean,
    "seq-mean": _seq_mean_token_mean,  # a sequence-level objective: each of its n_i tokens carries 1 / n_i of it
    "seq-mean-token-sum": _seq_mean_token_sum,
    "fixed-length": _fixed_length,
}
