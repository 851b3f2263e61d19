"""Step time of megarl against TRL's GRPOTrainer, taken in turns within one call.

    .venv/bin/python tools/bench/vs_trl.py --model all --rounds 10

Same random Qwen3-MoE, prompts, sampling, reward, loss (GSPO), optimizer and learning rate; 128 samples of up to 64 new
tokens in groups of 8, one optimizer step per rollout, float32, two cores. Both sides are started and warmed up first;
then they step in turns (A B A B), each stopped while the other one runs, and the clock of this script, from "go" to
the answer of the last rank, is the step time of both. TRL runs as one process with two threads and as two processes
with one thread: the faster of the two in the warm-up gives the figures.

`--sweep` compares settings of TRL alone, in turns too: where `TRL_FASTEST` comes from.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from turns import ANSWER_FD

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
VENV = ROOT / ".venv-trl"
WORK = ROOT / "runs" / "bench" / "vs_trl"
REQUIREMENTS = HERE / "requirements-trl.txt"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
MODELS = ("1m", "20m")
CORES = 2
BUSY_CORES = 0.2

COMMON = {"samples": 128, "group": 8, "max_tokens": 64, "lr": 1e-5, "seed": 1}
CLIP, BETA2, CLIP_GRAD = (3e-4, 4e-4), 0.95, 1.0
DEFAULT = {"processes": 2, "threads": 1, "micro_batch": 64, "experts": "grouped_mm", "cache": None}
DEFAULT |= {"continuous": None, "compile": False, "env": {}}
# by default transformers takes most of the free memory for its cache, on every rank
SMALL_CACHE = {"page_size": 32, "num_blocks": 256, "max_batch_tokens": 512, "allow_block_sharing": False}
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
# the fastest of `--sweep`, results/vs_trl.md
TRL_FASTEST = {size: {"micro_batch": 32, "env": KEEP_MEMORY} for size in MODELS}
SWEEP = {
    "micro-batch 64": {"micro_batch": 64},
    "micro-batch 32": {"micro_batch": 32},
    "micro-batch 16": {"micro_batch": 16},
    "1 process, 2 threads, micro-batch 128": {"processes": 1, "threads": 2, "micro_batch": 128},
    "1 process, 2 threads, micro-batch 32": {"processes": 1, "threads": 2, "micro_batch": 32},
    "static cache": {"cache": "static"},
    "continuous batching": {"continuous": SMALL_CACHE},
    "looped experts": {"experts": "eager"},
    "torch.compile": {"compile": True},
    "malloc that keeps memory": {"env": KEEP_MEMORY},
}


class BenchFailed(Exception):
    """One line for the user; exit code 1."""


def run_quietly(what: str, command: list[str], log: Path) -> None:
    with log.open("a") as file:
        if subprocess.run(command, check=False, stdout=file, stderr=subprocess.STDOUT).returncode:
            raise BenchFailed(f"{what} failed; see {log}")


def ensure_venv() -> Path:
    """Python of the environment TRL runs in, made on the first call; the packages are pinned and complete."""
    python, stamp = VENV / "bin" / "python", VENV / "requirements.sha256"
    wanted = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    print(f"making {VENV.name} (TRL and its closure, 1.5 GB)", flush=True)
    WORK.mkdir(parents=True, exist_ok=True)
    log = WORK / "install.log"
    run_quietly("making the environment", [sys.executable, "-m", "venv", "--clear", str(VENV)], log)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--no-deps"]
    run_quietly("installing TRL", [*pip, "-r", str(REQUIREMENTS)], log)
    is_cpu_build = [str(python), "-c", "import torch; raise SystemExit(torch.version.cuda is not None)"]
    if subprocess.run(is_cpu_build, check=False).returncode:
        torch = next(line for line in REQUIREMENTS.read_text().splitlines() if line.startswith("torch=="))
        command = [*pip, "--force-reinstall", "--index-url", TORCH_CPU_INDEX, torch]
        run_quietly("installing the CPU build of torch", command, log)
        run_quietly("the CPU build of torch", is_cpu_build, log)
    stamp.write_text(wanted)
    return python


def ensure_model(size: str, python: Path) -> Path:
    out = WORK / size
    if not (out / "parameters.json").exists():  # written last
        WORK.mkdir(parents=True, exist_ok=True)
        run_quietly(
            "making the model", [str(python), str(HERE / "make_model.py"), size, str(out)], WORK / "install.log"
        )
    return out


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def cpu_seconds(session: int) -> float:
    """CPU time used so far by all living processes of a session."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # ended meanwhile
        if int(fields[3]) == session:
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


class Side:
    """The ranks of one competitor, stopped (SIGSTOP) between their turns."""

    def __init__(self, name: str, command: list[str], processes: int, threads: int, env: dict[str, str], log: Path):
        self.name, self.log, self.turns = name, log, []
        shared = {**os.environ, **env, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        shared |= {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
        if processes > 1:
            shared |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
            shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
        self.ranks, self.answers = [], []
        with log.open("w") as output:
            for rank in range(processes):
                own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else shared
                read, write = os.pipe()
                process = subprocess.Popen(
                    command,
                    env={**own, ANSWER_FD: str(write)},
                    cwd=ROOT,
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=output,
                    text=True,
                    pass_fds=(write,),
                    start_new_session=True,  # so that everything a rank started can be counted and ended with it
                )
                os.close(write)
                self.ranks.append(process)
                self.answers.append(os.fdopen(read))

    def _answers(self) -> list[dict]:
        lines = [answers.readline() for answers in self.answers]
        if not all(lines):
            raise BenchFailed(f"{self.name}: a rank ended; see {self.log}")
        return [json.loads(line) for line in lines]

    def wait_ready(self) -> None:
        self._answers()
        self._signal(signal.SIGSTOP)

    def _signal(self, number: signal.Signals) -> None:
        for rank in self.ranks:
            with suppress(ProcessLookupError):
                os.killpg(rank.pid, number)

    def turn(self) -> dict:
        self._signal(signal.SIGCONT)
        start = time.perf_counter()
        with suppress(BrokenPipeError):  # the missing answer then says it
            for rank in self.ranks:
                rank.stdin.write("go\n")
                rank.stdin.flush()
        answers = self._answers()
        seconds = time.perf_counter() - start
        self._signal(signal.SIGSTOP)  # also the threads of its process groups, which poll
        phases = {key: statistics.mean(a["phases"][key] for a in answers) for key in answers[0]["phases"]}
        return {"seconds": seconds, "tokens": sum(a["tokens"] for a in answers), "phases": phases}

    def cpu_seconds(self) -> float:
        return sum(cpu_seconds(rank.pid) for rank in self.ranks)

    def median(self) -> float:
        return statistics.median(turn["seconds"] for turn in self.turns)

    def mean(self, key: str) -> float:
        return statistics.mean(turn[key] for turn in self.turns)

    def close(self) -> None:
        self._signal(signal.SIGCONT)
        for rank in self.ranks:
            with suppress(BrokenPipeError):
                rank.stdin.close()
        deadline = time.monotonic() + 15
        for rank in self.ranks:
            with suppress(subprocess.TimeoutExpired):
                rank.wait(max(0.1, deadline - time.monotonic()))
        self._signal(signal.SIGKILL)  # also what the ranks left behind
        for rank in self.ranks:
            rank.wait()


@contextmanager
def started(sides: list[Side]) -> Iterator[list[Side]]:
    with ExitStack() as stack:
        for side in sides:
            stack.callback(side.close)
        for side in sides:
            side.wait_ready()
        yield sides


def trl_side(name: str, model: Path, python: Path, changes: dict) -> Side:
    shared = {**COMMON, "clip": CLIP, "beta2": BETA2, "clip_grad": CLIP_GRAD}
    shared |= {"model": str(model), "prompts": str(model / "prompts.jsonl")}
    settings = {**DEFAULT, **shared, **changes}
    label = "".join(c if c.isalnum() else "-" for c in name)
    settings["out"] = str(WORK / f"out-{label}")
    command = [str(python), str(HERE / "trl_side.py"), json.dumps(settings)]
    log = WORK / f"{model.name}-{label}.log"
    return Side(name, command, settings["processes"], settings["threads"], settings["env"], log)


def megarl_config(model: Path, out: Path, ep: int) -> dict:
    prompts = COMMON["samples"] // COMMON["group"]
    optimizer = {"lr": COMMON["lr"], "schedule": "constant", "betas": [0.9, BETA2], "clip_grad": CLIP_GRAD}
    return {
        "seed": COMMON["seed"],
        "run_dir": str(out),
        "model": {"path": str(model), "dtype": "float32"},
        "parallel": {"nproc": CORES, "ep": ep, "distributed_optimizer": False},
        "rl": {
            "init_from": "model",
            "data": [{"type": "jsonl", "path": str(model / "prompts.jsonl")}],
            "algorithm": {"preset": "gspo", "gate": {"type": "clip", "low": CLIP[0], "high": CLIP[1]}},
            "steps": 1_000_000,
            "prompts_per_step": prompts,
            "samples_per_prompt": COMMON["group"],
            "optimizer_steps_per_rollout": 1,
            "optimizer": optimizer,
        },
        "rollout": {"max_response_tokens": COMMON["max_tokens"], "temperature": 1.0, "max_context": 128},
        "reward": {"type": "turns:distinct_characters"},
        "checkpoint": {"every": 0},
        "log": {"tensorboard": False, "rollouts_every": 0, "routing_tokens": 0},  # TRL does not measure routing
    }


def megarl_side(model: Path, ep: int) -> Side:
    out = WORK / f"out-megarl-{model.name}"
    shutil.rmtree(out, ignore_errors=True)
    config = WORK / f"{model.name}-megarl.yaml"
    config.write_text(json.dumps(megarl_config(model, out, ep), indent=1))  # JSON is YAML
    command = [sys.executable, str(HERE / "megarl_side.py"), str(config)]
    env = {"PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}"}  # the reward's workers import it by name
    return Side(f"megarl, 2 ranks, ep={ep}", command, CORES, 1, env, WORK / f"{model.name}-megarl.log")


def busy_seconds() -> float:
    """CPU time used so far on this machine, by anything."""
    user, nice, system, _idle, _iowait, *interrupts = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    return sum(map(int, (user, nice, system, *interrupts))) / os.sysconf("SC_CLK_TCK")


def take_turns(sides: list[Side], rounds: int, keep: bool = True) -> None:
    for _ in range(rounds):
        for side in sides:
            own, all_of_it = side.cpu_seconds(), busy_seconds()
            turn = side.turn()
            turn["cpu"] = side.cpu_seconds() - own
            turn["others"] = max(0.0, busy_seconds() - all_of_it - turn["cpu"]) / turn["seconds"]
            if keep:
                side.turns.append(turn)


def describe(side: Side) -> str:
    times = [turn["seconds"] for turn in side.turns]
    phases = {k: statistics.median(turn["phases"][k] for turn in side.turns) for k in side.turns[0]["phases"]}
    return (
        f"{side.name}: median {side.median():.2f} s a step ({min(times):.2f} to {max(times):.2f}, {len(times)} steps), "
        f"{side.mean('tokens'):.0f} tokens a step\n"
        f"  {'  '.join(f'{name} {seconds:.2f}' for name, seconds in phases.items())}   (s, median; mean of the ranks)\n"
        f"  {side.mean('cpu'):.2f} s of CPU time a step; other processes used {side.mean('others'):.2f} cores"
    )


def print_ratio(title: str, a: Side, b: Side) -> None:
    """Step time of `a` over that of `b`: the median over the rounds is the last line."""
    ratios = [x["seconds"] / y["seconds"] for x, y in zip(a.turns, b.turns, strict=True)]
    print(f"rounds {min(ratios):.2f} to {max(ratios):.2f}; CPU time {a.mean('cpu') / b.mean('cpu'):.2f}")
    if max(a.mean("others"), b.mean("others")) > BUSY_CORES:
        print("warning: the machine was busy with other work, do not believe the step times")
    print(f"ratio {title}: {statistics.median(ratios):.2f}", flush=True)


def compare(size: str, rounds: int, warm_up: int, python: Path, ep: int, processes: tuple[int, ...]) -> None:
    model = ensure_model(size, python)
    parameters = json.loads((model / "parameters.json").read_text())["parameters"]
    print(f"\n{size}: {parameters:,} parameters, {COMMON['samples']} samples of up to {COMMON['max_tokens']} tokens")
    fastest = TRL_FASTEST[size]
    trl = []
    for n in processes:
        layout = {"processes": n, "threads": CORES // n}
        trl.append(trl_side(f"TRL, processes x threads = {n} x {CORES // n}", model, python, {**fastest, **layout}))
    with started([megarl_side(model, ep), *trl]) as sides:
        take_turns(sides, 1, keep=False)
        take_turns(sides, warm_up)
        chosen = min(trl, key=Side.median)
        print("  ".join(f"{side.name}: {side.median():.2f} s" for side in sides), "(warm-up)", flush=True)
        for side in sides:
            side.turns.clear()
        contestants = [sides[0], chosen]
        take_turns(contestants, rounds)
    for side in contestants:
        print(describe(side))
    print_ratio(f"megarl/TRL {size}", *contestants)


def sweep(size: str, rounds: int, python: Path, names: list[str]) -> None:
    """Settings of TRL against its default here, a pair at a time: the machine drifts too much for one long list."""
    model = ensure_model(size, python)
    for name in names:
        changed = {**TRL_FASTEST[size], **SWEEP[name]}
        pair = [trl_side("base", model, python, TRL_FASTEST[size]), trl_side(name, model, python, changed)]
        try:
            with started(pair):
                take_turns(pair, 1, keep=False)
                take_turns(pair, rounds)
            print("\n".join(map(describe, pair)))
            print_ratio(f"{name}/base {size}", pair[1], pair[0])
        except BenchFailed as error:
            print(f"{size} {name}: {error}", flush=True)


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of rounds; give 1 or more")
    return int(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*MODELS, "all"], default="all")
    parser.add_argument("--rounds", type=positive, default=10, help="measured steps of each side (default 10)")
    parser.add_argument("--warm-up", type=positive, default=2, help="rounds that choose TRL's processes (default 2)")
    parser.add_argument(
        "--ep", type=int, choices=(1, 2), default=1, help="expert parallel degree of megarl (default 1)"
    )
    parser.add_argument(
        "--trl-processes",
        choices=("1", "2", "both"),
        default="both",
        help="of TRL: 1 (two threads), 2 (one thread each), or the faster of both (default); 1 needs an idle machine",
    )
    parser.add_argument("--sweep", nargs="*", choices=[*SWEEP], metavar="SETTING", help="compare settings of TRL alone")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))  # both close the sides
    processes = (2, 1) if arguments.trl_processes == "both" else (int(arguments.trl_processes),)
    try:
        python = ensure_venv()
        for size in MODELS if arguments.model == "all" else [arguments.model]:
            if arguments.sweep is not None:
                sweep(size, arguments.rounds, python, arguments.sweep or [*SWEEP])
            else:
                compare(size, arguments.rounds, arguments.warm_up, python, arguments.ep, processes)
    except BenchFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
