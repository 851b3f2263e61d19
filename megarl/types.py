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

    def take(self, index: Tensor) -> Batch:
        """The tokens at `index` (ascending), with every sequence kept and `lengths` counting what is left of it."""
        out = {item.name: getattr(self, item.name) for item in fields(self)}
        for name, value in out.items():
            if value is not None and name not in self.PER_SEQUENCE:
                out[name] = value[index]
        out["lengths"] = torch.bincount(self.sequence_ids()[index], minlength=len(self))
        return Batch(**out)

    def replace(self, **changes: Any) -> Batch:
        return replace(self, **changes)


@dataclass
class MicroBatch:
    """One packed forward on one rank: a `Batch` whose sequences are padded to what its layout needs.

    `batch` holds whole sequences, the same on all context-parallel ranks; the row `tokens` is what this rank computes.
    Row r scores the token `targets[r]` of `batch`: the one after the row's own. Padding is the tail of a sequence's
    document or a document of its own at the end; it scores nothing, so no statistic and no loss sees it.

    Example: sequences (5, 6, 7) and (8, 9) on one rank, padded to a multiple of 2: `tokens = [5, 6, 7, 8, 9, 0]`,
    `cu_seqlens = [0, 3, 5, 6]`, `targets = [1, 2, -1, 4, -1, -1]`, `last_rows = [2, 4]`, `owned = [1, 2, 4]`.
    """

    batch: Batch  # the real tokens only
    tokens: Tensor  # [n] int64: this rank's rows
    position_ids: Tensor  # [n] int64, from 0 in every document
    cu_seqlens: Tensor  # [documents + 1] int32: padded documents of the row that all context-parallel ranks hold together
    targets: Tensor  # [n] int64: index into `batch` of the token that the row predicts; -1: none
    last_rows: Tensor  # [S] int64: the row of each sequence's last token; -1: another rank has it
    # [l, n / tp, k] integer: the experts that the routers of this rank's l MoE layers are to choose for its rows, -1: as
    # they like; None: nothing is replayed
    experts: Tensor | None = None

    @property
    def owned(self) -> Tensor:
        """[m] int64, ascending: the tokens of `batch` that this rank scores; no first token of a sequence is one."""
        return self.targets[self.targets >= 0]

    @property
    def routed_rows(self) -> Tensor:
        """[n] bool: rows of response tokens whose routing something is computed from (not a sequence's last one)."""
        held = self.held
        return (held >= 0) & (self.targets >= 0) & (self.batch.response_mask[held.clamp(min=0)] > 0)

    @property
    def held(self) -> Tensor:
        """[n] int64: the token of `batch` in each row; -1: padding."""
        held = torch.where(self.targets >= 0, self.targets - 1, -1)
        here = self.last_rows >= 0
        held[self.last_rows[here]] = self.batch.offsets()[1:][here] - 1
        return held

    def local_batch(self) -> Batch:
        """The tokens that this rank scores, aligned with `owned`; every sequence is there, some perhaps empty."""
        return self.batch.take(self.owned)


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
