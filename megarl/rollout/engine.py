"""`Engine`: what the loops ask of a rollout engine, and `Sampling`: how it samples."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from megarl.types import Prompt, PromptGroup


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn: `samples` of each prompt, at most `max_tokens` long.

    Temperature 0 is greedy. `log_probs` are those of the distribution that was sampled from, so with the logits already
    divided by the temperature; greedy log-probs are those of temperature 1.
    """

    samples: int = 1
    max_tokens: int = 64
    temperature: float = 1.0
    log_probs: bool = True  # False: `rollout_log_probs` are all nan, and decoding is a little cheaper


@dataclass(frozen=True)
class EngineLayout:
    """Which ranks sample the same prompts: the `tensor_parallel` consecutive ranks of each of `count` replicas."""

    tensor_parallel: int
    count: int
    index: int  # of this rank's replica


@dataclass(frozen=True)
class Capabilities:
    """What an engine can do on this device."""

    sleep: bool  # gives its memory back while the learner works
    routed_experts: bool  # reports the experts of every token


def sample_seed(run_seed: int, prompt_id: str, sample_index: int, round_id: int) -> int:
    """The seed of one sample: the same in any batch, layout and process, below 2**63."""
    text = f"{run_seed}/{round_id}/{sample_index}/{prompt_id}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


class Engine(Protocol):
    """One rollout engine, seen from one of its ranks. All ranks of an engine make the same calls in the same order.

    The prompts of a call are its replica's, and may be none.
    """

    policy_version: int  # optimizer steps in the weights it holds
    layout: EngineLayout
    capabilities: Capabilities

    def generate(self, prompts: list[Prompt], sampling: Sampling, round_id: int) -> list[PromptGroup]:
        """Sample every prompt, in order. The prompts are this replica's share; `round_id` enters the seeds."""
        ...

    def score(self, sequences: list[list[int]]) -> list[np.ndarray]:
        """[len(sequence)] float32 each: log-prob of every token given the ones before, at temperature 1; entry 0 is 0."""
        ...

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]], policy_version: int) -> None:
        """Replace all weights by the named Hugging Face tensors and drop what was computed with the old ones."""
        ...

    def reset_prefix_cache(self) -> None: ...

    def sleep(self, level: int = 1) -> None:
        """Generate nothing until `wake`, and where `capabilities.sleep` give device memory back.

        1: weights to the host; 2: weights dropped. The cache is dropped in both.
        """
        ...

    def wake(self, tags: list[str] | None = None) -> None:
        """Take it again: all of it, or `weights` and `kv_cache` apart."""
        ...

    def memory(self) -> dict[str, tuple[int, int]]:
        """Bytes of `weights` and `kv_cache` on (device, host) now."""
        ...

    @property
    def rng_state(self) -> dict[str, Any]:
        """What must be saved so that sampling continues the same after a resume."""
        ...
