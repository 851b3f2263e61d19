"""`megarl study drift`: methods x routing replay, every arm from the same warm start on the same budget.

What differs between the arms of a seed is `rl.algorithm` and `rl.routing_replay`, nothing else: the start, the order of
the prompts, the seed of every sample, the number of samples and of optimizer steps are the same. A run is one `megarl
train` in RUN_DIR/<method>-<replay>/seed_<n>, a warm start one `megarl sft` in RUN_DIR/start/seed_<n>; what is there
already is not made again. Seeds come one after the other, so that a study that is cut short has whole seeds.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megarl import launcher
from megarl.config import Config, Study, check_world, dump_config, load_config, prepare_run_dir, smallest_world
from megarl.errors import BadInput


@dataclass(frozen=True)
class Run:
    """One run of the study; `part` is "sft" for a warm start and "rl" for an arm."""

    name: str  # "grpo-old", or "start"
    seed: int
    part: str
    config: Config

    @property
    def folder(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def title(self) -> str:
        return f"{self.name}, seed {self.seed}"

    @property
    def is_done(self) -> bool:
        """Whether it has its result."""
        return (self.folder / ("sft/hf/config.json" if self.part == "sft" else "summary.json")).exists()

    @property
    def failure(self) -> Path:
        """Written when it ended in an error: its steps until then count, and the next start of the study tries it again."""
        return self.folder / "failed.json"


def runs(config: Config) -> Iterator[Run]:
    """All runs of the study in the order they are made: seed by seed, the warm start first when there is one."""
    study, root = config.study, Path(config.run_dir)
    measured = {
        "study": None,
        "log": config.log.model_copy(update={"routing_variance": True}),
        "rollout": config.rollout.model_copy(update={"routed_experts": True}),
    }
    config = config.model_copy(update=measured)
    for seed in range(config.seed, config.seed + study.seeds):
        start, model = root / "start" / f"seed_{seed}", config.model
        if model.generate is not None:
            generate = model.generate.model_copy(update={"seed": model.generate.seed + seed})
            model = model.model_copy(update={"path": str(root / "models" / f"seed_{seed}"), "generate": generate})
        own = config.model_copy(update={"seed": seed, "resume": "auto", "model": model})
        if config.sft is not None and config.rl.init_from == "sft":
            yield Run("start", seed, "sft", own.model_copy(update={"run_dir": str(start)}))
            model = model.model_copy(update={"path": str(start / "sft" / "hf"), "generate": None})
        for method, algorithm in study.methods.items():
            for replay in study.routing_replay:
                name = f"{method}-{replay}"
                rl = {"algorithm": algorithm, "routing_replay": replay, "init_from": "model"}
                changed = {
                    "run_dir": str(root / name / f"seed_{seed}"),
                    "model": model,
                    "rl": config.rl.model_copy(update=rl),
                }
                yield Run(name, seed, "rl", own.model_copy(update=changed))


def run_study(config: Config, overrides: list[str], config_path: Path) -> int:
    """Make what is missing and write the results after every run; returns the exit code.

    Raises BadInput for a study that cannot be: without an RL section, or with a dense model.
    """
    from megarl.study.results import write_results

    config = _checked(config)
    todo, command = list(runs(config)), " ".join(["megarl study drift", str(config_path), *overrides])
    arms = [run for run in todo if run.part == "rl"]
    for number, run in enumerate(todo, start=1):
        if run.is_done:
            continue
        print(f"study: {number} of {len(todo)}: {run.title}", flush=True)
        run.failure.unlink(missing_ok=True)
        started = time.monotonic()
        code = _launch(run)
        if code == 2 or code >= 128 or (code and run.part == "sft"):
            return code
        if code:
            run.failure.write_text(json.dumps({"code": code}) + "\n")
        print(f"study: {run.title}: {'failed, ' if code else ''}{time.monotonic() - started:.0f} s", flush=True)
        if run.part == "rl":
            write_results(config, arms, command)
    print(write_results(config, arms, command))
    return 0


def _checked(config: Config) -> Config:
    """The configuration with its study section."""
    config = config.model_copy(update={"study": config.study or Study()})
    if config.rl is None:
        raise BadInput("rl: missing; a study needs an rl section, which its arms share")
    if not config.log.routing_tokens:
        raise BadInput("log.routing_tokens = 0: a study of routing measures it; set 512")
    if config.model.generate is not None and config.model.generate.family == "qwen3":
        raise BadInput("model.generate.family = 'qwen3': a dense model has no routing to study; set qwen3_moe")
    for name in config.study.methods:
        if not name.isidentifier():
            raise BadInput(f"study.methods.{name}: the name is part of folder names; set letters, digits and _ only")
    return config


def _launch(run: Run) -> int:
    """The run's own command on local ranks; its exit code."""
    file = run.folder.parent / f"{run.folder.name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(dump_config(run.config))
    config = load_config(file, require=run.part)  # every check that the command itself makes
    ranks = config.parallel.nproc or smallest_world(config)
    check_world(config, ranks, "rl" if run.part == "rl" else None)
    made = prepare_run_dir(config, run.part)
    verb = "sft" if run.part == "sft" else "train"
    logs = run.folder / run.part / "logs"
    command = [sys.executable, "-m", "megarl", verb, str(file)]
    code = launcher.launch(command, ranks, logs, config.log.grace_seconds)
    if code == 2:
        made.discard()
    return code
