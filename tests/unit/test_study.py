"""The drift study: its runs, the statistics over steps and seeds, and what it writes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from megarl.config import load_config
from megarl.errors import BadInput
from megarl.metrics import WithinCorrelation
from megarl.study.drift import run_study, runs
from megarl.study.results import Study, findings, markdown, write_results
from megarl.study.statistics import QUANTITIES, bootstrap, coverage, has_collapsed, spikes, summarise

CONFIG = Path(__file__).parents[2] / "configs" / "studies" / "drift" / "study.yaml"


def study_config(tmp_path: Path, *overrides: str):
    return load_config(CONFIG, [f"run_dir={tmp_path}/runs", f"study.results={tmp_path}/out", *overrides])


@pytest.mark.parametrize("seeds", [3, 5, 20])
def test_the_interval_of_a_mean_holds_it_as_often_as_it_says(seeds):
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(400, seeds, generator=generator, dtype=torch.float64)
    held = sum(x.low <= 0 <= x.high for x in (bootstrap(row.tolist(), 1000) for row in draws))
    assert held / 400 == pytest.approx(coverage(seeds), abs=0.06)  # three standard errors


def test_an_interval_needs_two_seeds_and_leaves_out_what_was_not_measured():
    assert bootstrap([1.0, math.nan, 3.0]).mean == 2.0
    assert bootstrap([1.0, 3.0]).low == 1.0
    assert math.isnan(bootstrap([5.0, math.nan]).low)
    assert not bootstrap([5.0]).is_clear
    assert bootstrap([1.0, 1.2, 1.4]).is_clear
    assert not bootstrap([1.0, 2.0, 3.0]).is_clear, "t = 3.5, and two degrees of freedom need 4.3"
    assert math.isnan(bootstrap([]).mean)


@pytest.mark.parametrize(
    ("rewards", "collapsed"),
    [
        ([0.4] * 40, False),
        ([0.4] * 30 + [0.1] * 10, True),
        ([0.4] * 30 + [0.1] * 8 + [0.4] * 2, False),  # it came back
        ([0.4] * 37 + [0.1] * 3, False),  # too short to tell
        ([0.4] * 20 + [0.21] * 20, False),  # more than half is left
        ([0.0] * 40, False),  # never learned
    ],
)
def test_a_collapse_is_low_to_the_end(rewards, collapsed):
    assert has_collapsed(rewards) is collapsed


def test_a_spike_is_measured_against_what_came_before():
    assert spikes([1.0, 1.0, 1.0, 6.0, 1.0, 4.0]) == 1
    assert spikes([6.0, 1.0, 1.0]) == 0


def test_the_mean_of_a_sequence_varies_as_its_correlation_says():
    """Equal lengths: Var(mean) = Var(z) (1 + (n - 1) rho) / n holds exactly; parts merge to the whole."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(50, 1, generator=generator, dtype=torch.float64) + torch.randn(50, 6, generator=generator)
    counts = torch.full((50,), 6)
    whole = WithinCorrelation.of(counts, z.sum(1), z.square().sum(1))
    rho, variance = whole.value(), z.var(unbiased=False)
    assert float(z.mean(1).var(unbiased=False) / variance) == pytest.approx((1 + 5 * rho) / 6)
    parts = [WithinCorrelation.of(counts[s], z[s].sum(1), z[s].square().sum(1)) for s in (slice(20), slice(20, 50))]
    assert parts[0].merge(parts[1]).value() == pytest.approx(rho)
    assert math.isnan(WithinCorrelation.of(torch.ones(3), torch.randn(3), torch.ones(3)).value())


def test_arms_of_a_seed_differ_in_algorithm_and_replay_only(tmp_path):
    config = study_config(tmp_path, "study.seeds=2")
    found = list(runs(config))
    assert [run.name for run in found[:10]] == [
        "start", *(f"{m}-{r}" for m in ("grpo", "gspo", "sapo") for r in ("none", "old", "rollout"))
    ]  # fmt: skip
    assert [run.seed for run in found] == [1] * 10 + [2] * 10
    for seed in (1, 2):
        plain = [run.config.model_dump() for run in found if run.seed == seed and run.part == "rl"]
        for one in plain:
            assert one["rl"].pop("routing_replay") in ("none", "old", "rollout")
            one["rl"].pop("algorithm"), one.pop("run_dir")
        assert all(one == plain[0] for one in plain)
        assert plain[0]["model"]["path"].endswith(f"start/seed_{seed}/sft/hf")
    assert found[0].config.model.generate.seed != found[10].config.model.generate.seed


def make_run(folder: Path, reward: float, changed: float, steps: int = 20) -> None:
    rows = [
        {
            "step": step,
            "reward/score": reward,
            "policy/entropy": 0.5,
            "policy/grad_norm": 1.0,
            "policy/grad_norm_max": 1.0,
            "routing/update_changed": changed,
            "routing/log_ratio_std_live": 0.2,
            "routing/log_ratio_std_replayed": 0.1,
            "routing/log_ratio_seq_std_live": 0.1,
            "routing/inverse_length": 0.25,
        }
        for step in range(steps + 1)
    ]
    (folder / "rl").mkdir(parents=True)
    (folder / "rl" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "summary.json").write_text("{}")


@pytest.fixture
def finished(tmp_path):
    """Two seeds of two arms; replay lowers the share of changed experts, and changes the reward by noise only."""
    config = study_config(tmp_path, "study.seeds=3", "study.methods={grpo: {preset: grpo}}", "study.routing_replay=[none, old]")
    arms = [run for run in runs(config) if run.part == "rl"]
    for run in arms:
        if run.seed < 3:
            noise = 0.01 * (run.seed - 1.5) * (run.name == "grpo-old")
            make_run(run.folder, 0.3 + noise, 0.1 if run.name == "grpo-none" else 0.02 + 0.001 * run.seed)
    return config, arms


def test_numbers_of_a_run_are_those_of_its_steps(finished):
    numbers = Study.load(finished[1]).arms["grpo-none"][1].numbers
    assert set(numbers) == {quantity.key for quantity in QUANTITIES}
    assert numbers["changed"] == pytest.approx(0.1)
    assert numbers["share"] == pytest.approx(0.75)
    assert numbers["averaging"] == numbers["independent"] == pytest.approx(0.5)
    assert math.isnan(numbers["gap"])
    assert math.isnan(summarise([])["reward"])


def test_the_results_say_what_is_noise_and_how_many_seeds_there_are(finished):
    config, arms = finished
    study = Study.load(arms)
    assert study.seeds == [1, 2]
    lines = findings(study, config)
    assert any(line.startswith("Experts changed") and "more than noise" in line and "-7.85 points" in line for line in lines)
    assert any(line.startswith("Reward") and "every difference is within noise" in line for line in lines)
    text = markdown(study, config, "megarl study drift x.yaml")
    assert "2 of 3 complete (1, 2)" in text
    assert "| grpo-none | 30.0% [30.0%, 30.0%] | - | 30.0%" in text
    assert "`megarl study drift x.yaml`" in text


def test_the_results_are_two_files_and_the_page_loads_nothing(finished, tmp_path):
    config, arms = finished
    assert "2 of 3 seeds" in write_results(config, arms, "megarl study drift x.yaml")
    page = (tmp_path / "out" / "study.html").read_text()
    assert (tmp_path / "out" / "RESULTS.md").exists()
    assert "GRPO over the steps" in page
    for forbidden in ("http://", "https://", "src=", "<link"):
        assert forbidden not in page


def test_a_study_without_a_finished_run_has_no_table(tmp_path):
    config = study_config(tmp_path)
    text = markdown(Study.load([run for run in runs(config) if run.part == "rl"]), config, "x")
    assert "0 of 5 complete" in text
    assert "| arm |" not in text


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["study.methods={a-b: {preset: grpo}}"], "study.methods.a-b"),
        (["model.generate.family=qwen3"], "dense model"),
        (["log.routing_tokens=0"], "set 512"),
    ],
)
def test_a_study_that_cannot_be_is_refused(tmp_path, overrides, complaint):
    with pytest.raises(BadInput, match=complaint):
        run_study(study_config(tmp_path, *overrides), [], CONFIG)
