"""Groups that a step trains on: what a filter keeps, refilled from fresh prompts, the surplus carried over."""

from __future__ import annotations

import math
from typing import Any

import torch

from megarl.algorithms import Algorithm
from megarl.metrics import Metric, Sum
from megarl.trainers.rollout_files import from_row, to_groups, to_row
from megarl.types import PromptGroup


class GroupPool:
    """Kept groups that wait for a step; the same on every rank, and part of a checkpoint."""

    def __init__(self, algorithm: Algorithm) -> None:
        self.filter = algorithm.filter
        self.waiting: list[PromptGroup] = []
        self._sampled = self._kept = self._rounds = 0

    def missing(self, wanted: int) -> int:
        """Prompts to sample next for a step of `wanted` groups: more than are missing when few were kept so far."""
        short = max(0, wanted - len(self.waiting))
        share = self._kept / self._sampled if self._sampled else 1.0
        return min(wanted, math.ceil(short / max(share, 1 / wanted)))

    def add(self, groups: list[PromptGroup]) -> None:
        """Take in freshly scored groups; those that the filter drops are gone."""
        kept = groups
        if self.filter is not None:
            index = torch.repeat_interleave(
                torch.arange(len(groups)), torch.tensor([len(g.trajectories) for g in groups])
            )
            scores = [math.nan if t.score is None else t.score for g in groups for t in g.trajectories]
            kept = [groups[i] for i in self.filter(torch.tensor(scores, dtype=torch.float64), index).tolist()]
        self._rounds += 1
        self._sampled += len(groups)
        self._kept += len(kept)
        self.waiting += kept

    def take(self, wanted: int) -> tuple[list[PromptGroup], dict[str, Metric]]:
        """The step's groups, at most `wanted`, oldest first; the rest waits. Metrics say what the filter did."""
        groups, self.waiting = self.waiting[:wanted], self.waiting[wanted:]
        metrics: dict[str, Metric] = {
            "groups/sampled": Sum(self._sampled),
            "groups/kept": Sum(self._kept),
            "groups/sampling_rounds": Sum(self._rounds),
            "groups/carried_over": Sum(len(self.waiting)),
        }
        self._sampled = self._kept = self._rounds = 0
        return groups, metrics

    def state_dict(self) -> dict[str, Any]:
        return {"waiting": [to_row(g.prompt, t) for g in self.waiting for t in g.trajectories]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.waiting = to_groups(from_row(row) for row in state["waiting"])
