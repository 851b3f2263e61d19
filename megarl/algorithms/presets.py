"""An algorithm is a value: one choice on each axis. The presets are the published ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megarl.algorithms.advantage import ESTIMATORS, NEED_VALUES, Estimate, Outcomes
from megarl.algorithms.aggregate import AGGREGATIONS, Counts, token_weights
from megarl.algorithms.axis import Choice, choose
from megarl.algorithms.correction import Correction
from megarl.algorithms.filters import FILTERS, SHAPINGS
from megarl.algorithms.gate import GATES
from megarl.algorithms.ratio import LEVELS
from megarl.algorithms.regularize import KL
from megarl.algorithms.value import ValueLoss

RATIO_BASES = ("old", "rollout")
SEQUENCE_LEVELS = ("sequence", "sequence-product", "geometric-mean-of-clipped")  # need one advantage per sequence
NEED_A_RATIO = ("clip", "soft", "stop-gradient-weight", "log-clip")


def advantage(type: str, **settings: Any) -> Choice:
    """A registered advantage estimator with its settings."""
    return choose("advantage", ESTIMATORS, type, **settings)


def gate(type: str, **settings: Any) -> Choice:
    """A registered gate with its settings."""
    return choose("gate", GATES, type, **settings)


def group_filter(type: str, **settings: Any) -> Choice:
    """A registered filter of prompt groups with its settings."""
    return choose("filter", FILTERS, type, **settings)


def shaping(type: str, **settings: Any) -> Choice:
    """A registered reward shaping with its settings."""
    return choose("shaping", SHAPINGS, type, **settings)


@dataclass(frozen=True)
class Algorithm:
    """One choice per axis. Raises ValueError, with the reason, for a composition that means nothing."""

    advantage: Choice
    ratio: str
    gate: Choice
    aggregate: str
    kl: KL | None = None  # None: no reference model is needed
    filter: Choice | None = None  # which groups are trained on; None: all
    shaping: Choice | None = None  # added to the verifier's score
    drop_truncated: bool = False  # overlong filtering: responses cut at the budget are not trained on
    value: ValueLoss | None = None  # the critic's loss; None: no value model
    correction: Correction | None = None  # for the gap between rollout engine and learner
    veto: float | None = None  # drop sequences with a token of old / rollout below this
    off_policy_sequence_mask: float | None = None  # drop A < 0 sequences that moved away by more than this (OPSM)
    ratio_base: str = "old"  # "rollout": the ratio is taken to the engine's log-probs (bypass)
    n_seq: str = "all"  # whether empty sequences count in denominators: "all" or "valid"
    fixed_length: int | None = None  # the generation budget, for aggregate fixed-length

    def __post_init__(self) -> None:
        reason = _meaningless(self)
        if reason:
            raise ValueError(reason)

    @property
    def needs_reference(self) -> bool:
        return self.kl is not None

    @property
    def needs_old_log_probs(self) -> bool:
        """Whether the learner's log-probs before the first update are used beyond the ratio of later updates."""
        in_reward = self.kl is not None and self.kl.placement == "reward"
        before = self.correction is not None and self.correction.level in ("token", "sequence-product", "sequence-mean")
        return in_reward or before or self.veto is not None

    @property
    def token_varying(self) -> bool:
        """Whether tokens of one sequence can have different advantages."""
        settings = dict(self.advantage.settings)
        if self.advantage.type == "return-to-go":
            return settings["gamma"] != 1 or (self.kl is not None and self.kl.placement == "reward")
        return self.advantage.type in ("gae", "token-reward")

    def advantages(self, outcomes: Outcomes) -> Estimate:
        """Advantages and returns of a whole rollout batch; groups must be whole."""
        return self.advantage(outcomes)

    def token_weights(self, mask: Tensor, sequence_ids: Tensor, counts: Counts) -> Tensor:
        """`[n]`: mask x aggregation / global denominator, see `aggregate.token_weights`."""
        return token_weights(
            self.aggregate, mask, sequence_ids, counts, n_seq=self.n_seq, fixed_length=self.fixed_length
        )


def _meaningless(a: Algorithm) -> str | None:
    for axis, value, known in (
        ("ratio", a.ratio, LEVELS),
        ("aggregate", a.aggregate, AGGREGATIONS),
        ("ratio_base", a.ratio_base, RATIO_BASES),
        ("n_seq", a.n_seq, ("all", "valid")),
    ):
        if value not in known:
            return f"{axis} {value} is unknown; choose one of: {', '.join(known)}"
    settings = dict(a.gate.settings)
    if a.gate.type in NEED_A_RATIO and a.ratio == "none":
        return f"gate {a.gate.type} bounds a ratio and ratio is none: set ratio to token or sequence, or gate to none"
    if (a.ratio == "geometric-mean-of-clipped") and a.gate.type != "log-clip":
        return f"ratio {a.ratio} is a mean of what gate log-clip clipped: set gate to log-clip, or ratio to sequence"
    if settings.get("dual") is not None and settings["dual"] <= 1:
        return f"gate dual {settings['dual']} would clip every negative advantage: set it above 1"
    for name in ("low", "high"):
        if settings.get(name) is not None and settings[name] < 0:
            return f"gate {a.gate.type} {name} {settings[name]} is negative: set 0 or more"
    for name in ("tau_pos", "tau_neg"):
        if settings.get(name) is not None and settings[name] <= 0:
            return f"gate {a.gate.type} {name} {settings[name]} divides the objective: set it above 0"
    if a.ratio in SEQUENCE_LEVELS and a.token_varying:
        return (
            f"ratio {a.ratio} has one value per sequence and advantage {a.advantage.type} varies over its tokens: "
            "set ratio to sequence-token"
        )
    return _meaningless_beside(a)


def _meaningless_beside(a: Algorithm) -> str | None:
    needs_values = a.advantage.type in NEED_VALUES
    if needs_values and a.value is None:
        return f"advantage {a.advantage.type} needs a value model and value is none: set value.clip, or preset ppo"
    if a.value is not None and not needs_values:
        return (
            f"value trains a critic that advantage {a.advantage.type} ignores: set advantage to gae, or value to none"
        )
    if a.kl is not None and a.kl.estimator == "k3-is" and a.kl.placement == "reward":
        return "kl k3-is weights with the policy now, which a reward does not have: set kl.estimator to k1 or k3"
    if a.aggregate == "fixed-length" and a.fixed_length is not None and a.fixed_length <= 0:
        return f"fixed_length {a.fixed_length} is not a number of tokens: set the generation budget"
    if a.ratio_base == "rollout" and (a.correction is not None or a.veto is not None):
        return (
            "ratio_base rollout corrects the engine's gap already: unset correction and veto, or set ratio_base to old"
        )
    if a.veto is not None and not 0 < a.veto < 1:
        return f"veto {a.veto} must be between 0 and 1: set for example 1e-4"
    return None


# PPO, arXiv 1707.06347, on tokens as in InstructGPT, arXiv 2203.02155; the KL coefficient is verl's default.
PPO = Algorithm(
    advantage=advantage("gae", gamma=1.0, lam=0.95),
    ratio="token",
    gate=gate("clip", low=0.2, high=0.2),
    aggregate="token-mean",
    kl=KL("k1", coef=0.001, placement="reward"),
    value=ValueLoss(clip=0.2),
)
# GRPO, DeepSeekMath, arXiv 2402.03300, equation 3.
GRPO = Algorithm(
    advantage=advantage("group", scale="std"),
    ratio="token",
    gate=gate("clip", low=0.2, high=0.2),
    aggregate="seq-mean-token-mean",
    kl=KL("k3", coef=0.04),
)
# Dr. GRPO, arXiv 2503.20783. `fixed_length` is the run's response budget.
DR_GRPO = Algorithm(
    advantage=advantage("group", scale="none"),
    ratio="token",
    gate=gate("clip", low=0.2, high=0.2),
    aggregate="fixed-length",
)
# DAPO, arXiv 2503.14476, section 3. Overlong filtering is its alternative to soft punishment: `drop_truncated`.
DAPO = Algorithm(
    advantage=advantage("group", scale="std"),
    ratio="token",
    gate=gate("clip", low=0.2, high=0.28),
    aggregate="token-mean",
    filter=group_filter("dynamic-sampling"),
    shaping=shaping("soft-overlong"),
)
# GSPO, arXiv 2507.18071, section 5.1. Its bounds suit responses of thousands of tokens: scale them by
# sqrt(2000 / length) for shorter ones, since log s_i is a mean over a response.
GSPO = Algorithm(
    advantage=advantage("group", scale="std"),
    ratio="sequence",
    gate=gate("clip", low=3e-4, high=4e-4),
    aggregate="seq-mean-token-mean",
)
# GSPO-token, arXiv 2507.18071, equation 13: the same while advantages are constant over a sequence.
GSPO_TOKEN = dataclasses.replace(GSPO, ratio="sequence-token")
# SAPO, arXiv 2511.20347, equation 5.
SAPO = Algorithm(
    advantage=advantage("group", scale="std"),
    ratio="token",
    gate=gate("soft", tau_pos=1.0, tau_neg=1.05),
    aggregate="seq-mean-token-mean",
)
# CISPO, MiniMax-M1, arXiv 2506.13585, without a lower bound; the cap of 5 is ScaleRL's, arXiv 2510.13786.
CISPO = Algorithm(
    advantage=advantage("group", scale="std"),
    ratio="token",
    gate=gate("stop-gradient-weight", low=1.0, high=4.0),
    aggregate="token-mean",
)
# GMPO, arXiv 2507.20673.
GMPO = Algorithm(
    advantage=advantage("group", scale="std"),
    ratio="geometric-mean-of-clipped",
    gate=gate("log-clip", low=0.4, high=0.4),
    aggregate="seq-mean",
)
# RLOO, arXiv 2402.14740; the KL coefficient is TRL's default.
RLOO = Algorithm(
    advantage=advantage("leave-one-out"),
    ratio="none",
    gate=gate("none"),
    aggregate="seq-mean-token-sum",
    kl=KL("k1", coef=0.05, placement="reward"),
)
# REINFORCE++, arXiv 2501.03262.
REINFORCE_PP = Algorithm(
    advantage=advantage("return-to-go", gamma=1.0),
    ratio="token",
    gate=gate("clip", low=0.2, high=0.2),
    aggregate="token-mean",
    kl=KL("k1", coef=0.01, placement="reward"),
)
# REINFORCE++-baseline, arXiv 2501.03262.
REINFORCE_PP_BASELINE = Algorithm(
    advantage=advantage("group-mean-then-whiten"),
    ratio="token",
    gate=gate("clip", low=0.2, high=0.2),
    aggregate="token-mean",
    kl=KL("k2", coef=0.01),
)
# MiniRL, arXiv 2512.01374.
MINIRL = Algorithm(
    advantage=advantage("group", scale="none"),
    ratio="none",
    gate=gate("ratio-mask", low=0.2, high=0.27),
    aggregate="seq-mean-token-sum",
    correction=Correction("token-current-over-rollout", "truncate", high=5.0),
)

PRESETS: dict[str, Algorithm] = {
    "ppo": PPO,
    "grpo": GRPO,
    "dr_grpo": DR_GRPO,
    "dapo": DAPO,
    "gspo": GSPO,
    "gspo_token": GSPO_TOKEN,
    "sapo": SAPO,
    "cispo": CISPO,
    "gmpo": GMPO,
    "rloo": RLOO,
    "reinforce_pp": REINFORCE_PP,
    "reinforce_pp_baseline": REINFORCE_PP_BASELINE,
    "minirl": MINIRL,
}
CHOICES: dict[str, Mapping] = {"advantage": ESTIMATORS, "gate": GATES, "filter": FILTERS, "shaping": SHAPINGS}
OPTIONAL = ("filter", "shaping")
RECORDS = {"kl": KL, "correction": Correction, "value": ValueLoss}


def from_config(config: Any, budget: int | None = None) -> Algorithm:
    """The algorithm of an `rl.algorithm` section: a preset with single axes, or settings of an axis, overridden.

    `config` has the attribute `preset` and one per axis. An axis that is None or empty is the preset's, and so is a
    setting that is not given in an axis of the preset's type. `type` (`mode` of a correction) `none` removes an axis,
    and so does a KL coefficient of 0; a value model goes when the advantage that needs it does. `budget`: the longest
    response, which stands in for an unset `fixed_length`.
    Raises ValueError with the reason for a composition that means nothing.
    """
    if config.preset not in PRESETS:
        raise ValueError(f"preset {config.preset} is unknown; choose one of: {', '.join(PRESETS)}")
    preset = PRESETS[config.preset]
    given = {f.name: getattr(config, f.name) for f in dataclasses.fields(Algorithm)}
    given = {name: value for name, value in given.items() if value is not None and value != ""}
    changes = {name: _override(name, getattr(preset, name), value) for name, value in given.items()}
    if changes.get("advantage", preset.advantage).type not in NEED_VALUES:
        changes.setdefault("value", None)
    if changes.get("aggregate", preset.aggregate) == "fixed-length":
        changes.setdefault("fixed_length", budget)
    elif "fixed_length" in changes:
        raise ValueError(f"fixed_length {changes['fixed_length']} is for aggregate fixed-length alone: unset it")
    algorithm = dataclasses.replace(preset, **changes)
    kl = algorithm.kl
    if kl is not None and kl.estimator == "k1" and kl.placement == "loss":  # defined, and of no use
        raise ValueError(
            "kl k1 in the loss has no gradient in expectation: set kl.placement to reward, or estimator to k3"
        )
    return algorithm


def check(config: Any) -> str | None:
    """Why the `rl.algorithm` section means nothing; None when it is fine."""
    try:
        from_config(config)
    except ValueError as error:
        return str(error)
    return None


def _override(axis: str, preset: Any, given: Any) -> Any:
    """The value of one axis: the given settings over those of the preset, if it is of the same kind there."""
    if axis not in CHOICES and axis not in RECORDS:
        return given
    settings = {k: v for k, v in given.model_dump(exclude_unset=True).items() if v is not None and v != ""}
    if not settings:
        return preset
    if axis in RECORDS:
        if settings.get("coef") == 0 or settings.get("mode") == "none":
            return None
        inherited = dataclasses.asdict(preset) if preset is not None else {}
        return RECORDS[axis](**(inherited | settings))
    kind = settings.pop("type", None) or (preset.type if preset is not None else None)
    if kind is None:
        raise ValueError(f"{axis}.type is missing; choose one of: {', '.join(CHOICES[axis])}")
    if kind == "none" and axis in OPTIONAL:
        return None
    inherited = dict(preset.settings) if preset is not None and preset.type == kind else {}
    return choose(axis, CHOICES[axis], kind, **(inherited | settings))
