"""Weighted, shuffled, endless order over the rows of several sources, as a value that can be saved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from megarl.errors import BadInput


class Mixture:
    """Draws `(source, row)` pairs so that after any number of draws each source has its share to within one draw.

    Every source is shuffled anew each epoch, by (seed, source, epoch) alone: the state is how many rows each source
    has given.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        self.sizes = list(sizes)
        self.shares = np.asarray(weights, dtype=np.float64) / np.sum(weights)
        self.seed = seed
        self.drawn = [0] * len(self.sizes)
        self._orders: list[tuple[int, np.ndarray] | None] = [None] * len(self.sizes)

    @property
    def epochs(self) -> list[float]:
        """How often each source has been gone through."""
        return [drawn / size for drawn, size in zip(self.drawn, self.sizes, strict=True)]

    def draw(self, count: int) -> list[tuple[int, int]]:
        return [self._draw_one() for _ in range(count)]

    def _draw_one(self) -> tuple[int, int]:
        behind = self.shares * (sum(self.drawn) + 1) - np.asarray(self.drawn)
        source = int(np.argmax(behind))
        epoch, position = divmod(self.drawn[source], self.sizes[source])
        self.drawn[source] += 1
        return source, int(self._order(source, epoch)[position])

    def _order(self, source: int, epoch: int) -> np.ndarray:
        cached = self._orders[source]
        if cached is None or cached[0] != epoch:
            order = np.random.default_rng((self.seed, source, epoch)).permutation(self.sizes[source])
            self._orders[source] = cached = (epoch, order)
        return cached[1]

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": list(self.drawn), "sizes": list(self.sizes), "seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues exactly where `state` was taken. Raises BadInput when the data are not the same."""
        for key, now in (("sizes", self.sizes), ("seed", self.seed)):
            if state[key] != now:
                raise BadInput(f"checkpoint was written with data {key} {state[key]}, now {now}; resume with the same")
        self.drawn = list(state["drawn"])
