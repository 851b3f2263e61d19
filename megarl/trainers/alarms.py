"""Numbers gone wrong: what is left out, what is said, and what ends a run. Every decision is the same on all ranks,
because it is made of reduced figures only."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

from megarl.config.schema import Alarms as Settings
from megarl.errors import RunFailed

SKIP_WINDOW = 100  # steps in which skips are counted
GRAD_NORMS = ("policy/grad_norm_max", "sft/grad_norm_max", "reward_model/grad_norm_max")
LOSSES = ("sft/loss", "reward_model/loss", "critic/loss")
# name -> the metrics it looks at (the first one there is), and whether it is compared with their median
WATCHED: dict[str, tuple[tuple[str, ...], bool]] = {
    "grad_norm": (GRAD_NORMS, True),
    "loss": (LOSSES, True),
    "length": (("response/length_mean",), True),
    "gap": (("gap/logprob_mean",), False),
    "kl": (("policy/kl_ref",), False),
    "entropy_loss": (("policy/entropy",), False),
    "held_out_loss": (("eval/accuracy",), False),
}
BEFORE_UPDATE = ("length", "gap")  # of RL: known once responses are sampled and the old pass is made


class Alarms:
    """The thresholds of one run with what they are compared with; a state owner of its checkpoints.

    `note` shows a line.
    """

    def __init__(self, settings: Settings, note: Callable[[str], None] = lambda line: None) -> None:
        self.settings, self.note = settings, note
        self.past: dict[str, list[float]] = {}  # metric -> the last `window` values
        self.first: dict[str, list[float]] = {}  # ... the first ones
        self.skips: list[int] = []  # steps with an optimizer step left out, once for each
        self.rewards: list[float] = []  # mean reward of the steps since the last evaluation
        self.evaluated: tuple[float, float] | None = None  # accuracy, and mean reward of the steps before it
        self.raised: set[str] = set()  # in the step before
        self.ended_by: str | None = None  # what an alarm ends the run with
        self.skips_now = 0  # of this step

    def most(self, loss: str, grad_norm: str) -> dict[str, float]:
        """What an optimizer step may have at most so as to be applied, for `Policy.train_step`; of these metrics."""
        out = {}
        for name, metric in (("loss", loss), ("grad_norm", grad_norm)):
            limit = self._limit(name, metric)
            if limit is not None and getattr(self.settings, name).action != "warn":
                out[name] = limit
        return out

    @property
    def asks_before_update(self) -> bool:
        return any(getattr(self.settings, name).action == "skip" for name in BEFORE_UPDATE)

    def skips_update(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Whether the updates of an RL step are left out for what is known before them, on every rank alike."""
        for name in BEFORE_UPDATE:
            figure = self._figure(name, metrics)
            if getattr(self.settings, name).action == "skip" and figure is not None and self._above(name, figure):
                self.skip(step, self._line(name, figure))
                return True
        return False

    def refused(self, step: int, reason: str, error: str) -> None:
        """An optimizer step was not applied for `reason` (nonfinite, loss or grad_norm). Raises RunFailed with the line
        `error` when that ends the run."""
        action = self.settings.on_nonfinite if reason == "nonfinite" else getattr(self.settings, reason).action
        if action == "stop":
            raise RunFailed(error)
        self.skip(step, error)

    def skip(self, step: int, line: str) -> None:
        """Count an update that is left out. Raises RunFailed when it is one too many."""
        self.skips = [s for s in self.skips if s > step - SKIP_WINDOW] + [step]
        self.skips_now += 1
        if len(self.skips) > self.settings.max_skips:
            raise RunFailed(
                f"{line} It is skip {len(self.skips)} in {SKIP_WINDOW} steps, more than alarms.max_skips="
                f"{self.settings.max_skips}"
            )
        self.note(f"step {step} skipped: {line}")

    def observe(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Take in a step's reduced metrics; its `alarms/` metrics. `ended_by` then says what ends the run."""
        out: dict[str, float] = {"alarms/skipped_updates": float(self.skips_now)}
        self.ended_by, found = None, set()
        for name in WATCHED:
            figure = self._figure(name, metrics)
            if figure is None:
                continue
            raised = self._above(name, figure)
            out[f"alarms/{name}"] = float(raised)
            if raised:
                found.add(name)
                if getattr(self.settings, name).action == "stop":
                    self.ended_by = self.ended_by or self._line(name, figure)
                elif name not in self.raised:
                    self.note(f"warning: step {step}: {self._line(name, figure)}")
        self.raised, self.skips_now = found, 0
        self._remember(metrics)
        return out

    def state_dict(self) -> dict[str, Any]:
        return {
            "past": self.past, "first": self.first, "skips": self.skips, "rewards": self.rewards,
            "evaluated": self.evaluated, "raised": sorted(self.raised),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.past, self.first, self.skips, self.rewards = (state[n] for n in ("past", "first", "skips", "rewards"))
        self.evaluated = None if state["evaluated"] is None else tuple(state["evaluated"])
        self.raised = set(state["raised"])

    def _figure(self, name: str, metrics: Mapping[str, float]) -> float | None:
        """What the threshold of an alarm is for; None where there is none, or nothing to compare with yet."""
        if getattr(self.settings, name).above is None:
            return None
        metric = next((one for one in WATCHED[name][0] if one in metrics), None)
        if metric is None:
            return None
        value = metrics[metric]
        if name == "entropy_loss":
            start = self.first.get(metric, [])
            return 1 - value / median(start) if len(start) == self.settings.window and median(start) > 0 else None
        if name == "held_out_loss":
            if self.evaluated is None or not self.rewards:
                return None
            accuracy, reward = self.evaluated
            rose = sum(self.rewards) / len(self.rewards) > reward
            return accuracy - value if rose else 0.0
        if not WATCHED[name][1]:
            return value
        past = self.past.get(metric, [])
        return value / median(past) if len(past) == self.settings.window and median(past) > 0 else None

    def _above(self, name: str, figure: float) -> bool:
        return not figure <= getattr(self.settings, name).above  # NaN is

    def _limit(self, name: str, metric: str) -> float | None:
        above, past = getattr(self.settings, name).above, self.past.get(metric, [])
        return above * median(past) if above is not None and len(past) == self.settings.window else None

    def _line(self, name: str, figure: float) -> str:
        of = " times the median" if WATCHED[name][1] else ""
        return f"{name} is {figure:.3g}{of}, above alarms.{name}.above={getattr(self.settings, name).above:g}."

    def _remember(self, metrics: Mapping[str, float]) -> None:
        for metric in (one for metrics_, _ in WATCHED.values() for one in metrics_):
            value = metrics.get(metric, math.nan)
            if not math.isfinite(value) or metric == "eval/accuracy":
                continue
            self.past[metric] = [*self.past.get(metric, []), value][-self.settings.window :]
            first = self.first.setdefault(metric, [])
            if len(first) < self.settings.window:
                first.append(value)
        if math.isfinite(metrics.get("reward/mean", math.nan)):
            self.rewards.append(metrics["reward/mean"])
        if "eval/accuracy" in metrics:
            reward = sum(self.rewards) / len(self.rewards) if self.rewards else math.inf
            self.evaluated, self.rewards = (metrics["eval/accuracy"], reward), []
