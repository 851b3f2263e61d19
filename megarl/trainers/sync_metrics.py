"""What a step's metrics say about its weight sync."""

from __future__ import annotations

from megarl.metrics import Max, Mean, Metric, Sum
from megarl.rollout.weight_sync import SyncGap, SyncReport


def sync_metrics(report: SyncReport, gap: SyncGap | None) -> dict[str, Metric]:
    """`gap` is none when the run does not check its syncs."""
    metrics: dict[str, Metric] = {
        "sync/move_seconds": Max(report.seconds),
        "sync/bytes_moved": Sum(report.traffic.received),
        "sync/bytes_least": Sum(report.traffic.bound),
        "sync/bytes_written": Sum(report.traffic.written),
        "sync/gb_per_second": Mean(report.speed / 1e9),
        "sync/of_plain_copy": Mean(report.speed / report.copy_speed),
    }
    if gap is None:
        return metrics | {"sync/unchecked": Max(1.0)}
    return metrics | {"sync/gap_mean": Mean(gap.mean), "sync/gap_max": Max(gap.max)}
