"""An algorithm is a value: one choice on each axis. The presets are the published ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megarl.algorithms.advantage import ESTIMATORS
from megarl.algorithms.aggregate import AGGREGATIONS, Counts, token_weights
from megarl.algorithms.axis import Choice, choose, keyword_settings
from megarl.algorithms.gate import GATES
from megarl.algorithms.ratio import LEVELS
from megarl.algorithms.regularize import KL


def advantage(type: str, **settings: Any) -> Choice:
    """A registered advantage estimator with its settings."""
    return choose("advantage", ESTIMATORS, type, **settings)


def gate(type: str, **settings: Any) -> Choice:
    """A registered gate with its settings."""
    return choose("gate", GATES, type, **settings)


@dataclass(frozen=True)
class Algorithm:
    """One choice per axis. Raises ValueError, with the reason, for a composition that means nothing."""

    advantage: Choice
    ratio: str
    gate: Choice
    aggregate: str
    kl: KL | None = None  # None: no reference model is needed
    n_seq: str = "all"  # whether empty sequences count in denominators: "all" or "valid"
    fixed_length: int | None = None  # the generation budget, for aggregate fixed-length

    def __post_init__(self) -> None:
        reason = _meaningless(self)
        if reason:
            raise ValueError(reason)

    @property
    def needs_reference(self) -> bool:
        return self.kl is not None

    def advantages(self, rewards: Tensor, group_index: Tensor) -> Tensor:
        """`[S]` advantages from rewards [S] (NaN: not scored) and group_index [S]; groups must be whole."""
        return self.advantage(rewards, group_index)

    def token_weights(self, mask: Tensor, sequence_ids: Tensor, counts: Counts) -> Tensor:
        """`[n]`: mask x aggregation / global denominator, see `aggregate.token_weights`."""
        return token_weights(
            self.aggregate, mask, sequence_ids, counts, n_seq=self.n_seq, fixed_length=self.fixed_length
        )


def _meaningless(algorithm: Algorithm) -> str | None:
    if algorithm.ratio not in LEVELS:
        return f"ratio {algorithm.ratio} is unknown; choose one of: {', '.join(LEVELS)}"
    if algorithm.aggregate not in AGGREGATIONS:
        return f"aggregate {algorithm.aggregate} is unknown; choose one of: {', '.join(AGGREGATIONS)}"
    if algorithm.aggregate == "fixed-length" and not algorithm.fixed_length:
        return "aggregate fixed-length needs fixed_length, the generation budget in tokens"
    if algorithm.gate.type == "clip" and algorithm.ratio == "none":
        return "gate clip bounds a ratio and ratio is none: set ratio to token or sequence, or gate to none"
    dual = dict(algorithm.gate.settings).get("dual")
    if dual is not None and dual <= 1:
        return f"gate dual {dual} would clip every negative advantage: set it above 1"
    return None


# GSPO, arXiv 2507.18071, section 5.1. Its bounds suit responses of thousands of tokens: scale them by
# sqrt(2000 / length) for shorter ones, since log s_i is a mean over a response.
GSPO = Algorithm(
    advantage=advantage("group", scale="std"),
    ratio="sequence",
    gate=gate("clip", low=3e-4, high=4e-4),
    aggregate="seq-mean-token-mean",
)
# GRPO, DeepSeekMath, arXiv 2402.03300, equation 3.
GRPO = Algorithm(
    advantage=advantage("group", scale="std"),
    ratio="token",
    gate=gate("clip", low=0.2, high=0.2),
    aggregate="seq-mean-token-mean",
    kl=KL("k3", coef=0.04),
)

PRESETS: dict[str, Algorithm] = {"gspo": GSPO, "grpo": GRPO}


def from_config(config: Any) -> Algorithm:
    """The algorithm of an `rl.algorithm` section: a preset with single axes, or settings of an axis, overridden.

    `config` has the attributes `preset`, `advantage`, `ratio`, `gate`, `aggregate`, `kl`; an axis that is None is the
    preset's, and so is a setting that is None in an axis of the preset's type. `kl` with coefficient 0 means none.
    Raises ValueError with the reason for a composition that means nothing.
    """
    if config.preset not in PRESETS:
        raise ValueError(f"preset {config.preset} is unknown; choose one of: {', '.join(PRESETS)}")
    algorithm = PRESETS[config.preset]
    changes: dict[str, Any] = {name: getattr(config, name) for name in ("ratio", "aggregate")}
    changes["advantage"] = _override("advantage", ESTIMATORS, algorithm.advantage, config.advantage)
    changes["gate"] = _override("gate", GATES, algorithm.gate, config.gate)
    changes = {name: value for name, value in changes.items() if value is not None}
    if config.kl is not None:
        changes["kl"] = KL(config.kl.estimator, coef=config.kl.coef) if config.kl.coef else None
    return dataclasses.replace(algorithm, **changes)


def check(config: Any) -> str | None:
    """Why the `rl.algorithm` section means nothing; None when it is fine."""
    try:
        from_config(config)
    except ValueError as error:
        return str(error)
    return None


def _override(axis: str, registry: Mapping[str, Callable[..., Any]], preset: Choice, section: Any) -> Choice | None:
    if section is None:
        return None
    inherited = dict(preset.settings) if preset.type == section.type else {}
    given = {name: getattr(section, name, None) for name in keyword_settings(axis, registry, section.type)}
    return choose(axis, registry, section.type, **(inherited | {k: v for k, v in given.items() if v is not None}))
