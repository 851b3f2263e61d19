"""What `tools/gpu_smoke.sh` runs, and the two files it writes."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = "tests/e2e/test_quickstart.py::test_rl_lifts_held_out_accuracy_by_twenty_points[1]"
TESTS = [QUICKSTART, "tests/gpu", "tests/unit/test_vllm_engine.py", "tests/dist/test_learner.py"]
PACKAGES = ["torch", "vllm", "megatron-core", "transformer-engine", "apex", "triton", "flashinfer-python", "transformers"]
NVIDIA_SMI = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,compute_cap", "--format=csv,noheader"]


def missing() -> str | None:
    """Why nothing can run here, in one line; None: all is there."""
    try:
        import torch
    except ImportError as error:
        return f"torch cannot be imported by {sys.executable} ({error}); set PYTHON to the Python of a CUDA installation"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; run it with a CUDA installation (launch/Containerfile)"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device; run it on a machine with an NVIDIA GPU and its driver"
    absent = [name for name in ("vllm", "megatron-core", "pytest") if version(name) is None]
    if absent:
        return f"{', '.join(absent)} not installed for {sys.executable}; install tools/requirements-cuda.txt"
    return None


def version(name: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """Date, devices, driver and versions."""
    import torch

    cuda = torch.cuda.is_available()
    try:
        lines = subprocess.run(NVIDIA_SMI, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        lines = []
    rows = [[cell.strip() for cell in line.split(",")] for line in lines]
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
        "memory": sorted({row[2] for row in rows}),
        "compute capability": sorted({row[3] for row in rows}),
        "driver": sorted({row[1] for row in rows}),
        "CUDA of torch": torch.version.cuda,
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None,
        "python": platform.python_version(),
        "commit": _commit(),
        "versions": {name: version(name) for name in PACKAGES},
    }


def _commit() -> str | None:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def read_rows(junit: Path) -> list[dict[str, Any]]:
    """One for each test of pytest's JUnit file, in its order: name, outcome, seconds, figures, and why it was not passed."""
    rows = []
    for case in ET.parse(junit).iter("testcase"):
        outcome, reason = "passed", ""
        for kind, word in (("skipped", "skipped"), ("failure", "failed"), ("error", "error")):
            found = case.find(kind)
            if found is not None:
                outcome, reason = word, found.get("message") or ""
        rows.append(
            {
                "test": f"{case.get('classname')}.{case.get('name')}",
                "outcome": outcome,
                "seconds": round(float(case.get("time", 0)), 1),
                "figures": {p.get("name"): p.get("value") for p in case.iter("property")},
                "reason": " ".join(reason.split()),
            }
        )
    return rows


def table(rows: list[dict[str, Any]], found: dict[str, Any], command: str) -> str:
    """The Markdown page."""
    counts = Counter(row["outcome"] for row in rows)
    lines = ["# GPU smoke test", "", f"`{command}`, {found['date']}, commit {found['commit'] or 'unknown'}.", ""]
    lines += ["| | |", "|---|---|"]
    for name, value in found.items():
        if name not in ("date", "commit", "versions"):
            lines.append(f"| {name} | {_cell(', '.join(value) if isinstance(value, list) else value)} |")
    lines += [f"| {name} | {_cell(installed)} |" for name, installed in found["versions"].items()]
    lines += ["", f"{', '.join(f'{count} {outcome}' for outcome, count in counts.items())}.", ""]
    lines += ["| test | result | seconds | figures, or why not |", "|---|---|---|---|"]
    for row in rows:
        figures = "; ".join(f"{name}: {value}" for name, value in row["figures"].items())
        notes = "; ".join(filter(None, (figures, row["reason"][:300])))
        lines.append(f"| {_cell(row['test'])} | {row['outcome']} | {row['seconds']:.1f} | {_cell(notes, '')} |")
    return "\n".join(lines) + "\n"


def _cell(value: object, nothing: str = "not there") -> str:
    return str(value or nothing).replace("|", "\\|")


def write(folder: Path, rows: list[dict[str, Any]], found: dict[str, Any], command: str) -> None:
    """`gpu_smoke.json` and `gpu_smoke.md`, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    both = {"gpu_smoke.json": json.dumps({"machine": found, "tests": rows}, indent=1) + "\n"}
    both["gpu_smoke.md"] = table(rows, found, command)
    for name, text in both.items():
        partial = folder / f".{name}"
        partial.write_text(text)
        partial.replace(folder / name)


def main(arguments: list[str]) -> int:
    reason = missing()
    if reason:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    folder = ROOT / "tools" / "bench" / "results"
    if arguments and not arguments[0].startswith("-"):
        folder = Path(arguments.pop(0)).resolve()
    with tempfile.TemporaryDirectory() as name:
        junit = Path(name) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "--timeout", "3600", "--junit-xml", str(junit), *TESTS, *arguments]
        env = os.environ | {"MEGARL": f"{sys.executable} -m megarl"}
        code = subprocess.run(command, cwd=ROOT, env=env).returncode
        if not junit.exists():
            print("error: pytest wrote no results; see its output above", file=sys.stderr)
            return 1
        rows = read_rows(junit)
    write(folder, rows, machine(), " ".join(["tools/gpu_smoke.sh", *arguments]))
    print(f"written: {folder / 'gpu_smoke.md'} and gpu_smoke.json")
    return 0 if code == 0 else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
