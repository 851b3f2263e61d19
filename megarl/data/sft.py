"""Supervised rows: tokenised once, drawn as batches in a shuffled order that a checkpoint can continue."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from megarl.data.chat import render_sft_rows
from megarl.data.mixture import Mixture
from megarl.data.sources import load_rows
from megarl.errors import BadInput
from megarl.types import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from megarl.config.schema import DataSource

TokenRow = tuple[np.ndarray, np.ndarray]  # tokens [n] int32, mask [n] uint8


class SFTData:
    """Rows of weighted sources as token and mask arrays; `dropped` counts rows left out, by reason.

    Rows longer than `max_tokens` are dropped, and rows whose prompt text is in `exclude` (held-out prompts). Raises
    BadInput when a source keeps no row.
    """

    def __init__(
        self,
        sources: Sequence[DataSource],
        tokenizer: PreTrainedTokenizerBase,
        max_tokens: int,
        seed: int,
        *,
        exclude: Collection[str] = frozenset(),
    ) -> None:
        self.dropped: Counter[str] = Counter()
        self._rows = [self._load(source, tokenizer, max_tokens, exclude) for source in sources]
        self._mixture = Mixture([len(rows) for rows in self._rows], [source.weight for source in sources], seed)

    def __len__(self) -> int:
        """Rows that can be drawn."""
        return sum(len(rows) for rows in self._rows)

    def next(self, batch_size: int) -> Batch:
        """The next `batch_size` rows laid end to end."""
        return _batch([self._rows[source][row] for source, row in self._mixture.draw(batch_size)])

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Every row once, in order; the last batch may be smaller. Leaves the position of `next` alone."""
        rows = [row for source in self._rows for row in source]
        for start in range(0, len(rows), batch_size):
            yield _batch(rows[start : start + batch_size])

    def state_dict(self) -> dict[str, Any]:
        return self._mixture.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues exactly where `state` was taken. Raises BadInput when the data are not the same."""
        self._mixture.load_state_dict(state)

    def _load(
        self, source: DataSource, tokenizer: PreTrainedTokenizerBase, max_tokens: int, exclude: Collection[str]
    ) -> list[TokenRow]:
        kept, shortest, held_out = [], None, 0
        for text, tokens, mask in render_sft_rows(tokenizer, list(load_rows(source))):
            shortest = len(tokens) if shortest is None else min(shortest, len(tokens))
            if len(tokens) > max_tokens:
                self.dropped["too_long"] += 1
            elif text in exclude:
                held_out += 1
            else:
                kept.append((tokens, mask))
        self.dropped["held_out"] += held_out
        if not kept:
            raise BadInput(
                f"{source.path or source.task}: no row is left (the shortest has {shortest} tokens, the limit is "
                f"{max_tokens}, {held_out} are held out); raise sft.max_tokens or the model's context, or set other data"
            )
        return kept


def _batch(rows: list[TokenRow]) -> Batch:
    return Batch(
        tokens=torch.from_numpy(np.concatenate([tokens for tokens, _ in rows]).astype(np.int64)),
        lengths=torch.tensor([len(tokens) for tokens, _ in rows]),
        response_mask=torch.from_numpy(np.concatenate([mask for _, mask in rows]).astype(np.float32)),
    )
