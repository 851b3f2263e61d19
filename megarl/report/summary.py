"""summary.json: the figures of a finished run, read from what its steps logged."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megarl.metrics import read_jsonl
from megarl.report.data import memory_ledger


def write_summary(run_dir: Path, world_size: int, machine: dict[str, str]) -> dict[str, Any]:
    """Write RUN_DIR/summary.json after the last step; accuracies are fractions of 1, rates exclude start-up.

    `wall_seconds` adds up what every command of the project took, from its start to its end, interruptions excluded;
    `peak_rss_gib` is the largest memory that all ranks of one command and their children held together; `memory_gib` is
    the last step's, {"device" or "host": {phase: {owner: GiB of all ranks}}}.
    """
    sft, scorer, rl = (read_jsonl(run_dir / part / "metrics.jsonl") for part in ("sft", "reward_model", "rl"))
    evaluated = [row for row in rl if row.get("eval/accuracy") is not None]
    steps = [row for row in rl if row["step"] > 0]
    summary: dict[str, Any] = {
        "sft_accuracy": evaluated[0]["eval/accuracy"] if evaluated else None,
        "rl_accuracy": evaluated[-1]["eval/accuracy"] if evaluated else None,
        "wall_seconds": sum(rows[-1]["clock/seconds"] for rows in (sft, scorer, rl) if rows),
        "steps": len(steps),
        "rollout_tokens_per_second": _rate(steps, "throughput/rollout_tokens_per_second", "time/generate"),
        "learner_tokens_per_second": _rate(steps, "throughput/learner_tokens_per_second", "time/update"),
        "logprob_gap_mean": max((row["sync/gap_mean"] for row in steps if "sync/gap_mean" in row), default=None),
        "logprob_gap_max": max((row["sync/gap_max"] for row in steps if "sync/gap_max" in row), default=None),
        "peak_rss_gib": max((row["memory/peak_rss_gib"] for row in (*sft, *scorer, *steps)), default=None),
        "memory_gib": memory_ledger(steps),
        "experts_changed_update": _mean(steps, "routing/update_changed"),
        "experts_changed_engine": _mean(steps, "routing/engine_changed"),
        "clip_fraction": _mean(steps, "policy/clip_seq_frac"),
        "sft_seconds": sft[-1]["clock/seconds"] if sft else None,
        "rl_seconds": rl[-1]["clock/seconds"] if rl else None,
        "world_size": world_size,
        "machine": machine,
    }
    partial = run_dir / "summary.json.partial"
    partial.write_text(json.dumps(summary, indent=2) + "\n")
    partial.replace(run_dir / "summary.json")
    return summary


def _mean(rows: Sequence[dict[str, Any]], key: str) -> float | None:
    values = [row[key] for row in rows if row.get(key) is not None]
    return sum(values) / len(values) if values else None


def _rate(rows: Sequence[dict[str, Any]], rate: str, seconds: str) -> float | None:
    """All tokens over all seconds, not a mean of rates."""
    pairs = [(row[rate], row[seconds]) for row in rows if row.get(rate) is not None and row.get(seconds)]
    total = sum(s for _, s in pairs)
    return sum(r * s for r, s in pairs) / total if total else None
