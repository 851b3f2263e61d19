"""Rewards of trajectories: verifiers in processes, reward models on the learner's ranks, and weighted sums of both."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence

import torch
from torch import UntypedStorage

from megarl.config.schema import Config
from megarl.convert import read_spec
from megarl.data import load_tokenizer, micro_batches
from megarl.errors import BadInput
from megarl.learner.host_parked import HostParked
from megarl.learner.policy import Policy
from megarl.metrics import Mean, Metric
from megarl.parallel import Mesh
from megarl.rewards import MODEL, WEIGHTED, RewardRunner, ScoreResult, all_rewards, parts
from megarl.types import Batch, PromptGroup


class ModelReward:
    """A reward model sharded over the mesh; its weights are on the host while nothing is scored."""

    def __init__(self, path: str, cfg: Config, mesh: Mesh, policy_path: str) -> None:
        """Raises BadInput when `path` is no reward model, or reads other tokens than the policy writes. Collective."""
        if read_spec(path).head != "scalar":
            raise BadInput(f"{path}: a language model gives no scores; give a reward model (megarl reward-model)")
        if load_tokenizer(path).get_vocab() != load_tokenizer(policy_path).get_vocab():
            raise BadInput(
                f"{path}: its tokenizer is not that of {policy_path}; train a reward model of the same family"
            )
        self.mesh, self.token_budget = mesh, cfg.rl.micro_batch_tokens
        self.policy = Policy.from_hf(path, cfg, mesh, role="reward")
        self.parked = HostParked.modules(self.policy.modules)

    def score(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """The score of each of this rank's own sequences at its last token; NaN beyond the model's context.

        Collective: every rank calls it, also without sequences. All ranks' sequences are shared out over the mesh.
        """
        mesh, context = self.mesh, self.policy.spec.max_position_embeddings
        ranks = mesh.all_gather_object([list(sequence) for sequence in sequences])
        everyone = [sequence for rank in ranks for sequence in rank]
        known = dict.fromkeys(range(len(everyone)), math.nan)
        fitting = [index for index, sequence in enumerate(everyone) if len(sequence) <= context]
        if fitting:
            with self.parked.on_device():
                known |= self._score([everyone[index] for index in fitting], fitting)
        first = sum(len(rank) for rank in ranks[: mesh.rank])
        return [known[index] for index in range(first, first + len(sequences))]

    def _score(self, sequences: list[list[int]], indices: list[int]) -> dict[int, float]:
        """Index -> score, the same on every rank."""
        mesh = self.mesh
        lengths = [len(sequence) for sequence in sequences]
        tokens = torch.tensor(list(itertools.chain.from_iterable(sequences)))
        batch = Batch(tokens, torch.tensor(lengths), torch.ones(len(tokens)), sequence_index=torch.tensor(indices))
        packed = micro_batches(batch, self.token_budget, self.policy.layout)
        scores = self.policy.scores(packed)
        mine = {
            index: x
            for micro, out in zip(packed, scores)
            for index, x in zip(micro.batch.sequence_index.tolist(), out.tolist(), strict=True)
        }
        return {index: x for rank in mesh.all_gather_object(mine) for index, x in rank.items()}


class Scorer:
    """Scores trajectories with what the config's `reward` and the rows name."""

    def __init__(self, cfg: Config, mesh: Mesh, verifiers: RewardRunner, policy_path: str) -> None:
        """`policy_path`: the folder with the policy's tokenizer. Loads the reward models; collective."""
        self.reward, self.verifiers = cfg.reward, verifiers
        self._rewards = all_rewards(cfg.reward)
        self._models = {
            name: ModelReward(one.params["path"], cfg, mesh, policy_path)
            for name, one in self._rewards.items()
            if one.type == MODEL
        }

    @property
    def storages(self) -> list[UntypedStorage]:
        """Of the reward models' weights."""
        return [storage for model in self._models.values() for storage in model.parked.storages]

    def score(self, groups: Sequence[PromptGroup]) -> None:
        """Fill in `score`, `shaped_reward` (the same), `reward_failed` and `rewards` of every trajectory of `groups`.

        `groups` are this rank's own ones. Every rank calls it at the same point, also without groups: reward models
        are collective. A trajectory of which any part could not be scored has failed, and has the `failed_score` of
        the reward it asked for; None when a verifier said NaN, which keeps it out of its group's statistics.
        Raises RunFailed as `RewardRunner.score`.
        """
        rows = [(group.prompt, trajectory) for group in groups for trajectory in group.trajectories]
        factors = [parts(self.reward, prompt.reward) for prompt, _ in rows]
        wanted = [(row, name) for row, names in enumerate(factors) for name in names]
        results: dict[tuple[int, str | None], ScoreResult] = {}
        checked = [key for key in wanted if key[1] not in self._models]
        items = [(dataclasses.replace(rows[row][0], reward=name), rows[row][1].text) for row, name in checked]
        results |= zip(checked, self.verifiers.score(items), strict=True)
        for name, model in self._models.items():
            asked = [key for key in wanted if key[1] == name]
            sequences = [[*rows[row][1].prompt_ids, *rows[row][1].response_ids] for row, _ in asked]
            results |= zip(asked, self._judged(name, model.score(sequences)), strict=True)
        for row, (prompt, trajectory) in enumerate(rows):
            found = {name: results[row, name] for name in factors[row]}
            own = self._rewards[prompt.reward]
            trajectory.reward_failed = any(result.failed for result in found.values())
            total = sum(factor * found[name].score for name, factor in factors[row].items())
            known = {name: result.score for name, result in found.items() if not math.isnan(result.score)}
            trajectory.score = own.failed_score if trajectory.reward_failed else total
            if len(known) < len(found):
                trajectory.score = None
            trajectory.shaped_reward = trajectory.score
            if own.type == WEIGHTED:
                trajectory.rewards = known

    def _judged(self, name: str | None, scores: Iterable[float]) -> list[ScoreResult]:
        failed = ScoreResult(self._rewards[name].failed_score, True, "the reward model gave no finite score")
        return [ScoreResult(score) if math.isfinite(score) else failed for score in scores]


def part_metrics(groups: Sequence[PromptGroup]) -> dict[str, Metric]:
    """`reward/<name>`: the mean of each part of a weighted reward, before its factor, over trajectories that have it."""
    said: dict[str, list[float]] = {}
    for trajectory in (t for group in groups for t in group.trajectories):
        for name, score in trajectory.rewards.items():
            said.setdefault(name, []).append(score)
    return {f"reward/{name}": Mean(sum(scores), len(scores)) for name, scores in said.items()}
