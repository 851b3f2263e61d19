"""How a config section becomes an algorithm, what is refused with which remedy, and how a gate is added."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from megarl.algorithms import (
    KL,
    PRESETS,
    Algorithm,
    Correction,
    ValueLoss,
    advantage,
    check,
    from_config,
    gate,
    group_filter,
    measured,
    shaping,
    warnings,
)
from megarl.algorithms.gate import GATES, Gated
from megarl.algorithms.guards import band_for, refusal
from megarl.algorithms.ratio import Ratio
from megarl.config.schema import Algorithm as Section
from tests.unit.algorithm_steps import CLOSE, make_rollout, take_step


def section(**axes: Any) -> Section:
    return Section.model_validate(axes)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_comes_out_of_the_configuration_as_it_is(name: str) -> None:
    assert from_config(section(preset=name)) == PRESETS[name]
    filled = {"fixed_length": 64} if name == "dr_grpo" else {}
    assert from_config(section(preset=name), budget=64) == dataclasses.replace(PRESETS[name], **filled)
    assert check(section(preset=name)) is None


def test_the_default_is_a_preset() -> None:
    assert from_config(section()) == PRESETS["gspo"]


def test_presets_are_the_rows_of_the_specification_s_table() -> None:
    """Its section (d): advantage, ratio level, gate, aggregation, KL, value model."""
    rows = {
        "ppo": ("gae", "token", "clip", "token-mean", "k1 reward", True),
        "grpo": ("group std", "token", "clip", "seq-mean-token-mean", "k3 loss", False),
        "dr_grpo": ("group none", "token", "clip", "fixed-length", None, False),
        "dapo": ("group std", "token", "clip", "token-mean", None, False),
        "gspo": ("group std", "sequence", "clip", "seq-mean-token-mean", None, False),
        "gspo_token": ("group std", "sequence-token", "clip", "seq-mean-token-mean", None, False),
        "sapo": ("group std", "token", "soft", "seq-mean-token-mean", None, False),
        "cispo": ("group std", "token", "stop-gradient-weight", "token-mean", None, False),
        "gmpo": ("group std", "geometric-mean-of-clipped", "log-clip", "seq-mean", None, False),
        "rloo": ("leave-one-out", "none", "none", "seq-mean-token-sum", "k1 reward", False),
        "reinforce_pp": ("return-to-go", "token", "clip", "token-mean", "k1 reward", False),
        "reinforce_pp_baseline": ("group-mean-then-whiten", "token", "clip", "token-mean", "k2 loss", False),
        "minirl": ("group none", "none", "ratio-mask", "seq-mean-token-sum", None, False),
    }
    got = {}
    for name, a in PRESETS.items():
        scale = dict(a.advantage.settings).get("scale")
        kl = f"{a.kl.estimator} {a.kl.placement}" if a.kl else None
        kind = f"{a.advantage.type} {scale}" if scale else a.advantage.type
        got[name] = (kind, a.ratio, a.gate.type, a.aggregate, kl, a.value is not None)
    assert got == rows
    bounds = {name: dict(a.gate.settings) for name, a in PRESETS.items()}
    assert bounds["dapo"] == {"low": 0.2, "high": 0.28, "dual": None}
    assert bounds["gspo"] == bounds["gspo_token"] == {"low": 3e-4, "high": 4e-4, "dual": None}
    assert bounds["sapo"] == {"tau_pos": 1.0, "tau_neg": 1.05}
    assert bounds["gmpo"] == {"low": 0.4, "high": 0.4}
    assert bounds["minirl"] == {"low": 0.2, "high": 0.27}
    assert bounds["cispo"]["low"] >= 1, "no lower bound"
    assert PRESETS["minirl"].correction.high == 5
    assert PRESETS["dapo"].filter == group_filter("dynamic-sampling")
    assert PRESETS["dapo"].shaping == shaping("soft-overlong")
    needs = {name for name, a in PRESETS.items() if a.needs_reference}
    assert needs == {"ppo", "grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline"}


def test_single_axes_and_single_settings_override_the_preset() -> None:
    gspo, grpo = PRESETS["gspo"], PRESETS["grpo"]
    assert from_config(section(ratio="token")) == dataclasses.replace(gspo, ratio="token")
    wider = from_config(section(gate={"high": 0.01}))
    assert wider == dataclasses.replace(gspo, gate=gate("clip", low=3e-4, high=0.01))
    other = from_config(section(preset="grpo", gate={"type": "soft", "tau_pos": 2.0}))
    assert other.gate == gate("soft", tau_pos=2.0, tau_neg=1.05)
    assert from_config(section(preset="grpo", gate={"type": "none"})).gate == gate("none")
    assert from_config(section(preset="grpo", kl={"coef": 0.5})).kl == KL("k3", 0.5)
    assert from_config(section(preset="grpo", kl={"estimator": "k2"})).kl == KL("k2", 0.04)
    assert from_config(section(kl={"estimator": "k1", "coef": 0.1, "placement": "reward"})).kl == KL(
        "k1", 0.1, "reward"
    )
    assert from_config(section(preset="dr_grpo", fixed_length=99), budget=64).fixed_length == 99
    scaled = from_config(section(preset="grpo", advantage={"scale": "none"}))
    assert scaled.advantage == advantage("group", scale="none")
    assert scaled == dataclasses.replace(grpo, advantage=scaled.advantage)
    assert (
        from_config(section(preset="minirl", correction={"high": 3.0})).correction.level == "token-current-over-rollout"
    )
    fixed = from_config(section(correction={"level": "token", "mode": "mask", "low": 0.5, "high": 5.0}, veto=1e-4))
    assert fixed == dataclasses.replace(gspo, correction=Correction("token", "mask", 0.5, 5.0), veto=1e-4)
    for name, value in (("off_policy_sequence_mask", 0.1), ("drop_truncated", True), ("n_seq", "valid")):
        assert from_config(section(**{name: value})) == dataclasses.replace(gspo, **{name: value})


def test_an_axis_can_be_removed() -> None:
    dapo = from_config(section(preset="dapo", filter={"type": "none"}, shaping={"type": "none"}))
    assert dapo == dataclasses.replace(PRESETS["dapo"], filter=None, shaping=None)
    assert not from_config(section(preset="grpo", kl={"coef": 0})).needs_reference
    assert from_config(section(preset="minirl", correction={"mode": "none"})).correction is None


def test_a_value_model_goes_with_the_advantage_that_needs_it() -> None:
    assert from_config(section(preset="ppo", advantage={"type": "group"})).value is None
    assert from_config(section(preset="ppo", value={"clip": 0.5})).value == ValueLoss(0.5)
    with_values = section(ratio="sequence-token", advantage={"type": "gae"}, value={"clip": 0.3})
    assert from_config(with_values).value == ValueLoss(0.3)
    assert dict(from_config(with_values).advantage.settings) == {"gamma": 1.0, "lam": 0.95, "whiten": True}


@pytest.mark.parametrize("axis", ["advantage", "gate", "kl", "filter", "shaping", "value", "correction"])
@pytest.mark.parametrize("name", PRESETS)
def test_an_empty_section_is_the_preset_s(name: str, axis: str) -> None:
    assert from_config(section(preset=name, **{axis: {}})) == PRESETS[name]


REFUSED = [
    # names that are not registered: the message lists those that are
    ({"preset": "ppo2"}, f"preset ppo2 is unknown; choose one of: {', '.join(PRESETS)}"),
    (
        {"ratio": "word"},
        "ratio word is unknown; choose one of: none, token, sequence, sequence-token, sequence-product",
    ),
    ({"gate": {"type": "bounce"}}, "gate bounce is unknown; choose one of: none, clip, soft, stop-gradient-weight"),
    ({"aggregate": "mean"}, "aggregate mean is unknown; choose one of: token-mean, seq-mean-token-mean, seq-mean"),
    ({"advantage": {"type": "mean"}}, "advantage mean is unknown; choose one of: group, leave-one-out, group-mean-th"),
    ({"advantage": {"type": "none"}}, "advantage none is unknown; choose one of: group"),
    ({"filter": {"type": "easy"}}, "filter easy is unknown; choose one of: dynamic-sampling"),
    ({"shaping": {"type": "short"}}, "shaping short is unknown; choose one of: soft-overlong"),
    ({"filter": {"rounds": 3}}, "filter.type is missing; choose one of: dynamic-sampling"),
    (
        {"correction": {"level": "word"}},
        "correction level word is unknown; choose one of: token, sequence-product, seq",
    ),
    (
        {"correction": {"mode": "fold"}},
        "correction mode fold is unknown; choose one of: truncate, clip, mask, filter-t",
    ),
    ({"kl": {"estimator": "k9"}}, "kl estimator k9 is unknown; choose one of: k1, k2, k3, k3+, k3-is"),
    ({"kl": {"placement": "gradient"}}, "kl placement gradient is unknown; choose one of: loss, reward"),
    ({"ratio_base": "ref"}, "ratio_base ref is unknown; choose one of: old, rollout"),
    ({"n_seq": "most"}, "n_seq most is unknown; choose one of: all, valid"),
    ({"advantage": {"scale": "iqr"}}, "advantage group scale 'iqr' is unknown; choose one of: std, none, batch"),
    ({"advantage": {"singleton": "skip"}}, "advantage group singleton 'skip' is unknown; choose one of: zero, raw"),
    # settings that the choice does not have, lacks, or of another kind
    ({"gate": {"tau_pos": 1.0}}, "gate clip has no setting tau_pos; it has: low, high, dual"),
    ({"gate": {"hihg": 1.0}}, "gate clip has no setting hihg; it has: low, high, dual"),
    ({"gate": {"type": "none", "low": 1.0}}, "gate none has no setting low; it has: none"),
    ({"preset": "sapo", "gate": {"low": 0.2}}, "gate soft has no setting low; it has: tau_pos, tau_neg"),
    ({"preset": "sapo", "gate": {"type": "clip", "low": 0.2}}, "gate clip needs a value for high"),
    ({"gate": {"high": "wide"}}, "gate clip high 'wide' is not a number"),
    ({"gate": {"high": True}}, "gate clip high True is not a number"),
    ({"gate": {"high": math.nan}}, "gate clip high nan is not a number"),
    ({"gate": {"dual": [3]}}, "gate clip dual [3] is not a number"),
    ({"advantage": {"ddof": 0.5}}, "advantage group ddof 0.5 is not a whole number"),
    ({"preset": "ppo", "advantage": {"whiten": 1}}, "advantage gae whiten 1 is neither true nor false"),
    ({"gate": {"low": -0.1}}, "gate clip low -0.1 is negative: set 0 or more"),
    ({"gate": {"dual": 0.9}}, "gate dual 0.9 would clip every negative advantage: set it above 1"),
    ({"preset": "sapo", "gate": {"tau_neg": 0}}, "gate soft tau_neg 0 divides the objective: set it above 0"),
    ({"correction": {"low": 2.0, "high": 1.0}}, "correction low 2.0, high 1.0 keep nothing; set 0 <= low < high"),
    # compositions that mean nothing
    ({"advantage": {"type": "gae"}, "ratio": "token"}, "gae needs a value model and value is none: set value.clip"),
    ({"value": {"clip": 0.2}}, "value trains a critic that advantage group ignores: set advantage to gae, or value to"),
    (
        {"kl": {"estimator": "k1", "coef": 0.1}},
        "kl k1 in the loss has no gradient in expectation: set kl.placement to r",
    ),
    ({"kl": {"estimator": "k3-is", "placement": "reward"}}, "set kl.estimator to k1 or k3"),
    ({"ratio": "none"}, "gate clip bounds a ratio and ratio is none: set ratio to token or sequence, or gate to none"),
    ({"preset": "sapo", "ratio": "none"}, "gate soft bounds a ratio"),
    ({"preset": "gmpo", "gate": {"type": "none"}}, "set gate to log-clip, or ratio to sequence"),
    ({"preset": "ppo", "ratio": "sequence"}, "advantage gae varies over its tokens: set ratio to sequence-token"),
    ({"preset": "ppo", "ratio": "sequence-product"}, "varies over its tokens: set ratio to sequence-token"),
    ({"preset": "gmpo", "advantage": {"type": "token-reward"}}, "set ratio to sequence-token"),
    ({"advantage": {"type": "return-to-go", "gamma": 0.9}}, "return-to-go varies over its tokens"),
    ({"preset": "reinforce_pp", "ratio": "sequence"}, "return-to-go varies over its tokens"),
    (
        {"ratio_base": "rollout", "correction": {"level": "token"}},
        "unset correction and veto, or set ratio_base to old",
    ),
    ({"ratio_base": "rollout", "veto": 1e-4}, "unset correction and veto, or set ratio_base to old"),
    ({"preset": "minirl", "ratio_base": "rollout"}, "unset correction and veto, or set ratio_base to old"),
    ({"preset": "minirl", "correction": {"renormalise": True}}, "cannot renormalise; set it false"),
]


@pytest.mark.parametrize(("axes", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_what_is_refused_comes_with_the_reason_and_a_remedy(axes: dict[str, Any], reason: str) -> None:
    message = check(section(**axes))
    assert message is not None and reason in message and "\n" not in message


@pytest.mark.parametrize(
    "axes",
    [
        {"preset": "ppo", "ratio": "sequence-token"},
        {"advantage": {"type": "return-to-go"}},  # one reward at the end and gamma 1: the same on every token
        {"preset": "rloo", "ratio": "sequence-product", "gate": {"type": "clip", "low": 0.2, "high": 0.2}},
        {"preset": "gmpo", "ratio": "sequence"},
        {"gate": {"high": math.inf}},
        {"ratio_base": "rollout", "off_policy_sequence_mask": 0.1},
        {"correction": {"level": "sequence-mean", "mode": "filter-then-token-weight", "low": 0.9, "high": 1.1}, "veto": 1e-4},
        {"kl": {"estimator": "k3+", "coef": 0.1, "input_clamp": 5.0}},
    ],
    ids=str,
)  # fmt: skip
def test_what_means_something_is_accepted(axes: dict[str, Any]) -> None:
    assert check(section(**axes)) is None


def test_what_an_algorithm_needs_from_the_learner() -> None:
    before = {"level": "token", "mode": "truncate"}
    assert from_config(section(correction=before)).needs_old_log_probs
    assert from_config(section(veto=1e-4)).needs_old_log_probs
    assert PRESETS["ppo"].needs_old_log_probs, "its penalty is part of the reward"
    for name in ("gspo", "grpo", "minirl", "dapo"):
        assert not PRESETS[name].needs_old_log_probs


@pytest.fixture
def bounce() -> Iterator[None]:
    """A gate as a user would add it: one function and one line."""

    def bounce(ratio: Ratio, advantages: Tensor, *, height: float, damping: float = 0.5) -> Gated:
        over = ratio.detached > height
        return Gated(advantages * ratio.value * torch.where(over, damping, 1.0), {"clip_frac": over})

    GATES["bounce"] = bounce
    yield
    del GATES["bounce"]


@pytest.mark.usefixtures("bounce")
def test_a_gate_is_one_function_and_one_line() -> None:
    made = from_config(section(preset="grpo", kl={"coef": 0}, gate={"type": "bounce", "height": 1.1}))
    assert made.gate == gate("bounce", height=1.1, damping=0.5)
    assert repr(made.gate) == "bounce(height=1.1, damping=0.5)"
    assert check(section(gate={"type": "bounce"})) == "gate bounce needs a value for height"
    assert "it has: height, damping" in check(section(gate={"type": "bounce", "low": 1}))
    assert "height 'x' is not a number" in check(section(gate={"type": "bounce", "height": "x"}))
    assert "ratio-mask, bounce" in check(section(gate={"type": "none of them"}))
    r = make_rollout(4)
    step = take_step(made, r)
    unbounded = take_step(dataclasses.replace(made, gate=gate("none")), r)
    over = ((r.log_probs - r.old_log_probs).exp() > 1.1) & (r.mask > 0)
    assert over.any()
    torch.testing.assert_close(step.gradient, unbounded.gradient * torch.where(over, 0.5, 1.0), **CLOSE)
    assert step.metrics["policy/clip_frac"].value() == pytest.approx(over.sum().item() / r.mask.sum().item())


def composed(ratio: str, kind: str, **settings: Any) -> Algorithm:
    return Algorithm(advantage("group"), ratio, gate(kind, **settings), "token-mean")


def test_warnings_name_bounds_from_another_algorithm_s_world() -> None:
    gspo, about_30 = PRESETS["gspo"], f"{band_for(30):.1e}"
    assert band_for(2000) == 3.5e-4 and about_30 == "2.9e-03"
    (line,) = warnings(composed("sequence", "clip", low=0.2, high=0.2), 4, budget=30)
    assert "gate.high = 0.2: a sequence ratio" in line and f"set about {about_30}" in line
    (line,) = warnings(gspo, 4, budget=30)
    assert "gate.high = 0.0004: published for responses of thousands of tokens" in line and about_30 in line
    (line,) = warnings(composed("token", "clip", low=3e-4, high=4e-4), 4, budget=30)
    assert "gate.high = 0.0004: a token ratio leaves it" in line and "set about 0.2" in line
    (line,) = warnings(PRESETS["grpo"], 1, budget=30)
    assert "rl.optimizer_steps_per_rollout = 1" in line and "gate clip never acts" in line
    assert len(warnings(composed("sequence-token", "log-clip", low=0.2, high=0.4), 1, budget=30)) == 2


def test_no_warning_where_there_is_nothing_to_say() -> None:
    assert warnings(PRESETS["gspo"], 4, budget=2000) == []
    assert warnings(composed("sequence", "clip", low=3e-3, high=3e-3), 2, budget=30) == []
    assert warnings(PRESETS["rloo"], 1, budget=30) == []
    assert warnings(dataclasses.replace(PRESETS["grpo"], ratio_base="rollout"), 1, budget=30) == []
    for name in PRESETS.keys() - {"gspo", "gspo_token"}:
        assert warnings(PRESETS[name], 4, budget=30) == []


def test_a_gate_that_closes_for_most_sequences_is_reported_once_it_was_measured() -> None:
    seen = {"policy/clip_seq_frac": 0.75, "response/length_mean": 30.0}
    line = measured(PRESETS["gspo"], seen)
    assert "policy/clip_seq_frac = 0.75" in line and "rl.algorithm.gate.high to about 2.9e-03" in line
    assert measured(PRESETS["gspo"], seen | {"policy/clip_seq_frac": 0.5}) is None
    assert measured(PRESETS["grpo"], seen) is None
    assert measured(PRESETS["gspo"], {}) is None


def test_one_sample_a_prompt_is_nothing_to_compare() -> None:
    assert "rl.samples_per_prompt = 1: advantage group" in refusal(PRESETS["gspo"], 1)
    assert "set at least 2" in refusal(PRESETS["rloo"], 1)
    assert refusal(PRESETS["gspo"], 2) is None
    assert refusal(PRESETS["ppo"], 1) is refusal(PRESETS["reinforce_pp"], 1) is None
    filtered = dataclasses.replace(PRESETS["ppo"], filter=group_filter("dynamic-sampling"))
    assert "filter dynamic-sampling compares" in refusal(filtered, 1)
