"""`megarl verify resume`: a run that is stopped and resumed at every step boundary against one that never stops, bit by bit."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megarl.config import dump_config
from megarl.config.schema import Config, DataSource
from megarl.errors import BadInput, RunFailed
from megarl.rewards.functions import by_checksum
from megarl.rewards.registry import MODEL

# what differs between two runs that compute the same: clocks, memory, and rates made of them
CLOCKS = ("unix_time", "clock/", "time/", "throughput/", "memory/", "sync/seconds", "sync/move_seconds")
CLOCKS += ("sync/gb_per_second", "sync/of_plain_copy")
PARTS = {"sft": "sft", "reward_model": "reward-model", "rl": "train"}  # sections and their commands, in order
STEPS = 3
LARGEST = 100_000_000  # parameters of a model that is trained itself
STOPPED = (129, 130, 143)  # by SIGHUP, Ctrl-C, SIGTERM
# of what takes long, no more than this
SMALLER = {"batch_size": 16, "prompts_per_step": 8, "samples_per_prompt": 4, "optimizer_steps_per_rollout": 2}
MOST_TOKENS = 16  # of a response
SMALL_MODEL = {"num_layers": 4, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32}
SMALL_MODEL |= {"num_experts": 8, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32, "top_k": 4}
REWARD = f"{by_checksum.__module__}:{by_checksum.__name__}"
ROWS = 40  # of generated data, so that an epoch ends within the steps


@dataclass(frozen=True)
class Arm:
    """One of the two runs: its project, and how many steps a start of it takes (None: all)."""

    folder: Path
    steps: int | None

    def part(self, name: str) -> Path:
        return self.folder / "run" / name


def verify_resume(cfg: Config, steps: int = STEPS, command: Sequence[str] = (sys.executable, "-m", "megarl")) -> None:
    """Run every part of the config for `steps` steps twice, once without a stop and once with one after each step, and
    compare weights, optimizer state, everything else of the last checkpoint, metrics and trajectories; printed.

    A part runs on smaller batches, in place of a large model on a random one of its kind, and with a reward that tells the
    responses of a model apart that has learned nothing: equal ones would have no gradient. Raises BadInput when the
    config has no part to run, RunFailed at the first difference or when a run fails; the runs are then kept.
    """
    parts = [name for name in PARTS if getattr(cfg, name) is not None]
    if not parts:
        raise BadInput("nothing to resume: the config has none of the sections sft, reward_model and rl")
    if steps < 2:
        raise BadInput(f"--steps {steps}: a run of at least 2 steps can be resumed")
    scratch = Path(tempfile.mkdtemp(prefix="megarl-resume-"))
    try:
        small, title = _smaller(cfg, steps, scratch)
        print(f"{title}; {steps} steps, resumed in a new process after each", flush=True)
        arms = [Arm(scratch / "straight", None), Arm(scratch / "stopped", 1)]
        for arm in arms:
            arm.folder.mkdir()
            for name in parts:
                for start in range(steps if arm.steps else 1):
                    _run(small, arm, name, start, command)
                print(f"{name}: {'stopped and resumed' if arm.steps else 'without a stop'}", flush=True)
        for name in parts:  # imports torch: after all runs
            print(f"{name}: equal: {_compare(*(arm.part(name) for arm in arms))}", flush=True)
    finally:
        if sys.exc_info()[0] is not RunFailed:  # the runs say more
            shutil.rmtree(scratch)
    print("stopped and resumed is bit-identical to not stopped")


def _run(cfg: Config, arm: Arm, part: str, start: int, command: Sequence[str]) -> None:
    """One start of one part: a command of its own."""
    every = {"every": 0, "keep": 1, "stop_after": arm.steps}
    changes = {"run_dir": str(arm.folder / "run"), "checkpoint": cfg.checkpoint.model_copy(update=every)}
    changes["resume"] = "auto" if start else "never"
    file = arm.folder / f"{part}_{start}.yaml"
    file.write_text(dump_config(cfg.model_copy(update=changes)))
    log, words = file.with_suffix(".log"), [*command, PARTS[part], str(file)]
    with log.open("w") as out:
        pipes = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": subprocess.PIPE}
        done = subprocess.run(words, text=True, check=False, **pipes)
    if done.returncode in STOPPED:
        raise SystemExit(done.returncode)
    if done.returncode:
        line = (done.stderr.strip().splitlines() or ["no word"])[-1].removeprefix("error: ")
        if done.returncode == 2:
            raise BadInput(f"verify resume: megarl {PARTS[part]}: {line}")
        raise RunFailed(f"verify resume: megarl {PARTS[part]}: {line} (output: {log})")


def _smaller(cfg: Config, steps: int, scratch: Path) -> tuple[Config, str]:
    """The config on `steps` steps of small batches, and what is said of its model."""
    changes: dict[str, Any] = {"eval": cfg.eval.model_copy(update={"data": [], "every": 0}), "study": None}
    for name in PARTS:
        section = getattr(cfg, name)
        if section is not None:
            fields = {field: getattr(section, field) for field in type(section).model_fields}
            least = {field: min(most, fields[field]) for field, most in SMALLER.items() if field in fields}
            data = {field: _fewer(fields[field]) for field in ("data", "validation") if field in fields}
            changes[name] = section.model_copy(update=least | data | {"steps": steps})
    longest = min(MOST_TOKENS, cfg.rollout.max_response_tokens)
    changes["rollout"] = cfg.rollout.model_copy(update={"max_response_tokens": longest})
    quiet = {"tensorboard": False, "wandb": None, "rollouts_every": 1, "profile_steps": []}
    changes["log"] = cfg.log.model_copy(update=quiet)
    changes["export"] = cfg.export.model_copy(update={"every": 0})
    if cfg.reward.type != MODEL:
        other = {"type": REWARD, "params": {}}
        named = {name: one.model_copy(update=other) for name, one in cfg.reward.named.items()}
        changes["reward"] = cfg.reward.model_copy(update=other | {"named": named})
    model, title = _model(cfg, scratch)
    return cfg.model_copy(update=changes | {"model": model}), title


def _fewer(sources: list[DataSource]) -> list[DataSource]:
    return [source.model_copy(update={"size": min(ROWS, source.size)}) for source in sources]


def _model(cfg: Config, scratch: Path) -> tuple[Any, str]:
    """The model section to run with: the config's, or a small one of its kind with its tokenizer."""
    from megarl.convert import family, read_spec
    from megarl.convert.hf_io import copy_side_files
    from megarl.models.generate import spec_of
    from megarl.verify.layouts.model import shrunken, write_checkpoint

    path = Path(cfg.model.path)
    spec = read_spec(path) if (path / "config.json").exists() else spec_of(cfg.model.generate)
    parameters = sum(math.prod(shape) for shape in family(spec.family).hf_shapes(spec).values())
    if parameters <= LARGEST:
        return cfg.model, f"{path}: {parameters / 1e6:.1f}M parameters"
    if not (path / "config.json").exists():
        generate = cfg.model.generate
        fewer = {name: min(most, getattr(generate, name)) for name, most in SMALL_MODEL.items()}
        changed = {"path": str(scratch / "model"), "generate": generate.model_copy(update=fewer)}
        title = f"{path}: {parameters / 1e9:.1f}B parameters are too many here; fewer in their place"
        return cfg.model.model_copy(update=changed), title
    small = replace(shrunken(cfg), vocab_size=spec.vocab_size, max_position_embeddings=spec.max_position_embeddings)
    if not spec.kv_lora_rank:  # a head that vLLM serves on a CPU
        small = replace(small, head_dim=32, rope=replace(small.rope, width=2 * small.rope.width))
    write_checkpoint(scratch / "model", small, cfg.seed)
    own = (scratch / "model" / "config.json").read_bytes()
    copy_side_files(path, scratch / "model")
    (scratch / "model" / "config.json").write_bytes(own)
    kind = f"a random {spec.family} of {small.num_layers} layers, hidden {small.hidden_size}"
    title = f"{path}: {parameters / 1e9:.1f}B parameters are too many here; {kind} in its place"
    return cfg.model.model_copy(update={"path": str(scratch / "model"), "generate": None}), title


def _compare(straight: Path, stopped: Path) -> str:
    """How much is equal. Raises RunFailed with the first difference."""
    rows, again = (_rows(folder / "metrics.jsonl") for folder in (straight, stopped))
    _expect("steps", [row["step"] for row in rows], [row["step"] for row in again], stopped)
    for row, other in zip(rows, again, strict=True):
        for name in sorted(row.keys() | other.keys()):
            _expect(f"step {row['step']}: {name}", row.get(name), other.get(name), stopped)
    files = sorted(path.name for path in (straight / "rollouts").glob("*.jsonl"))
    for name in files:
        mine, other = (_rows(folder / "rollouts" / name) for folder in (straight, stopped))
        _expect(f"rollouts/{name}", mine, other, stopped)
    last = [max((folder / "checkpoints").glob("step_*")) for folder in (straight, stopped)]
    states = [json.loads((path / "state.json").read_text()) for path in last]
    for state in states:
        state["owners"].pop("clock")
        state.pop("config")
    _expect("state.json", *states, stopped)
    count = 0
    for name, mine, other in _tensors(*(path / "shards" for path in last)):
        count += 1
        if mine != other:
            raise RunFailed(f"verify resume: after the last step {name} differs: {straight} and {stopped}")
    what = (
        f"{len(rows)} steps of metrics, {count} tensors of weights and optimizer, random generators and data position"
    )
    return what + (f", {len(files)} files of trajectories" if files else "")


def _rows(file: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith(CLOCKS)} for row in rows]


def _expect(what: str, mine: Any, other: Any, where: Path) -> None:
    """Raises RunFailed with the first leaf in which two JSON values differ."""
    if mine == other:
        return
    if isinstance(mine, dict) and isinstance(other, dict) and mine.keys() == other.keys():
        for key in mine:
            _expect(f"{what}: {key}", mine[key], other[key], where)
    if isinstance(mine, list) and isinstance(other, list) and len(mine) == len(other):
        for number, (a, b) in enumerate(zip(mine, other, strict=True)):
            _expect(f"{what}[{number}]", a, b, where)
    raise RunFailed(
        f"verify resume: {what}: {mine!r:.80} without a stop, {other!r:.80} resumed (runs: {where.parents[2]})"
    )


def _tensors(straight: Path, stopped: Path) -> Iterator[tuple[str, Any, Any]]:
    """(name, one's, the other's) shape, kind and bytes of every tensor in two checkpoints' shards, whole.

    Raises RunFailed where their other values, such as those of parameter groups, differ.
    """
    from megarl import platform

    platform.setup()
    import torch
    from megatron.core import dist_checkpointing, parallel_state

    from megarl.config.schema import Parallel
    from megarl.parallel import Mesh

    Mesh.build(Parallel())
    try:
        mine, other = (dict(_values(dist_checkpointing.load_plain_tensors(str(folder)))) for folder in (straight, stopped))
    finally:  # the next part is compared in a world of its own
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
    if mine.keys() != other.keys():
        raise RunFailed(f"verify resume: the checkpoints hold other tensors: {sorted(mine.keys() ^ other.keys())[:5]}")
    for name in mine:
        if isinstance(mine[name], torch.Tensor):
            both = (found[name].contiguous().view(-1) for found in (mine, other))
            yield name, *((x.shape, x.dtype, x.view(torch.uint8).numpy().tobytes()) for x in both)
        else:
            _expect(name, mine[name], other[name], stopped.parents[2])


def _values(state: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested dictionaries and lists, by their full names."""
    if isinstance(state, dict | list | tuple):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            yield from _values(value, f"{name}.{key}" if name else str(key))
    else:
        yield name, state
