"""Metrics merge without ever becoming a mean of means, and sinks keep one row a step across a resume."""

from __future__ import annotations

import json
import math
from functools import reduce

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megarl.errors import BadInput
from megarl.metrics import (
    JsonlSink,
    Max,
    Mean,
    Min,
    Quantile,
    Std,
    Sum,
    TensorBoardSink,
    cut_jsonl,
    merge,
    open_writer,
    read_jsonl,
    reduce_metrics,
)

values = st.lists(st.tuples(st.floats(-1e3, 1e3), st.booleans()), max_size=20)


def observe(rows: list[tuple[float, bool]]) -> dict:
    x, mask = torch.tensor([v for v, _ in rows], dtype=torch.float64), torch.tensor([float(m) for _, m in rows])
    total = Sum(torch.where(mask > 0, x, 0.0).sum())
    return {
        "mean": Mean.of(x, mask),
        "std": Std.of(x, mask),
        "max": Max.of(x, mask),
        "min": Min.of(x, mask),
        "sum": total,
    }


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(values, min_size=1, max_size=3), min_size=1, max_size=3))
def test_any_split_over_micro_batches_and_ranks_reports_the_statistics_of_all_observations(ranks):
    per_rank = []
    for micro_batches in ranks:
        merged: dict = {}
        for rows in micro_batches:
            merge(merged, observe(rows))
        per_rank.append(merged)
    detached = [{name: m.detached() for name, m in rank.items()} for rank in per_rank]
    got = reduce_metrics(per_rank[0], lambda _: detached)

    kept = torch.tensor([v for rank in ranks for rows in rank for v, m in rows if m], dtype=torch.float64)
    if not len(kept):
        assert got == {"sum": 0.0}
        return
    expected = {"mean": kept.mean(), "max": kept.max(), "min": kept.min(), "sum": kept.sum()}
    expected["std"] = kept.std(correction=0)
    assert got == pytest.approx({name: float(value) for name, value in expected.items()}, abs=1e-6)


def test_a_mean_is_weighted_by_its_count():
    merged = merge({"a": Mean(10.0, 1)}, {"a": Mean(0.0, 9)})
    assert reduce_metrics(merged, lambda x: [x]) == {"a": 1.0}


def test_std_keeps_its_digits_far_from_zero():
    x = torch.tensor([1e8 + 1, 1e8 + 2, 1e8 + 3], dtype=torch.float64)
    halves = [Std.of(x[:1], torch.ones(1)), Std.of(x[1:], torch.ones(2))]
    assert halves[0].merge(halves[1]).value() == pytest.approx((2 / 3) ** 0.5, rel=1e-9)


def test_values_outside_the_mask_are_not_looked_at_and_a_nan_inside_stays_visible():
    x, mask = torch.tensor([1.0, math.nan, 3.0]), torch.tensor([1, 0, 1])
    seen = {"mean": Mean.of(x, mask), "std": Std.of(x, mask), "max": Max.of(x, mask), "min": Min.of(x, mask)}
    assert reduce_metrics(seen, lambda x: [x]) == {"mean": 2.0, "std": 1.0, "max": 3.0, "min": 1.0}
    everything = {"mean": Mean.of(x, torch.ones(3)), "max": Max.of(x, torch.ones(3))}
    got = reduce_metrics(everything, lambda x: [x])
    assert set(got) == {"mean", "max"}
    assert all(math.isnan(value) for value in got.values())


def test_a_quantile_of_any_split_is_that_of_all_observations():
    torch.manual_seed(0)
    for spread in (1e-5, 1e-2, 3.0):
        x = 1 + spread * torch.randn(4000, dtype=torch.float64)
        mask = torch.rand(4000) < 0.7
        parts = [Quantile.of(a, b, 0.99, centre=1.0) for a, b in zip(x.split(500), mask.split(500), strict=True)]
        whole = reduce(Quantile.merge, parts).value()
        exact = x[mask].quantile(0.99, interpolation="lower").item()
        assert whole - 1 == pytest.approx(exact - 1, rel=0.01)
    assert Quantile.of(torch.ones(3), torch.ones(3), 0.99, centre=1.0).value() == 1.0
    assert math.isnan(Quantile.of(torch.ones(3), torch.zeros(3), 0.99).value())


def test_a_name_with_two_types_is_refused():
    with pytest.raises(ValueError, match="metric a is a Mean here and a Sum there"):
        merge({"a": Mean(1.0)}, {"a": Sum(1.0)})


def test_a_sum_over_optimizer_steps_becomes_their_mean():
    assert merge({"loss": Sum(3.0)}, {"loss": Sum(5.0)})["loss"].scaled(1 / 2).value() == 4.0


def test_jsonl_rows_and_resume(tmp_path):
    path = tmp_path / "rl" / "metrics.jsonl"
    sink = JsonlSink(path)
    for step in range(5):
        sink.write(step, {"reward/mean": step / 2, "policy/loss": math.nan if step == 1 else 0.5})
    assert len(read_jsonl(path)) == 5, "flushed every step"
    sink.close()
    with path.open("a") as file:
        file.write('{"step": 5, "rew')  # killed while writing

    resumed = JsonlSink(path, resume_step=2)
    resumed.write(3, {"reward/mean": -1.0})
    resumed.close()
    rows = read_jsonl(path)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert rows[3]["reward/mean"] == -1.0
    assert rows[1]["policy/loss"] is None, "NaN is not JSON"
    json.loads(path.read_text().splitlines()[1], parse_constant=pytest.fail)


def test_a_fresh_sink_does_not_append_to_an_old_run(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 7}\n')
    JsonlSink(tmp_path / "metrics.jsonl").close()
    assert read_jsonl(tmp_path / "metrics.jsonl") == []


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(BadInput, match=r"metrics\.jsonl:2: not a JSON object"):
        cut_jsonl(path, 1)


def test_tensorboard_holds_what_was_written(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorBoardSink(tmp_path)
    for step in (1, 2):
        sink.write(step, {"reward/mean": step / 4})
    sink.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward/mean")] == [(1, 0.25), (2, 0.5)]


def test_only_the_main_rank_writes(tmp_path):
    writer = open_writer(tmp_path / "rl", is_main=False)
    writer.write(1, {"a": 1.0})
    writer.close()
    assert not (tmp_path / "rl").exists()
    writer = open_writer(tmp_path / "rl", is_main=True, tensorboard=False)
    writer.write(1, {"a": 1.0})
    writer.close()
    assert [row["a"] for row in read_jsonl(tmp_path / "rl" / "metrics.jsonl")] == [1.0]
