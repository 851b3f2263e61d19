"""Guard rails: settings from another algorithm's world, said before the run and once they have been measured."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from megarl.algorithms.presets import Algorithm, from_config

REFERENCE_LENGTH = 2000  # tokens: what GSPO's bounds were published for
REFERENCE_BAND = 3.5e-4
SEQUENCE_RATIOS = ("sequence", "sequence-token")
MOSTLY_CLIPPED = 0.5
GROUPED = ("group", "leave-one-out", "group-mean-then-whiten")


def band_for(length: float) -> float:
    """A clip bound for a sequence ratio over responses of `length` tokens: log s_i is a mean over them, so that its
    spread goes with 1 / sqrt(length)."""
    return REFERENCE_BAND * math.sqrt(REFERENCE_LENGTH / max(length, 1.0))


def warnings(algorithm: Algorithm, optimizer_steps: int, budget: int) -> list[str]:
    """One line for each setting that will not do what it is there for; `budget` is the longest response in tokens."""
    settings, out = dict(algorithm.gate.settings), []
    bounded = algorithm.gate.type in ("clip", "ratio-mask", "log-clip")
    if optimizer_steps == 1 and algorithm.gate.type != "none" and algorithm.ratio_base == "old":
        out.append(
            f"rl.optimizer_steps_per_rollout = 1: the ratio is 1 in the only update, so gate {algorithm.gate.type} "
            "never acts; set 2 or more, or gate.type: none"
        )
    if bounded and algorithm.ratio in SEQUENCE_RATIOS and settings["high"] >= 0.1:
        out.append(
            f"gate.high = {settings['high']}: a sequence ratio is a mean over tokens and never gets there, that is a "
            f"bound for token ratios; for responses of up to {budget} tokens set about {band_for(budget):.1e}"
        )
    if bounded and algorithm.ratio in SEQUENCE_RATIOS and settings["high"] < band_for(budget) / 3:
        out.append(
            f"gate.high = {settings['high']}: published for responses of thousands of tokens; with at most {budget} it "
            f"clips most sequences; set about {band_for(budget):.1e}"
        )
    if bounded and algorithm.ratio in ("token", "geometric-mean-of-clipped") and settings["high"] < 0.01:
        out.append(
            f"gate.high = {settings['high']}: a token ratio leaves it with nearly every update, that is a bound for "
            "sequence ratios; set about 0.2"
        )
    return out


def refusal(algorithm: Algorithm, samples_per_prompt: int) -> str | None:
    """Why a run with this algorithm cannot learn anything; None when it can."""
    if samples_per_prompt == 1 and algorithm.advantage.type in GROUPED:
        return (
            f"rl.samples_per_prompt = 1: advantage {algorithm.advantage.type} compares the samples of a prompt; set at "
            "least 2, or advantage.type: return-to-go"
        )
    if samples_per_prompt == 1 and algorithm.filter is not None:
        return f"rl.samples_per_prompt = 1: filter {algorithm.filter.type} compares the samples of a prompt; set at least 2"
    return None


def measured(algorithm: Algorithm, metrics: dict[str, float]) -> str | None:
    """A line when the gate was seen to close for most sequences; `metrics` are those of a step."""
    clipped = metrics.get("policy/clip_seq_frac", 0.0)
    if algorithm.ratio not in SEQUENCE_RATIOS or clipped <= MOSTLY_CLIPPED:
        return None
    length = metrics.get("response/length_mean", 0.0)
    return (
        f"policy/clip_seq_frac = {clipped:.2f}: the gate drops most sequences of {length:.0f} tokens on average; set "
        f"rl.algorithm.gate.high to about {band_for(length):.1e} (and gate.low likewise)"
    )


def describe_algorithm(config: Any) -> list[str]:
    """Every axis of `rl.algorithm` as it resolves, then what is to be said about it; `config` is a run's.

    A composition that is refused comes out as the one line that says why.
    """
    rl, budget = config.rl, config.rollout.max_response_tokens
    try:
        algorithm = from_config(rl.algorithm, budget)
    except ValueError as error:
        return [f"rl.algorithm: {error}"]
    axes = [(field.name, getattr(algorithm, field.name)) for field in dataclasses.fields(algorithm)]
    lines = [f"rl.algorithm.{name}: {value}" for name, value in axes if value is not None]
    said = [refusal(algorithm, rl.samples_per_prompt), *warnings(algorithm, rl.optimizer_steps_per_rollout, budget)]
    return lines + [f"warning: {line}" for line in said if line]
