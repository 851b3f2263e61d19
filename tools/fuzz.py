#!/usr/bin/env python
"""Fuzzing of everything that reads files or values of others, with an accumulated table.

Examples:
    tools/fuzz.py --cases 10000              # goes on where it was; the table: tools/bench/results/fuzz.md
    tools/fuzz.py --cases 10000 --atheris    # the parsers of bytes, guided by coverage (needs the package atheris)
    tools/fuzz.py --cli 40                   # a sample of configurations through the command line

Every case works or is refused with one line. A finding (a traceback, a hang, a file outside the run folder, a dead
process) is kept with its number in runs/fuzz/TARGET.json, and `tools/fuzz.py --run NAME NUMBER NUMBER` makes it again.
Exit code 1 while there are findings.
"""

from __future__ import annotations

import argparse
import datetime
import faulthandler
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
STATE, TABLE = ROOT / "runs/fuzz", ROOT / "tools/bench/results/fuzz.md"
CHUNK, HANG = 2500, 120  # cases of one process; seconds that no case may take
OF_BYTES = {
    "safetensors header": ["megarl.convert"],
    "checkpoint .metadata": ["megarl.platform.safe_loading"],
    "recorded rollouts": ["megarl.trainers.rollout_files"],
    "JSONL prompts": ["megarl.data"],
    "config.json": ["megarl.convert", "megarl.config"],
    "answers of reward workers": ["megarl.rewards"],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--target", action="append", help="these only (default: all)")
    parser.add_argument("--atheris", action="store_true")
    parser.add_argument("--cli", type=int, default=0, metavar="CASES")
    parser.add_argument("--run", nargs=3, metavar=("NAME", "FIRST", "END"), help=argparse.SUPPRESS)
    parser.add_argument("--guided", nargs=2, metavar=("NAME", "RUNS"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run:
        return run(given.run[0], int(given.run[1]), int(given.run[2]))
    if given.guided:
        return guided(given.guided[0], int(given.guided[1]))
    state = read_state()
    if given.cli:
        through_command_line(given.cli, state)
    elif given.atheris:
        for name in given.target or OF_BYTES:
            with_atheris(name, given.cases, state)
    else:
        for name in given.target or all_targets():
            with_cases(name, given.cases, state)
    return 1 if any(entry["findings"] for entry in state.values()) else 0


def all_targets() -> list[str]:
    from tests.fuzz.targets import TARGETS

    return list(TARGETS)


def entry_of(state: dict, key: str) -> dict:
    return state.setdefault(key, {"cases": 0, "works": 0, "refused": 0, "seconds": 0.0, "findings": []})


def read_state() -> dict:
    return {file.stem: json.loads(file.read_text()) for file in sorted(STATE.glob("*.json"))}


def save(state: dict, key: str) -> None:
    """Keeps one target's entry, and writes the table of all: several may be at work at the same time."""
    STATE.mkdir(parents=True, exist_ok=True)
    partial = STATE / f"{key}.new"
    partial.write_text(json.dumps(state[key], indent=1))
    partial.replace(STATE / f"{key}.json")
    rows = [
        f"| {key} | {e['cases']:,} | {e['works']:,} | {e['refused']:,} | {len(e['findings'])} | {e['seconds']:.0f} |"
        for key, e in read_state().items()
    ]
    today = datetime.date.today().isoformat()
    TABLE.write_text(
        "# Fuzzing\n\n"
        f"`tools/fuzz.py`, last {today}, two cores of an AMD EPYC, Python {sys.version.split()[0]}. A case works or is\n"
        "refused with one line; a finding is anything else. Findings of earlier versions are fixed, and listed in\n"
        "SECURITY.md. Coverage-guided runs (atheris) count executions.\n\n"
        "| target | cases | worked | refused | findings | seconds |\n|---|---|---|---|---|---|\n"
        + "\n".join(rows)
        + "\n"
    )


def child(*arguments: str, seconds: float) -> tuple[int, str]:
    command = [sys.executable, __file__, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=seconds)
    except subprocess.TimeoutExpired:
        return -1, "a hang"
    return done.returncode, done.stdout if done.returncode == 0 else done.stdout + done.stderr[-2000:]


def with_cases(name: str, cases: int, state: dict) -> None:
    entry = entry_of(state, name)
    while entry["cases"] < cases:
        first = entry["cases"]
        end = min(first + CHUNK, cases)
        started = time.monotonic()
        code, said = child("--run", name, str(first), str(end), seconds=24 * 3600)
        found = (
            json.loads(said.splitlines()[-1]) if code == 0 else {"works": 0, "refused": 0, "findings": [said[-600:]]}
        )
        for key in ("works", "refused", "findings"):
            entry[key] += found[key]
        entry["cases"], entry["seconds"] = end, entry["seconds"] + time.monotonic() - started
        save(state, name)
    print(f"{name}: {entry['cases']:,} cases, {len(entry['findings'])} findings", flush=True)


def run(name: str, first: int, end: int) -> int:
    """Cases `first` to `end` in this process; one line of JSON."""
    from tests.fuzz import targets

    found: dict = {"works": 0, "refused": 0, "findings": []}
    for number in range(first, end):
        faulthandler.dump_traceback_later(HANG, exit=True)
        try:
            found["works" if targets.attempt(name, targets.case(name, number)) == "works" else "refused"] += 1
        except BaseException as error:
            found["findings"].append(f"{number}: {type(error).__name__}: {error}"[:300])
    faulthandler.cancel_dump_traceback_later()
    shutil.rmtree(targets.home())
    print("\n" + json.dumps(found))
    return 0


def with_atheris(name: str, cases: int, state: dict) -> None:
    entry = entry_of(state, f"{name} (atheris)")
    left = cases - entry["cases"]
    if left <= 0:
        return
    started = time.monotonic()
    code, said = child("--guided", name, str(left), seconds=3600)
    executed = re.findall(r"Done (\d+) runs|stat::number_of_executed_units: (\d+)", said)
    counts = json.loads((STATE / "counts" / name).read_text()) if code == 0 else {"works": 0, "refused": 0}
    entry["cases"] += (
        sum(counts.values()) or int(executed[-1][0] or executed[-1][1]) if executed else sum(counts.values())
    )
    entry["works"] += counts["works"]
    entry["refused"] += counts["refused"]
    entry["seconds"] += time.monotonic() - started
    if code:
        entry["findings"].append(said[-600:])
    save(state, f"{name} (atheris)")
    print(f"{name} (atheris): {entry['cases']:,} cases, {len(entry['findings'])} findings", flush=True)


def guided(name: str, runs: int) -> int:
    import atheris

    with atheris.instrument_imports(include=OF_BYTES[name]):
        from tests.fuzz import targets
    counts = {"works": 0, "refused": 0}
    record = STATE / "counts" / name
    record.parent.mkdir(parents=True, exist_ok=True)

    def one(data: bytes) -> None:
        counts["works" if targets.attempt(name, data) == "works" else "refused"] += 1
        if sum(counts.values()) % 100 == 0 or sum(counts.values()) >= runs:
            record.write_text(json.dumps(counts))

    corpus = Path(tempfile.mkdtemp(prefix="megarl-corpus-"))
    for number in range(40):
        (corpus / str(number)).write_bytes(targets.case(name, number)[:8192])
    options = [f"-runs={runs}", f"-timeout={HANG}", "-max_len=8192", f"-artifact_prefix={record.parent}/", str(corpus)]
    atheris.Setup([sys.argv[0], *options], one)
    atheris.Fuzz()  # ends the process
    return 0


def through_command_line(cases: int, state: dict) -> None:
    """`megarl config FILE` on spoilt configurations, and `megarl convert` of spoilt checkpoints."""
    from tests.fuzz import targets

    entry = entry_of(state, "command line")
    folder = targets.home() / "run" / "cli"
    shutil.copytree(targets.home() / "model", folder)
    whole = (folder / "config.json").read_bytes()
    for number in range(entry["cases"], cases):
        started = time.monotonic()
        if number % 4:
            command = ["config", str(targets.put("cli.yaml", targets.case("config files", number)))]
        else:
            (folder / "config.json").write_bytes(targets.case("config.json", number) if number % 8 else whole)
            (folder / "tokenizer.json").write_bytes(targets.case("tokenizer.json", number))
            command = ["convert", str(folder), str(targets.home() / "run" / f"out{number}"), "--to", "hf"]
        done = subprocess.run(
            [sys.executable, "-m", "megarl", *command],
            capture_output=True,
            text=True,
            errors="replace",
            cwd=ROOT,
            timeout=300,
        )
        lines = done.stderr.splitlines()
        good = done.returncode == 0 or (
            done.returncode in (1, 2) and len(lines) == 1 and lines[0].startswith("error: ")
        )
        if not good or "Traceback" in done.stdout + done.stderr or "traceback" in done.stderr:
            entry["findings"].append(f"{number}: exit code {done.returncode}: {done.stderr[-300:]}")
        entry["works" if done.returncode == 0 else "refused"] += 1
        entry["cases"], entry["seconds"] = number + 1, entry["seconds"] + time.monotonic() - started
        save(state, "command line")
    shutil.rmtree(targets.home())
    print(f"command line: {entry['cases']} cases, {len(entry['findings'])} findings", flush=True)


if __name__ == "__main__":
    sys.exit(main())
