"""The quickstart, as the README gives it, on three seeds."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_rl_lifts_held_out_accuracy_by_twenty_points(tmp_path, seed, record_property):
    run = tmp_path / "run"
    alone = ["parallel.ep=1", "parallel.nproc=1"] if torch.cuda.device_count() == 1 else []  # a GPU takes one rank
    subprocess.run([ROOT / "tools" / "quickstart.sh", f"seed={seed}", f"run_dir={run}", *alone], check=True, cwd=ROOT)
    summary = json.loads((run / "summary.json").read_text())
    evaluated = [json.loads(line) for line in (run / "rl" / "eval.jsonl").read_text().splitlines()]
    steps = [
        json.loads(line) for line in (run / "rl" / "metrics.jsonl").read_text().splitlines() if '"step": 0,' not in line
    ]
    for name in ("sft_accuracy", "rl_accuracy"):
        record_property(name, f"{summary[name]:.1%}")
    assert summary["rl_accuracy"] >= summary["sft_accuracy"] + 0.20
    assert evaluated[0]["problems"] >= 1000
    assert max(row["sync/gap_mean"] for row in steps) <= 1e-5
    assert summary["peak_rss_gib"] <= 8
    clipped = [row["policy/clip_seq_frac"] for row in steps]
    assert 0.01 < sum(clipped) / len(clipped) < 0.5
