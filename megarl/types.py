"""The data that flows through a step: prompts, trajectories, the packed batch and its micro-batches.

Every per-token quantity is stored at the index of the token it belongs to, never at the index of the logit that
produced it: `log_probs[t]` is the log-probability of `tokens[t]` given the tokens before it. The shift by one happens
in one place, the vocabulary gather of the learner.

Symbols in the shape comments: N tokens of all sequences laid end to end, S sequences, L MoE layers, k experts a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """One prompt of a data set, tokenised.

    Example: `Prompt("chain_sum/17", (5, 9, 12), answer="7", reward=None, source="chain_sum")`.
    """

    prompt_id: str  # unique within the run's data
    token_ids: tuple[int, ...]  # after the chat template
    answer: str | None  # what a verifier compares with; None if the reward needs none
    reward: str | None = None  # name of the reward for this row; None = the config's
    source: str = ""  # which data source it came from, for metrics by source
    text: str = ""  # the prompt as text, for rollouts/ and the report
    metadata: dict[str, Any] = field(default_factory=dict)  # passed through to the reward (a reasoning-gym entry, ...)


@dataclass
class Trajectory:
    """One sampled response with all that is known of it.

    Example: prompt (5, 9), response (7, 1): `response_mask=[1, 1]`, two `rollout_log_probs`, `finish_reason="stop"`.
    """

    group_id: str  # the prompt's id plus the round it was sampled in
    sample_index: int  # 0 .. samples_per_prompt - 1
    prompt_ids: list[int]
    response_ids: list[int]  # includes the end token when the model emitted it
    response_mask: np.ndarray  # [len(response_ids)] uint8; 1 on tokens the policy sampled
    rollout_log_probs: np.ndarray  # [len(response_ids)] float32, by the engine while sampling
    finish_reason: str  # "stop" | "length" | "abort"
    policy_version: np.ndarray  # [len(response_ids)] int32: optimizer steps in the weights that produced the token
    text: str  # the response as text, without the end token
    routed_experts: np.ndarray | None = None  # [len(prompt_ids) + len(response_ids) - 1, L, k]
    score: float | None = None  # what the verifier said, unshaped; None = not scored
    shaped_reward: float | None = None  # what advantages are computed from
    reward_failed: bool = False  # the verifier crashed or timed out; `score` is then the configured one
    rewards: dict[str, float] = field(default_factory=dict)  # what each part of a weighted reward said, by name

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass
class PromptGroup:
    """One prompt and the trajectories sampled from it: the unit advantages are computed on."""

    group_id: str
    prompt: Prompt
    trajectories: list[Trajectory]


@dataclass
class Batch:
    """Sequences (prompt + response) laid end to end, each per-token field a flat tensor sliced by the same indices.

    Example: two sequences of 3 and 2 tokens: `tokens` has 5 entries, `lengths = [3, 2]`, and `select([1])` keeps the
    last two entries of every per-token field.
    """

    tokens: Tensor  # [N] int64
    lengths: Tensor  # [S] int64, sums to N
    response_mask: Tensor  # [N] float32: 1 on tokens that are trained on
    group_index: Tensor | None = None  # [S] int64: which prompt group a sequence belongs to
    sequence_index: Tensor | None = None  # [S] int64: its place in the rollout batch that this one was cut from
    rewards: Tensor | None = None  # [S] float64, shaped; NaN = not scored
    rollout_log_probs: Tensor | None = None  # [N] float32, 0 where response_mask is 0
    old_log_probs: Tensor | None = None  # [N] float32
    ref_log_probs: Tensor | None = None  # [N] float32
    advantages: Tensor | None = None  # [N] float32
    values: Tensor | None = None  # [N] float32
    returns: Tensor | None = None  # [N] float32: the critic's targets
    mismatch_weights: Tensor | None = None  # [N] float32: correction for the gap between engine and learner
    token_weights: Tensor | None = None  # [N] float32: mask x aggregation / global denominator
    routed_experts: Tensor | None = None  # [N, L, k] integer
    policy_version: Tensor | None = None  # [N] int32

    PER_SEQUENCE = ("lengths", "group_index", "sequence_index", "rewards")

    def __len__(self) -> int:
        return self.lengths.numel()

    def offsets(self) -> Tensor:
        """[S + 1] int64: where each sequence starts; the last entry is N."""
        return torch.cat([self.lengths.new_zeros(1), self.lengths.cumsum(0)])

    def sequence_ids(self) -> Tensor:
        """[N] int64: the sequence each token belongs to."""
        return torch.repeat_interleave(torch.arange(len(self), device=self.lengths.device), self.lengths)

    def to(self, device: torch.device) -> Batch:
        """The same batch with every field on `device`."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return Batch(**{name: None if value is None else value.to(device) for name, value in values.items()})

    def select(self, sequences: Sequence[int]) -> Batch:
        """The given sequences, in the given order, with every field sliced by the same indices."""
        offsets = self.offsets().tolist()
        rows = torch.tensor(list(sequences), dtype=torch.int64)
        pieces = [torch.arange(offsets[s], offsets[s + 1]) for s in rows.tolist()]
        index = torch.cat(pieces) if pieces else rows
        out = {}
        for item in fields(self):
            value = getattr(self, item.name)
            out[item.name] = None if value is None else value[rows if item.name in self.PER_SEQUENCE else index]
        return Batch(**out)

    def replace(self, **changes: Any) -> Batch:
        return replace(self, **changes)


@dataclass
class MicroBatch:
    """One packed forward on one rank: a `Batch` padded to the multiple its layout needs.

    Padding tokens form one more, untrained document at the end, so that no attention, statistic or loss sees them:
    `sequence_ids` gives them the id S, one past the real sequences.
    """

    batch: Batch  # the real tokens only
    tokens: Tensor  # [N + padding] int64
    position_ids: Tensor  # [N + padding] int64, from 0 in every document
    cu_seqlens: Tensor  # [S + 1 (+ 1 if padded)] int32
    sequence_ids: Tensor  # [N + padding] int64

    @property
    def held(self) -> Tensor:
        """[N + padding] int64: the token of `batch` in each row; -1: padding."""
        real = self.batch.tokens.numel()
        return torch.cat([torch.arange(real), torch.full((self.num_padding,), -1)])

    @property
    def num_padding(self) -> int:
        return self.tokens.numel() - self.batch.tokens.numel()

    @property
    def max_seqlen(self) -> int:
        return int((self.cu_seqlens[1:] - self.cu_seqlens[:-1]).max())


@dataclass
class SequenceShards:
    """Sequence-level sums over tokens that may be sharded over a context-parallel group.

    Locally a segment sum in float32, then one all-reduce of a `[S, columns]` tensor through `reduce`. Nothing here is
    differentiable: ratios use the stop-gradient form, so that no differentiable collective is needed.
    """

    sequence_ids: Tensor  # [n] int64: sequence of each local token
    num_sequences: int  # S
    reduce: Callable[[Tensor], Tensor] | None = None  # sums its argument over the ranks that share the sequences

    @torch.no_grad()
    def sum(self, *columns: Tensor) -> Tensor:
        """Per-sequence sums `[S, len(columns)]` (float32 or wider) of per-token columns `[n]`."""
        stacked = torch.stack(columns, dim=1).detach()
        stacked = stacked if stacked.dtype == torch.float64 else stacked.float()
        sums = stacked.new_zeros(self.num_sequences, len(columns)).index_add_(0, self.sequence_ids, stacked)
        return sums if self.reduce is None else self.reduce(sums)

    def mean(self, values: Tensor, mask: Tensor) -> Tensor:
        """Per-sequence mean `[S]` over tokens with mask 1; 0 for a sequence without any."""
        total, count = self.sum(torch.where(mask > 0, values, 0.0), mask).unbind(1)
        return total / count.clamp(min=1)

    def expand(self, per_sequence: Tensor) -> Tensor:
        """`[n]`: each local token's entry of `per_sequence [S]`."""
        return per_sequence[self.sequence_ids]
