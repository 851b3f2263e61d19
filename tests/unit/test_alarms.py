"""Thresholds: what is an alarm, what it does, and that a resumed run decides as one that was not stopped."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megarl.config import load_config
from megarl.config.schema import Alarm
from megarl.config.schema import Alarms as Settings
from megarl.errors import BadInput, RunFailed
from megarl.trainers.alarms import Alarms

WINDOW = 4
QUICKSTART = Path(__file__).resolve().parents[2] / "configs/cpu/quickstart.yaml"
NORMS = st.lists(st.floats(0.1, 100), min_size=1, max_size=12)


def settings(**alarms: Alarm) -> Settings:
    none = {name: Alarm() for name in ("grad_norm", "loss", "length", "gap", "kl", "entropy_loss", "held_out_loss")}
    return Settings(window=WINDOW, **none | alarms)


def test_a_figure_that_is_no_number_is_an_alarm() -> None:
    alarms = Alarms(settings(gap=Alarm(above=1.0, action="stop")))
    assert alarms._above("gap", math.nan) and alarms._above("gap", 1.1) and not alarms._above("gap", 1.0)


@given(NORMS)
def test_a_spike_is_more_than_so_many_times_the_median_of_the_steps_before(norms: list[float]) -> None:
    alarms = Alarms(settings(grad_norm=Alarm(above=2.0, action="stop")))
    for step, norm in enumerate(norms):
        limit = alarms.most("sft/loss", "sft/grad_norm_max")
        found = alarms.observe(step + 1, {"sft/grad_norm_max": norm})
        if step < WINDOW:
            assert limit == {} and "alarms/grad_norm" not in found
            continue
        known = sorted(norms[step - WINDOW : step])
        expected = known[1] + known[2]  # twice the median of four
        assert math.isclose(limit["grad_norm"], expected)
        if not math.isclose(norm, expected):
            assert found["alarms/grad_norm"] == (norm > expected) == (alarms.ended_by is not None)


@given(NORMS, st.integers(0, 12))
def test_a_resumed_run_decides_alike(norms: list[float], stop: int) -> None:
    def rows(stopped_after: int | None) -> list[dict[str, float]]:
        alarms, out = Alarms(settings(grad_norm=Alarm(above=1.5), kl=Alarm(above=50.0))), []
        for step, norm in enumerate(norms):
            if step == stopped_after:
                state = json.loads(json.dumps(alarms.state_dict()))
                alarms = Alarms(alarms.settings)
                alarms.load_state_dict(state)
            if norm > 90:
                alarms.skip(step, "too much.")
            out.append(alarms.observe(step, {"policy/grad_norm_max": norm, "policy/kl_ref": norm, "reward/mean": norm}))
        return out

    assert rows(None) == rows(stop)


def test_skips_are_counted_and_one_too_many_ends_the_run() -> None:
    said: list[str] = []
    alarms = Alarms(Settings(on_nonfinite="skip", max_skips=2), said.append)
    alarms.refused(1, "nonfinite", "first.")
    alarms.refused(1, "nonfinite", "second.")
    assert alarms.observe(1, {})["alarms/skipped_updates"] == 2
    assert alarms.observe(2, {})["alarms/skipped_updates"] == 0
    alarms.refused(101, "nonfinite", "those of step 1 no longer count.")
    alarms.refused(102, "nonfinite", "fourth.")
    with pytest.raises(RunFailed, match=r"^fifth. It is skip 3 in 100 steps, more than alarms.max_skips=2$"):
        alarms.refused(103, "nonfinite", "fifth.")
    assert said[0] == "step 1 skipped: first." and len(said) == 4
    with pytest.raises(RunFailed, match=r"^first.$"):
        Alarms(Settings()).refused(1, "nonfinite", "first.")


def test_updates_are_left_out_for_what_is_known_before_them() -> None:
    alarms = Alarms(settings(length=Alarm(above=2.0, action="skip"), gap=Alarm(above=0.5)))
    assert alarms.asks_before_update and not Alarms(Settings()).asks_before_update
    for step in range(1, WINDOW + 1):
        assert not alarms.skips_update(step, {"response/length_mean": 10.0, "gap/logprob_mean": 9.0})
        alarms.observe(step, {"response/length_mean": 10.0})
    assert not alarms.skips_update(5, {"response/length_mean": 20.0})
    assert alarms.skips_update(5, {"response/length_mean": 20.1}) and alarms.skips == [5]


def test_entropy_is_compared_with_the_start_and_held_out_accuracy_with_the_last_evaluation() -> None:
    said: list[str] = []
    alarms = Alarms(settings(entropy_loss=Alarm(above=0.9), held_out_loss=Alarm(above=0.1)), said.append)
    start = [2.0, 1.0, 1.5, 3.0]
    for step, entropy in enumerate(start):
        alarms.observe(step, {"policy/entropy": entropy})
    edge = 0.1 * median(start)
    assert alarms.observe(5, {"policy/entropy": edge * 1.01})["alarms/entropy_loss"] == 0
    assert alarms.observe(6, {"policy/entropy": edge * 0.99})["alarms/entropy_loss"] == 1
    assert alarms.observe(7, {"policy/entropy": 0.0})["alarms/entropy_loss"] == 1
    assert len(said) == 1  # said when it begins

    def evaluated(accuracy: float, reward: float) -> float | None:
        alarms.observe(8, {"reward/mean": reward})
        return alarms.observe(9, {"reward/mean": reward, "eval/accuracy": accuracy}).get("alarms/held_out_loss")

    assert evaluated(0.7, reward=0.5) is None
    assert evaluated(0.5, reward=0.4) == 0  # both fell
    assert evaluated(0.45, reward=0.6) == 0  # not by so much
    assert evaluated(0.3, reward=0.8) == 1


@pytest.mark.parametrize("name", ["kl", "entropy_loss", "held_out_loss"])
def test_what_is_known_after_the_update_cannot_be_skipped(name: str) -> None:
    with pytest.raises(BadInput, match=f"alarms.{name}.action = skip: it is known after the update; set warn or stop"):
        load_config(QUICKSTART, [f"alarms.{name}.action=skip"])
