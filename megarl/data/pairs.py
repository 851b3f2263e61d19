"""Preference pairs: tokenised once, drawn as batches of whole pairs in an order that a checkpoint can continue."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from megarl.data.chat import render_sft_rows
from megarl.data.mixture import Mixture
from megarl.data.packing import BatchLayout, pack_units
from megarl.data.sources import Row, load_rows
from megarl.errors import BadInput
from megarl.types import Batch, MicroBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from megarl.config.schema import DataSource

SIDES = ("chosen", "rejected")
Pair = tuple[np.ndarray, np.ndarray]  # tokens of the chosen and of the rejected conversation, int32


class PairData:
    """Pairs of weighted sources; `dropped` counts pairs left out, by reason; `ends` holds the tokens that end them.

    A row has `chosen` and `rejected`: whole conversations (lists of messages whose last one is the assistant's), or
    answers (text, or a list of messages that starts with the assistant's) to `prompt` (text, or a list of messages).
    Pairs with a side longer than `max_tokens` are dropped. Raises BadInput, with file and line, for a row of another
    form and for sides that are empty or the same, and when a source keeps no pair.
    """

    def __init__(
        self, sources: Sequence[DataSource], tokenizer: PreTrainedTokenizerBase, max_tokens: int, seed: int
    ) -> None:
        self.dropped: Counter[str] = Counter()
        self._pairs = [self._load(source, tokenizer, max_tokens) for source in sources]
        self._mixture = Mixture([len(pairs) for pairs in self._pairs], [source.weight for source in sources], seed)

    def __len__(self) -> int:
        """Pairs that can be drawn."""
        return sum(len(pairs) for pairs in self._pairs)

    @property
    def longest(self) -> int:
        """Tokens of the longest pair, both sides together."""
        return max(len(chosen) + len(rejected) for pairs in self._pairs for chosen, rejected in pairs)

    @property
    def ends(self) -> set[int]:
        """The last tokens of all sides."""
        return {int(side[-1]) for pairs in self._pairs for pair in pairs for side in pair}

    def next(self, batch_size: int) -> Batch:
        """The next `batch_size` pairs laid end to end, see `pair_batch`."""
        return pair_batch([self._pairs[source][row] for source, row in self._mixture.draw(batch_size)])

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Every pair once, in order; the last batch may be smaller. Leaves the position of `next` alone."""
        pairs = [pair for source in self._pairs for pair in source]
        for start in range(0, len(pairs), batch_size):
            yield pair_batch(pairs[start : start + batch_size])

    def state_dict(self) -> dict[str, Any]:
        return self._mixture.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues exactly where `state` was taken. Raises BadInput when the data are not the same."""
        self._mixture.load_state_dict(state)

    def _load(self, source: DataSource, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> list[Pair]:
        rows = [_conversations(row) for row in load_rows(source)]
        chosen, rejected = (render_sft_rows(tokenizer, [pair[side] for pair in rows]) for side in (0, 1))
        kept, shortest = [], None
        for (row, _), (_, one, _), (_, other, _) in zip(rows, chosen, rejected, strict=True):
            if np.array_equal(one, other):
                raise BadInput(f"{row.origin}: chosen and rejected are the same; remove the row")
            longer = max(len(one), len(other))
            shortest = longer if shortest is None else min(shortest, longer)
            if longer > max_tokens:
                self.dropped["too_long"] += 1
            else:
                kept.append((one, other))
        if not kept:
            raise BadInput(
                f"{source.path or source.task}: no pair is left (the shortest has {shortest} tokens on its longer side, "
                f"the limit is {max_tokens}); raise reward_model.max_tokens or the model's context, or set other data"
            )
        return kept


def pair_batch(pairs: Sequence[Pair]) -> Batch:
    """Sequences 2 i and 2 i + 1 are the chosen and the rejected side of pair i; `group_index` is the pair."""
    sides = [side for pair in pairs for side in pair]
    tokens = torch.from_numpy(np.concatenate(sides).astype(np.int64))
    return Batch(
        tokens=tokens,
        lengths=torch.tensor([len(side) for side in sides]),
        response_mask=torch.ones(len(tokens)),
        group_index=torch.arange(len(pairs)).repeat_interleave(2),
    )


def pair_micro_batches(batch: Batch, token_budget: int, layout: BatchLayout) -> list[MicroBatch]:
    """This rank's packed micro-batches of `pair_batch`; both sides of a pair are in the same one."""
    return pack_units(batch, [(side, side + 1) for side in range(0, len(batch), 2)], token_budget, layout)


def _conversations(row: Row) -> tuple[Row, Row]:
    """The two sides as rows with whole conversations. Raises BadInput with the row's file and line."""
    missing = [name for name in SIDES if row.get(name) is None]
    if missing:
        raise BadInput(f"{row.origin}: no {' and no '.join(missing)}; a preference needs chosen and rejected")
    chosen, rejected = (Row({"messages": _messages(row, name)}, row.origin) for name in SIDES)
    return chosen, rejected


def _messages(row: Row, name: str) -> list[dict[str, Any]]:
    side, prompt = row[name], row.get("prompt")
    prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) and prompt else prompt or []
    if isinstance(side, str):
        if not prompt:
            raise BadInput(
                f"{row.origin}: {name} is a text and there is no prompt; add one, or give {name} as messages"
            )
        side = [{"role": "assistant", "content": side}]
    for what, messages in ((name, side), ("prompt", prompt)):
        good = isinstance(messages, list) and all(isinstance(m, dict) and "role" in m for m in messages)
        if not good or (what == name and not messages):
            raise BadInput(
                f'{row.origin}: {what} is {row[what]!r:.80}; set a text or [{{"role": …, "content": …}}, …], not empty'
            )
    last = side[-1]
    if last["role"] != "assistant" or not str(last.get("content") or "").strip():
        raise BadInput(
            f"{row.origin}: {name} ends with {last!r:.80}; its last message must be the assistant's, not empty"
        )
    return [*prompt, *side] if side[0]["role"] == "assistant" else side
