"""Prompts for RL and for evaluation: tokenised once, drawn in a shuffled order that a checkpoint can continue."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from megarl.data.chat import render_prompts
from megarl.data.mixture import Mixture
from megarl.data.sources import Row, label, load_rows
from megarl.errors import BadInput
from megarl.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from megarl.config.schema import DataSource

# What the field names of a row mean to megarl itself; all others reach the reward as metadata.
OWN_FIELDS = {"messages", "prompt", "response", "answer", "reward", "text"}

# `(reward name or None) -> fields`: those of "answer" and "entry" that a row must have for its reward; raises BadInput
# for an unknown name. `megarl.rewards.required_field` with the config's reward bound.
RequiredField = Callable[[str | None], tuple[str, ...]]


class PromptSource:
    """An endless stream of prompts from weighted sources; `dropped` counts rows left out, by reason.

    `exclude` holds prompt texts (`Prompt.text` of held-out prompts) that must never be drawn. Raises BadInput when a
    source keeps no prompt, when a row lacks the field its reward needs, or names an unknown reward.
    """

    def __init__(
        self,
        sources: Sequence[DataSource],
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        max_prompt_tokens: int,
        *,
        exclude: Collection[str] = frozenset(),
        required_field: RequiredField | None = None,
    ) -> None:
        self.dropped: Counter[str] = Counter()
        self.prompts = _load(sources, tokenizer, max_prompt_tokens, exclude, required_field, self.dropped)
        self._mixture = Mixture([len(group) for group in self.prompts], [source.weight for source in sources], seed)

    def __len__(self) -> int:
        """Prompts that can be drawn."""
        return sum(len(group) for group in self.prompts)

    def next(self, count: int) -> list[Prompt]:
        """The next `count` prompts; one that comes again within them (small data) has `#2`, ... after its id."""
        seen: Counter[str] = Counter()
        drawn = []
        for source, row in self._mixture.draw(count):
            prompt = self.prompts[source][row]
            seen[prompt.prompt_id] += 1
            times = seen[prompt.prompt_id]
            drawn.append(prompt if times == 1 else dataclasses.replace(prompt, prompt_id=f"{prompt.prompt_id}#{times}"))
        return drawn

    def epochs(self) -> dict[str, float]:
        """How often each source has been gone through, by its label."""
        return {group[0].source: epoch for group, epoch in zip(self.prompts, self._mixture.epochs, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        return self._mixture.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues exactly where `state` was taken. Raises BadInput when the data are not the same."""
        self._mixture.load_state_dict(state)


def load_eval_prompts(
    sources: Sequence[DataSource],
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_tokens: int,
    *,
    required_field: RequiredField | None = None,
) -> list[Prompt]:
    """Every held-out prompt in order, each text once; ids start with `eval/`. Raises BadInput as `PromptSource`."""
    groups = _load(sources, tokenizer, max_prompt_tokens, frozenset(), required_field, Counter(), prefix="eval/")
    unique: dict[str, Prompt] = {}
    for group in groups:
        for prompt in group:
            unique.setdefault(prompt.text, prompt)
    return list(unique.values())


def _load(
    sources: Sequence[DataSource],
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_tokens: int,
    exclude: Collection[str],
    required_field: RequiredField | None,
    dropped: Counter[str],
    prefix: str = "",
) -> list[list[Prompt]]:
    groups, labels = [], Counter()
    for source in sources:
        name = label(source)
        labels[name] += 1
        name = name if labels[name] == 1 else f"{name}.{labels[name]}"
        rows = list(load_rows(source))
        rendered = render_prompts(tokenizer, rows)
        group = []
        for index, (row, (text, tokens)) in enumerate(zip(rows, rendered, strict=True)):
            prompt = _prompt(row, source, f"{prefix}{name}/{index}", name, text, tokens, required_field)
            reason = "too_long" if len(tokens) > max_prompt_tokens else "held_out" if text in exclude else None
            if reason is None:
                group.append(prompt)
            else:
                dropped[reason] += 1
        if not group:
            shortest = min(len(tokens) for _, tokens in rendered)
            raise BadInput(
                f"{source.path or source.task}: none of {len(rows)} prompts is left (the shortest has {shortest} tokens, "
                f"the limit is {max_prompt_tokens}, {dropped['held_out']} are held out); raise max_prompt_tokens or "
                "the model's context, or set other data"
            )
        groups.append(group)
    return groups


def _prompt(
    row: Row,
    source: DataSource,
    prompt_id: str,
    name: str,
    text: str,
    tokens: list[int],
    required_field: RequiredField | None,
) -> Prompt:
    reward = row.get("reward") or source.reward
    if not (reward is None or isinstance(reward, str)):
        raise BadInput(f"{row.origin}: reward is {reward!r:.80}; set the name of one of reward.named")
    if required_field is not None:
        try:
            needed = required_field(reward)
        except BadInput as error:
            raise BadInput(f"{row.origin}: {error}") from None
        for field in needed:
            if row.get(field) is None:
                who = reward or "of the config"
                raise BadInput(f"{row.origin}: no {field}, which reward {who} needs; add the field")
    answer = row.get("answer")
    if not (answer is None or isinstance(answer, str | int | float)):
        raise BadInput(f"{row.origin}: answer is {answer!r:.80}; set a text or a number")
    metadata = {key: value for key, value in row.items() if key not in OWN_FIELDS}
    return Prompt(prompt_id, tuple(tokens), None if answer is None else str(answer), reward, name, text, metadata)
