"""`megarl report RUN_DIR`: one self-contained HTML file about a run, and its figures as plain text."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from megarl.bounds import TooMuch, bounded
from megarl.errors import BadInput
from megarl.report.charts import show
from megarl.report.data import figures, load_run
from megarl.report.page import LABELS, page
from megarl.report.summary import write_summary

__all__ = ["describe_machine", "render_summary", "write_report", "write_summary"]


REPORT_SECONDS = 600.0


def write_report(run_dir: Path | str) -> Path:
    """Writes `RUN_DIR/report.html` and returns its path; works for a run that goes on, was interrupted or is SFT only.

    Raises BadInput when there is no such folder, nothing to show in it, or it cannot be written.
    """
    run_dir = Path(run_dir)
    try:
        with bounded(REPORT_SECONDS, 4 << 30):
            html = page(load_run(run_dir))
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError, TooMuch) as error:
        line = " ".join(str(error).split())[:200]
        raise BadInput(
            f"{run_dir}: its files hold what no run writes ({type(error).__name__}: {line}); give a run's own folder"
        ) from None
    path, partial = run_dir / "report.html", run_dir / "report.html.partial"
    try:
        partial.unlink(missing_ok=True)  # were it a link, it would be followed
        partial.write_text(html, encoding="utf-8", errors="replace")
        os.replace(partial, path)
    except OSError as error:
        raise BadInput(f"{path}: cannot be written ({error.strerror}); make {run_dir} writable") from None
    return path


def render_summary(run_dir: Path | str) -> str:
    """The figures of a run as aligned plain lines. Raises BadInput as `write_report`."""
    found = figures(load_run(Path(run_dir)))
    rows = [(LABELS[name][0], show(found[name], LABELS[name][1])) for name in LABELS if found.get(name) is not None]
    width = max((len(label) for label, _ in rows), default=0)
    return "\n".join(f"{label:<{width}}  {value}" for label, value in rows)


def describe_machine() -> dict[str, str]:
    """What the `machine` entry of summary.json holds: processor, cores, memory, system, device, torch version."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    device = torch.cuda.get_device_name() if torch.version.cuda and torch.cuda.is_available() else "CPU"
    return {
        "device": device,
        "processor": _processor(),
        "cores": f"{len(os.sched_getaffinity(0))} cores",
        "memory": f"{memory:.0f} GiB memory",
        "system": f"{platform.system()} {platform.machine()}",
        "torch": f"torch {torch.__version__}",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown processor")
