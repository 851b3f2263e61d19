"""What `tools/soak.sh` runs: kills at random moments, counted over all its invocations."""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
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
    "warm": [],  # the quickstart's SFT, whole: RL from weights that solve nothing would have no gradient to lose
    "sft": ["sft.steps=12", "sft.stop_at_loss=none"],
    "rl": ["rl.steps=6", "eval.every=3", "eval.data.0.size=400"],
}
PHASES = {
    "sft": ["start", "data", "update", "update", "checkpoint", "checkpoint", "between phases"],
    "rl": ["start", "generate", "reward", "gather", "prepare", "routing", "old_log_probs", "update", "update", "sync", "eval",
           "checkpoint", "checkpoint", "between phases"],
}  # fmt: skip
KILLS_PER_RUN = 10
FOUND = [
    "- 2026-11-29: ranks that torchrun had started again read the addresses of the ranks before them in torchrun's store, "
    "which lives as long as torchrun, and waited for them for ever (`megarl/parallel.py`; a test: "
    "`test_ranks_that_torchrun_starts_again_meet_each_other`). Both of the first two runs under torchrun hung.",
]
SAVES = ["checkpoint.async_save=false", "checkpoint.async_save=true"]
TIMEOUT = 240.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="stop when so many are recorded in all")
    parser.add_argument("--parts", default="sft,rl")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/soak")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run after so many")
    args = parser.parse_args()
    parts, started = args.parts.split(","), time.monotonic()
    for part in ["warm", *parts] if "rl" in parts else parts:
        _reference(args.folder, part)
    while sum(len(run["kills"]) for run in _recorded()) < args.kills and time.monotonic() - started < 60 * args.minutes:
        number = len(_recorded())
        _one_run(args.folder, parts[number % len(parts)], number)
        _write_table()


def _reference(folder: Path, part: str) -> None:
    """The run that nobody disturbs; RL, disturbed or not, starts from the whole SFT in `warm`."""
    run_dir, section = folder / part, "sft" if part == "warm" else part
    if (run_dir / section / "hf").is_dir():
        return
    shutil.rmtree(run_dir, ignore_errors=True)
    _make(run_dir, folder, part)
    run = kills.Run(_command(folder, part, run_dir, "megarl"), run_dir / section, folder / "tmp")
    code = _wait(run)
    run.close()
    if code:
        raise SystemExit(f"the undisturbed {part} run ended with {code}: {run_dir}/{section}.out")


def _make(run_dir: Path, folder: Path, part: str) -> None:
    run_dir.mkdir(parents=True)
    if part == "rl":
        (run_dir / "sft").symlink_to((folder / "warm/sft").resolve())


def _one_run(folder: Path, part: str, number: int) -> None:
    chance, run_dir = random.Random(f"run {number}"), folder / f"run_{number:04d}"
    for leftover in (run_dir, folder / "tmp" / f"run_{number:04d}"):  # of a soak that was stopped
        shutil.rmtree(leftover, ignore_errors=True)
    _make(run_dir, folder, part)
    scratch, save = folder / "tmp" / f"run_{number:04d}", chance.choice(SAVES)
    launcher = chance.choices(("forks", "megarl", "torchrun"), (14, 1, 1))[0]
    if part == "rl" and launcher == "forks":  # vLLM, imported before a rank is, replaces what Megatron is patched with
        launcher = "megarl"
    run = kills.Run(_command(folder, part, run_dir, launcher, save), run_dir / part, scratch)
    done, waits, started, step = [], [], time.monotonic(), 1
    for _ in range(KILLS_PER_RUN):
        phase, rank, delay = kills.choose(chance, PHASES[part])
        if launcher != "torchrun" and chance.random() < 0.05:  # the launcher too may be killed: then a person starts it again
            rank = -1
        kill = _kill(run, phase, step, rank, delay)
        if kill is None:
            break
        place, back = kill.place, time.monotonic()
        step = max(step, int(place.split(" step ")[1].split(",")[0]) if " step " in place else 1)
        done.append([kill.target, place])
        if rank == -1:
            run.process.wait()
            while any(kills.is_running(process) for process in run.processes()):
                time.sleep(0.05)
            run.command = _command(folder, part, run_dir, launcher, save, "resume=auto")
            run.start()
        if " step " in place and launcher != "torchrun":  # which leaves the places of the ranks before
            waits.append(_back(run, place, back))
    code = _wait(run)
    left = [str(p) for p in run.processes()] + [p.name for p in scratch.iterdir() if launcher != "torchrun"]
    run.close()
    unequal = kills.differences(run_dir / part, folder / part / part) if code == 0 else [f"exit code {code}"]
    row = {
        "part": part, "launcher": launcher, "async": save == SAVES[1], "kills": done,
        "seconds": round(time.monotonic() - started, 1),
        "seconds_until_back": [round(wait, 1) for wait in waits], "differences": unequal, "left": left,
        "date": str(date.today()),
    }  # fmt: skip
    with RECORD.open("a") as record:
        record.write(json.dumps(row) + "\n")
    if not unequal and not left:
        shutil.rmtree(run_dir)
        shutil.rmtree(scratch)


def _command(folder: Path, part: str, run_dir: Path, launcher: str, *more: str) -> list[str]:
    own = [f"run_dir={run_dir}", f"model.path={folder / 'model'}", *COMMON, *SETTINGS[part], *more]
    own += ["parallel.max_restarts=99"] if launcher != "torchrun" else []
    section, restarts = "sft" if part == "warm" else part, 99 if launcher == "torchrun" else 0
    return kills.command(section, CONFIG, own, restarts, warm=launcher == "forks")


def _kill(run: kills.Run, phase: str, step: int, rank: int, delay: float) -> kills.Kill | None:
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline and run.process.poll() is None:
        kill = kills.kill_at(run, phase, step, max(rank, 0), delay, timeout=5) if rank >= 0 else None
        if rank < 0 and kills.wait_until(run, kills.re.compile(rf", {phase}$"), 0, timeout=5):
            time.sleep(delay)
            kill = kills.Kill("launcher", run.place(0), "SIGKILL")
            run.process.kill()
        if kill is not None:
            return kill
    return None


def _back(run: kills.Run, place: str, since: float) -> float:
    """Seconds from a kill until rank 0 is as far as the killed rank was."""
    wanted = int(place.split(" step ")[1].split(",")[0])
    while run.process.poll() is None and time.monotonic() - since < TIMEOUT:
        found = kills.re.search(r" step (\d+),", run.place(0))
        if found and int(found[1]) >= wanted and run.rank(0) is not None and time.monotonic() - since > 1:
            break
        time.sleep(0.1)
    return time.monotonic() - since


def _wait(run: kills.Run) -> int:
    deadline = time.monotonic() + TIMEOUT
    while run.process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    return run.process.poll() if run.process.poll() is not None else 124


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
        ("of these with ranks that are forks of a warm launcher", lambda some: sum(run["launcher"] == "forks" for run in some)),
        ("of these with asynchronous saves", lambda some: sum(run["async"] for run in some)),
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
    lines += ["", "## Found and fixed", "", *FOUND]
    lines += ["", *(f"- run {runs.index(run)}, {run['part']}: {run['differences'] or run['left']}" for run in bad)]
    TABLE.write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
