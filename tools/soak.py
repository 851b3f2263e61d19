"""What `tools/soak.sh` runs: kills at random moments, counted over all its invocations."""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from datetime import date
from pathlib import Path

from tests.faults import kills

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs/cpu/quickstart.yaml"
RECORD = ROOT / "tools/bench/results/soak.jsonl"
TABLE = ROOT / "tools/bench/results/soak.md"
COMMON = ["checkpoint.every=2", "log.tensorboard=false"]
SETTINGS = {
    "sft": ["sft.steps=12", "sft.stop_at_loss=none"],
    "rl": ["rl.steps=6", "eval.every=3", "eval.data.0.size=400"],
}
PHASES = {
    "sft": ["start", "data", "update", "update", "checkpoint", "checkpoint", "between phases"],
    "rl": ["start", "generate", "reward", "gather", "prepare", "routing", "old_log_probs", "update", "update", "sync", "eval",
           "checkpoint", "checkpoint", "between phases"],
}  # fmt: skip
KILLS_PER_RUN = 5
TIMEOUT = 1800.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="stop when so many are recorded in all")
    parser.add_argument("--parts", default="sft,rl")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/soak")
    parser.add_argument("--pause-file", type=Path, help="no run is going on while this file exists")
    parser.add_argument("--until", help="HH:MM after which no run is started")
    args = parser.parse_args()
    parts = args.parts.split(",")
    for part in parts:
        _reference(args.folder, part, args.pause_file)
    while sum(len(run["kills"]) for run in _recorded()) < args.kills:
        if args.until and time.strftime("%H:%M") >= args.until:
            break
        number = len(_recorded())
        _one_run(args.folder, parts[number % len(parts)], number, args.pause_file)
        _write_table()


def _reference(folder: Path, part: str, pause: Path | None) -> None:
    """The run that nobody disturbs; RL starts from the SFT of it."""
    run_dir = folder / "undisturbed"
    if (run_dir / part / "hf").is_dir():
        return
    shutil.rmtree(run_dir / part, ignore_errors=True)
    run_dir.mkdir(parents=True, exist_ok=True)
    run = kills.Run(_command(folder, part, run_dir, torchrun=0), run_dir / part, folder / "tmp")
    code = _wait(run, pause)
    run.close()
    if code:
        raise SystemExit(f"the undisturbed {part} run ended with {code}: {run_dir}/{part}.out")


def _one_run(folder: Path, part: str, number: int, pause: Path | None) -> None:
    chance, run_dir, kind = random.Random(number), folder / f"run_{number:04d}", number // 2 % 4
    shutil.rmtree(run_dir, ignore_errors=True)
    run_dir.mkdir(parents=True)
    if part == "rl":
        (run_dir / "sft").symlink_to((folder / "undisturbed/sft").resolve())
    scratch = folder / "tmp" / f"run_{number:04d}"
    launcher = "torchrun" if kind == 3 else "megarl"
    run = kills.Run(_command(folder, part, run_dir, torchrun=99 if kind == 3 else 0), run_dir / part, scratch)
    done, waits, started, step = [], [], time.monotonic(), 1
    for _ in range(KILLS_PER_RUN):
        phase, rank, delay = kills.choose(chance, PHASES[part])
        if kind == 1 and chance.random() < 0.3:  # the launcher too may be killed: then a person starts it again
            rank = -1
        kill = _kill(run, phase, step, rank, delay, pause)
        if kill is None:
            break
        place, back = kill.place, time.monotonic()
        step = max(step, int(place.split(" step ")[1].split(",")[0]) if " step " in place else 1)
        done.append([kill.target, place])
        if rank == -1:
            run.process.wait()
            while any(kills.is_running(process) for process in run.processes()):
                time.sleep(0.05)
            run.command = _command(folder, part, run_dir, torchrun=0, resume=True)
            run.start()
        if " step " in place:
            waits.append(_back(run, place, back, pause))
    code = _wait(run, pause)
    left = [str(p) for p in run.processes()] + [p.name for p in scratch.iterdir() if launcher == "megarl"]
    run.close()
    unequal = kills.differences(run_dir / part, folder / "undisturbed" / part) if code == 0 else [f"exit code {code}"]
    row = {
        "part": part, "launcher": launcher, "kills": done, "seconds": round(time.monotonic() - started, 1),
        "seconds_until_back": [round(wait, 1) for wait in waits], "differences": unequal, "left": left,
        "date": str(date.today()),
    }  # fmt: skip
    with RECORD.open("a") as record:
        record.write(json.dumps(row) + "\n")
    if not unequal and not left:
        shutil.rmtree(run_dir)
        shutil.rmtree(scratch)


def _command(folder: Path, part: str, run_dir: Path, torchrun: int, resume: bool = False) -> list[str]:
    own = [f"run_dir={run_dir}", f"model.path={folder / 'model'}", *COMMON, *SETTINGS[part]]
    own += ["resume=auto"] if resume else []
    own += [] if torchrun else ["parallel.max_restarts=99"]
    return kills.command(part, CONFIG, own, torchrun)


def _kill(run: kills.Run, phase: str, step: int, rank: int, delay: float, pause: Path | None) -> kills.Kill | None:
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline and run.process.poll() is None:
        _pause(run, pause)
        kill = kills.kill_at(run, phase, step, max(rank, 0), delay, timeout=5) if rank >= 0 else None
        if rank < 0 and kills.wait_until(run, kills.re.compile(rf", {phase}$"), 0, timeout=5):
            time.sleep(delay)
            kill = kills.Kill("launcher", run.place(0), "SIGKILL")
            run.process.kill()
        if kill is not None:
            return kill
    return None


def _back(run: kills.Run, place: str, since: float, pause: Path | None) -> float:
    """Seconds from a kill until rank 0 is as far as the killed rank was."""
    wanted = int(place.split(" step ")[1].split(",")[0])
    while run.process.poll() is None and time.monotonic() - since < TIMEOUT:
        _pause(run, pause)
        found = kills.re.search(r" step (\d+),", run.place(0))
        if found and int(found[1]) >= wanted and run.rank(0) is not None and time.monotonic() - since > 1:
            break
        time.sleep(0.1)
    return time.monotonic() - since


def _wait(run: kills.Run, pause: Path | None) -> int:
    deadline = time.monotonic() + TIMEOUT
    while run.process.poll() is None and time.monotonic() < deadline:
        _pause(run, pause)
        time.sleep(0.2)
    return run.process.poll() if run.process.poll() is not None else 124


def _pause(run: kills.Run, pause: Path | None) -> None:
    if pause is None or not pause.exists():
        return
    stopped = run.processes()
    for process in stopped:
        _signal(process, signal.SIGSTOP)
    while pause.exists():
        time.sleep(0.5)
    for process in stopped:
        _signal(process, signal.SIGCONT)


def _signal(process: int, number: signal.Signals) -> None:
    try:
        os.kill(process, number)
    except ProcessLookupError:
        pass


def _recorded() -> list[dict]:
    return [json.loads(line) for line in RECORD.read_text().splitlines()] if RECORD.exists() else []


def _write_table() -> None:
    runs = _recorded()
    lines = ["# Kills", "", __doc__.splitlines()[0].replace("What `tools/soak.sh` runs: k", "K"), ""]
    lines[2] = (
        "`tools/soak.sh`: quickstart runs (12 SFT steps, or 6 RL steps with evaluations), whose ranks, or launcher, are "
        "ended by SIGKILL at random moments and come back by themselves; then metrics, rollouts, exported weights and the "
        "last checkpoint (weights, optimizer, state) are compared, bit for bit, with a run that nobody disturbed. "
        f"{runs[0]['date']} to {runs[-1]['date']}, two cores of an AMD EPYC, shared with other work."
    )
    waits = sorted(wait for run in runs for wait in run["seconds_until_back"])
    bad = [run for run in runs if run["differences"] or run["left"]]
    lines += ["| | sft | rl | together |", "|---|---|---|---|"]
    for name, count in (
        ("runs", lambda some: len(some)),
        ("of these under torchrun --max-restarts", lambda some: sum(run["launcher"] == "torchrun" for run in some)),
        ("kills", lambda some: sum(len(run["kills"]) for run in some)),
        ("of the launcher", lambda some: sum(kill[0] == "launcher" for run in some for kill in run["kills"])),
        ("runs that did not end like the undisturbed one", lambda some: sum(bool(run["differences"]) for run in some)),
        ("runs that left a process or a temporary file", lambda some: sum(bool(run["left"]) for run in some)),
    ):
        some = [[run for run in runs if run["part"] == part] for part in ("sft", "rl")]
        lines.append(f"| {name} | {count(some[0])} | {count(some[1])} | {count(runs)} |")
    if waits:
        lines += ["", f"Seconds from a kill until the run was in that step again: median {waits[len(waits) // 2]:.0f}, "
                  f"longest {waits[-1]:.0f}."]  # fmt: skip
    lines += ["", "| killed in | kills |", "|---|---|"]
    places = Counter(
        f"{run['part']}, {kill[1].rpartition(', ')[2] or 'before the first word'}"
        for run in runs
        for kill in run["kills"]
    )
    lines += [f"| {place} | {count} |" for place, count in sorted(places.items())]
    lines += ["", *(f"- run {runs.index(run)}, {run['part']}: {run['differences'] or run['left']}" for run in bad)]
    TABLE.write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
