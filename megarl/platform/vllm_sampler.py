"""Seeded sampling on a CPU: one uniform number a token instead of one torch generator a request."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


class SeededSampler:
    """Draws every request's token with one uniform number that depends on its seed and its length alone.

    vLLM gives each seeded request a torch generator. On a CPU that costs a Python loop over the batch in every step, and
    a prompt that is prefilled in two parts fails, because vLLM rewinds the generator, which a CPU's cannot do.
    The seed comes in `SamplingParams.extra_args["seed"]`.
    """

    def __init__(self, runner: Any) -> None:
        self._runner, self._ids, self._seeds = runner, None, None

    def __call__(
        self, logits: torch.Tensor, generators: dict, k: torch.Tensor | None, p: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[n] token ids and [n, V] float32 log-probs of `logits [n, V]` after the optional top-k and top-p."""
        from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

        log_probs = apply_top_k_top_p(logits, k, p).log_softmax(dim=-1, dtype=torch.float32)
        cumulative = log_probs.exp().cumsum(dim=-1, dtype=torch.float64)
        lengths = self._runner.input_batch.num_tokens_no_spec[: len(logits)]
        draws = torch.from_numpy(uniforms(self._row_seeds(len(logits)), lengths))[:, None]
        chosen = torch.searchsorted(cumulative, draws * cumulative[:, -1:], right=True)
        return chosen.clamp_(max=logits.shape[1] - 1).squeeze(1), log_probs

    def _row_seeds(self, rows: int) -> np.ndarray:
        ids = self._runner.input_batch.req_ids[:rows]
        if ids != self._ids:
            extra = [self._runner.requests[request].sampling_params.extra_args or {} for request in ids]
            self._ids, self._seeds = list(ids), np.array([item.get("seed", 0) for item in extra], np.uint64)
        return self._seeds


def uniforms(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """[n] float64 in [0, 1): number `position` of each seed's SplitMix64 sequence (Steele, Lea and Flood 2014)."""
    with np.errstate(over="ignore"):
        z = seeds.astype(np.uint64) + (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) * 2.0**-53
