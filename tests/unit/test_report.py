"""The report shows what a run wrote, whole or in pieces, loads nothing and trusts no text; and the live display."""

from __future__ import annotations

import html
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megarl.errors import BadInput
from megarl.metrics import Max, Mean
from megarl.report import render_summary, write_report
from megarl.report.bars import Bars, render_bars
from megarl.report.charts import MOST_POINTS, Chart, Series, render, show
from megarl.report.data import figures, load_run
from megarl.report.heat_map import MOST_COLUMNS, HeatMap, render_heat_map
from megarl.report.panels import _wilson
from megarl.report.summary import write_summary
from megarl.trainers.display import Display, Phases, duration, task

HOSTILE = '</pre><script>alert("x")</script><img src=x onerror=y> & done'


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rl_row(step: int) -> dict:
    return {
        "step": step,
        "reward/score": step / 10,
        "reward/mean": step / 10,
        "policy/clip_frac": 0.2,
        "gap/logprob_mean": 4e-7,
        "gap/logprob_max": step * 1e-6,
        "time/generate": 2.0,
        "time/update": 1.0,
        "time/step": 3.0 + step / 100,
        "memory/rss_gib": 4.0 + step / 10,
        "policy/kl_ref": None,
    }


def routing_row(step: int, layers: int = 48) -> dict:
    row = {"step": step, "routing/update_changed": 0.03, "routing/engine_changed": 0.01, "routing/update_pair": 0.1}
    row |= {"routing/noise_changed": 0.002} if step == 1 else {}
    for layer in range(layers):
        row[f"routing/update_changed/layer_{layer:02}"] = layer / 1000
        row[f"routing/load_max_over_mean/layer_{layer:02}"] = 1.0 + layer + step / 10
    return row


def trajectory(score: float, text: str) -> dict:
    return {"prompt": "2 + 2 =", "response": text, "answer": "4", "score": score, "response_ids": [1, 2]}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    write_jsonl(run / "sft" / "metrics.jsonl", [{"step": s, "sft/loss": 3.0 / s} for s in range(1, 9)])
    preferred = [{"step": s, "reward_model/loss": 0.7 / s, "reward_model/accuracy": 0.9} for s in range(1, 4)]
    write_jsonl(run / "reward_model" / "metrics.jsonl", preferred)
    write_jsonl(run / "rl" / "metrics.jsonl", [rl_row(s) for s in range(1, 6)])
    evals = [{"step": 0, "accuracy": 0.25, "problems": 400}, {"step": 5, "accuracy": 0.5, "problems": 400}]
    write_jsonl(run / "rl" / "eval.jsonl", evals)
    for step in (1, 3, 5):
        rows = [trajectory(1.0, f"right at {step}"), trajectory(0.0, f"wrong at {step} {HOSTILE}")]
        write_jsonl(run / "rl" / "rollouts" / f"step_{step:06}.jsonl", rows)
    (run / "config.yaml").write_text("model: {path: models/tiny}\nrl: {steps: 5, algorithm: {preset: gspo}}\n")
    (run / "summary.json").write_text('{"sft_accuracy": 0.25, "rl_accuracy": 0.5, "steps": 5, "wall_seconds": 61}')
    return run


class Page(HTMLParser):
    """Tags with their attributes, the text, and the data of every chart."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)
        self.charts = [json.loads(a["data-chart"]) for tag, a in self.tags if "data-chart" in a]

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def report(run: Path) -> Page:
    return Page(write_report(run).read_text())


def test_every_value_of_the_run_is_in_its_chart(run_dir):
    page = report(run_dir)
    shown = {s["name"]: [(p[0], p[3]) for p in s["points"]] for chart in page.charts for s in chart["series"]}
    assert shown["accuracy"] == [(0, "25.0%"), (5, "50.0%")]
    assert shown["score"] == [(1, "0.1"), (2, "0.2"), (3, "0.3"), (4, "0.4"), (5, "0.5")]
    assert shown["training"][:2] == [(1, "3"), (2, "1.5")]
    assert shown["training pairs"] == [(1, "90.0%"), (2, "90.0%"), (3, "90.0%")]
    assert [name for name in shown if name in ("generate", "update")] == ["generate", "update"], "largest phase first"
    assert "shaped reward" not in shown, "it equals the score"
    assert "KL" not in shown, "a series without a number is left out"
    assert "+25.0 points" in page.text
    assert "1 min 01 s" in page.text


def test_routing_is_shown_by_layer_and_step(tmp_path):
    write_jsonl(tmp_path / "rl" / "metrics.jsonl", [routing_row(s) for s in range(1, 1001)])
    page = report(tmp_path)
    assert "Routing" in page.text and "noise floor" in page.text
    shown = {s["name"]: s["points"] for chart in page.charts for s in chart["series"]}
    assert shown["engine against learner"][0][3] == "1.0%"
    assert (shown["worst layer"][0][3], shown["mean of the layers"][0][3]) == ("48.1", "24.6")
    maps = [json.loads(a["data-heat"]) for _, a in page.tags if "data-heat" in a]
    assert len(maps) == 2, "the engine's layers were not measured"
    assert maps[0]["rows"] == [str(layer) for layer in range(48)]
    assert len(maps[0]["columns"]) <= MOST_COLUMNS and maps[0]["columns"][0] == "1 to 9"
    assert maps[0]["values"][10] == ["1.0%"] * len(maps[0]["columns"])
    assert figures(load_run(tmp_path))["experts_changed_update"] == pytest.approx(0.03)
    assert "Experts changed by a step's update        3.0%" in render_summary(tmp_path)


def test_a_heat_map_leaves_out_what_was_not_measured():
    drawn = render_heat_map(HeatMap("m", "", [("0", [(1, 0.0), (2, 1.0)]), ("1", [(2, 0.5)])]))
    (attributes,) = [a for tag, a in Page(drawn).tags if tag == "figure"]
    assert json.loads(attributes["data-heat"])["values"] == [["0", "1"], [None, "0.5"]]
    assert render_heat_map(HeatMap("m", "", [("0", [])])) == ""


def test_the_page_is_one_file_that_loads_nothing(run_dir):
    page = report(run_dir)
    assert not [tag for tag, _ in page.tags if tag in ("link", "img", "iframe", "object", "base")]
    for _, attributes in page.tags:
        assert not {"src", "srcset", "onerror", "onclick"} & attributes.keys()
        assert attributes.get("href", "#").startswith("#")
    assert not re.search(r"https?://|url\(|@import", write_report(run_dir).read_text())


def test_text_of_a_run_is_shown_literally(run_dir):
    page = report(run_dir)
    assert page.text.count(HOSTILE) == 2, "the wrong response of the first and of the last step"
    assert [tag for tag, _ in page.tags].count("script") == 1, "the page's own"
    assert "right at 1" in page.text
    assert "right at 5" in page.text
    assert "right at 3" not in page.text


@pytest.mark.parametrize(
    "missing",
    ["sft", "reward_model", "rl/eval.jsonl", "rl/rollouts", "config.yaml", "summary.json", "rl", "rl/metrics.jsonl"],
)
def test_a_report_works_without_any_one_piece(run_dir, missing):
    before = len(report(run_dir).charts)
    (run_dir / missing).rename(run_dir.parent / "aside")
    page = report(run_dir)
    assert len(page.charts) <= before
    assert "Figures" in page.text
    assert ("not finished" in page.text) == (missing == "summary.json")


def test_an_interrupted_run_reports_what_it_has(run_dir):
    (run_dir / "summary.json").unlink()
    (run_dir / "rl" / "eval.jsonl").unlink()
    with (run_dir / "rl" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "reward/sco')
    page = report(run_dir)
    assert "after 5 of 5 RL steps" in page.text
    found = figures(load_run(run_dir))
    assert found["logprob_gap_max"] == pytest.approx(5e-6)
    assert found["peak_rss_gib"] == 4.5
    assert found["logprob_gap_mean"] == pytest.approx(4e-7)
    assert "rl_accuracy" not in found


def test_nothing_to_report_is_bad_input(tmp_path):
    with pytest.raises(BadInput, match="no such run folder"):
        write_report(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="no metrics yet"):
        write_report(tmp_path / "empty")
    assert not list((tmp_path / "empty").iterdir())


def test_the_summary_in_plain_lines(run_dir):
    lines = render_summary(run_dir).splitlines()
    assert lines[:3] == [
        "Held-out accuracy before RL        25.0%",
        "Held-out accuracy after RL         50.0%",
        "RL steps                           5",
    ]


def chart_points(chart: Chart) -> list[list]:
    (attributes,) = [a for tag, a in Page(render(chart)).tags if tag == "figure"]
    return [s["points"] for s in json.loads(attributes["data-chart"])["series"]]


def test_a_log_axis_is_even_in_decades_and_skips_what_has_no_logarithm():
    (points,) = chart_points(Chart("gap", "", [Series("g", [(1, 1e-6), (2, 1e-5), (3, 0.0), (4, 1e-4)])], log=True))
    assert [p[0] for p in points] == [1, 2, 4]
    assert points[0][2] - points[1][2] == pytest.approx(points[1][2] - points[2][2], abs=0.2)


def test_a_stack_ends_at_the_sum_of_its_layers():
    a, b = [(1, 1.0), (2, 3.0)], [(1, 2.0), (2, 1.0)]
    _, top = chart_points(Chart("time", "", [Series("a", a), Series("b", b)], stacked=True))
    (total,) = chart_points(Chart("time", "", [Series("sum", [(1, 3.0), (2, 4.0)])], stacked=True))
    assert [p[2] for p in top] == [p[2] for p in total]
    assert [p[3] for p in top] == ["2", "1"], "the text is the layer's own value"


def test_thinning_keeps_the_spikes():
    values = [(float(s), 100.0 if s == 7777 else math.sin(s)) for s in range(10_000)]
    (points,) = chart_points(Chart("x", "", [Series("x", values)]))
    assert len(points) <= MOST_POINTS
    assert [p[0] for p in points if p[3] == "100"] == [7777]
    assert [p[0] for p in points] == sorted(p[0] for p in points)


@pytest.mark.parametrize("y", [0.0, 1.0, -3.0, 1e-12, 1e9])
def test_one_point_or_a_constant_still_has_an_axis(y):
    for xs in ([3], [1, 2, 3]):
        (points,) = chart_points(Chart("x", "", [Series("x", [(x, y) for x in xs])]))
        assert all(0 <= p[1] <= 560 and 0 <= p[2] <= 260 for p in points)


def test_a_chart_without_data_leaves_no_trace():
    assert render(Chart("x", "", [Series("x", [])])) == ""
    assert render(Chart("x", "", [Series("x", [(1, 0.0)])], log=True)) == ""


def test_names_in_charts_are_escaped():
    drawn = render(Chart("<b>t", "<i>h", [Series("<u>n", [(1, 1.0)])], lines=[("<s>l", 1.0)]))
    assert not re.search(r"<(b|i|u|s)>", drawn)
    assert html.escape("<s>l") in drawn


def test_wilson_interval():
    low, high = _wilson(0.5, 100)  # textbook value for 50 of 100
    assert (low, high) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert _wilson(0.0, 20)[0] == 0.0


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.1234567, "", "0.1235"),
        (0.634, "%", "63.4%"),
        (0.0012, "%", "0.12%"),
        (4.1e-7, "", "4.10e-07"),
        (5210.4, "", "5,210"),
        (5.25, "GiB", "5.25 GiB"),
        (0, "", "0"),
    ],
)
def test_numbers_for_people(value, unit, text):
    assert show(value, unit) == text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


METRICS = {
    "reward/score": 0.5,
    "throughput/rollout_tokens_per_second": 5210.0,
    "time/generate": 1.5,
    "time/update": 0.5,
    "time/tiny": 0.001,
    "time/step": 2.25,
}


def test_a_step_is_one_plain_line_off_a_terminal():
    out = io.StringIO()
    with Display("rl", 10, start=4, stream=out) as display:
        display.phase("generate")
        display.update(5, METRICS)
    line = out.getvalue()
    assert line.startswith(
        "rl step 5/10 | accuracy 50.0% | rollout tok/s 5,210 | 2.25 s = generate 1.50 + update 0.50 | left 0:0"
    )
    assert line.count("\n") == 1


def test_a_step_says_how_many_experts_changed_when_it_was_measured():
    out = io.StringIO()
    with Display("rl", 10, start=4, stream=out) as display:
        display.update(5, {"routing/update_changed": 0.0123, "routing/engine_changed": 0.004})
    assert "experts changed 1.23% | by the engine 0.40%" in out.getvalue()


def test_a_terminal_gets_a_live_panel_and_other_ranks_nothing():
    terminal, silent = Terminal(), Terminal()
    for stream, is_main in ((terminal, True), (silent, False)):
        with Display("rl", 10, stream=stream, is_main=is_main) as display:
            display.phase("old_log_probs")
            display.update(10, METRICS)
            display.note("kept")
        with task("loading", is_main=is_main, stream=stream):
            pass
    screen = terminal.getvalue()
    for expected in ("10/10", "50.0%", "generate 1.50", "done", "kept", "loading"):
        assert expected in screen
    assert silent.getvalue() == ""


def test_the_remaining_time_counts_the_steps_of_this_start_only(monkeypatch):
    now = iter([100.0, 130.0])
    monkeypatch.setattr("megarl.trainers.display.time.perf_counter", lambda: next(now))
    out = io.StringIO()
    Display("rl", 10, start=4, stream=out).update(6, {})
    assert out.getvalue() == "rl step 6/10 | left 1:00\n"
    assert duration(3725) == "1:02:05"
    assert duration(math.nan) == "?"


def test_phases_add_up_within_a_step_and_start_over(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 3.0, 4.0, 10.0, 12.0, 13.0, 20.0])
    monkeypatch.setattr("megarl.trainers.display.time.perf_counter", lambda: next(now))
    entered: list[str] = []
    phases = Phases(on_enter=entered.append)
    with phases("generate"):
        pass
    with phases("generate"):
        pass
    assert phases.seconds("generate") == 3.0
    assert phases.metrics() == {"time/generate": Mean(3.0), "time/step": Max(10.0)}
    with pytest.raises(KeyError), phases("update"):
        raise KeyError
    assert phases.metrics() == {"time/update": Mean(1.0), "time/step": Max(10.0)}
    assert entered == ["generate", "between phases", "generate", "between phases", "update"]


# The memory ledger -----------------------------------------------------------------------------------------------


LEDGER = {
    "memory/host/rollout/policy_weights": 1.0,
    "memory/host/rollout/engine_kv_cache": 0.5,
    "memory/host/rollout/rest": 0.25,
    "memory/host/rollout/rss": 1.75,
    "memory/host/update/policy_weights": 1.0,
    "memory/host/update/policy_gradients": 2.0,
    "memory/device/update/policy_weights": 3.0,
}


def test_the_ledger_of_the_last_step_is_drawn_and_summed_up(tmp_path):
    rows = [rl_row(1) | dict.fromkeys(LEDGER, 9.0), rl_row(2) | LEDGER]
    write_jsonl(tmp_path / "rl" / "metrics.jsonl", [row | {"clock/seconds": 1.0, "memory/peak_rss_gib": 1.0} for row in rows])
    summary = write_summary(tmp_path, 2, {})
    assert summary["memory_gib"] == {
        "device": {"update": {"policy_weights": 3.0}},
        "host": {
            "rollout": {"policy_weights": 1.0, "engine_kv_cache": 0.5, "rest": 0.25},
            "update": {"policy_weights": 1.0, "policy_gradients": 2.0},
        },
    }
    page = write_report(tmp_path).read_text()
    assert "Host memory by owner (GiB)" in page and "Device memory by owner (GiB)" in page
    assert "rollout, engine kv cache: 0.5 GiB" in page and "rss:" not in page


def test_bars_are_as_long_as_what_they_show_and_stand_end_to_end():
    rows = [("a", {"x": 1.0, "y": 3.0}), ("b", {"z": 2.0})]
    svg = render_bars(Bars("Title", "help", rows, "GiB", order=("y",)))
    found = re.findall(r'class="bar c(\d)" x="([\d.]+)" y="([\d.]+)" width="([\d.]+)"', svg)
    bars = [(int(colour), float(x), float(y), float(width)) for colour, x, y, width in found]
    (_, left, top, y), (_, x_left, _, x), *_, (z_colour, _, lower, z) = bars  # y comes first, as ordered
    assert y == pytest.approx(3 * x, abs=0.2) and z == pytest.approx(2 * x, abs=0.2)
    assert x_left == pytest.approx(left + y, abs=0.2) and lower > top and z_colour == 2
    assert render_bars(Bars("Title", "help", [])) == ""
    assert "<b>" not in render_bars(Bars("Title", "help", [("<b>", {"<b>": 1.0})]))
