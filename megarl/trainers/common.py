"""What the loops share: the run folder, the stop flag, and the tail of a step."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from megarl import launcher, platform
from megarl.checkpoint import Checkpointer
from megarl.config.schema import Config
from megarl.errors import BadInput, RunFailed
from megarl.learner.policy import Policy, StepResult
from megarl.metrics import Max, Metric, Sum, Writer, open_writer
from megarl.models.generate import ensure_checkpoint
from megarl.parallel import Mesh
from megarl.platform.signals import StopSignal
from megarl.trainers.alarms import Alarms
from megarl.trainers.display import Display, Phases, task
from megarl.trainers.failed_step import save_micro_batches
from megarl.trainers.watchdog import Watchdog
from megarl.types import MicroBatch


class Clock:
    """Seconds this command has run, from the start of its process, with those of the runs it continues."""

    def __init__(self) -> None:
        self._before = 0.0

    def seconds(self) -> float:
        return self._before + time.time() - psutil.Process().create_time()

    def state_dict(self) -> dict[str, float]:
        return {"seconds": self.seconds()}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self._before = state["seconds"]


@dataclass
class Loop:
    """One phase of a project (sft or rl) on this rank: where it writes, what it shows, how it stops and resumes."""

    cfg: Config
    mesh: Mesh
    folder: Path  # RUN_DIR/sft or RUN_DIR/rl
    checkpointer: Checkpointer
    stop: StopSignal
    phases: Phases
    writer: Writer
    display: Display
    clock: Clock
    total: int
    alarms: Alarms
    done: int = 0  # steps finished
    around_checkpoint: Callable[[], AbstractContextManager] = nullcontext  # brings back what is to be saved

    @classmethod
    def open(cls, cfg: Config, mesh: Mesh, part: str, total: int, register: dict[str, Any]) -> Loop:
        """Restore the newest checkpoint when `resume` is auto, and open the sinks after it. Collective."""
        folder = Path(cfg.run_dir) / part
        settings = cfg.model_dump(mode="json")
        # for what draws from them without a generator of its own; a checkpoint has their state
        random.seed(cfg.seed + mesh.rank)
        np.random.seed((cfg.seed + mesh.rank) % 2**32)
        checkpointer = Checkpointer(folder / "checkpoints", mesh, cfg.checkpoint.keep, settings)
        clock = Clock()
        alarms = Alarms(cfg.alarms)
        for name, owner in {**register, "clock": clock, "alarms": alarms}.items():
            checkpointer.register(name, owner)
        resumed = checkpointer.load_latest() if cfg.resume == "auto" else None
        writer = open_writer(
            folder,
            is_main=mesh.is_main,
            resume_step=resumed,
            tensorboard=cfg.log.tensorboard,
            wandb=cfg.log.wandb,
            config=settings,
        )
        display = Display(part, total, start=resumed or 0, is_main=mesh.is_main, stream=launcher.terminal())
        watchdog = Watchdog.current

        def enter(name: str) -> None:
            display.phase(name)
            if watchdog is not None:
                watchdog.enter(name)

        phases = Phases(on_enter=enter, synchronize=platform.synchronize)
        alarms.note = display.note
        stop = StopSignal.install()
        loop = cls(cfg, mesh, folder, checkpointer, stop, phases, writer, display, clock, total, alarms, resumed or 0)
        for note in checkpointer.notes:
            display.note(note)
        if resumed:
            display.note(f"{part}: resumed after step {resumed} from {folder / 'checkpoints'}")
        return loop

    def run(self, step: Callable[[int], Mapping[str, float]]) -> bool:
        """Steps until the total or a stop request; True when the total was reached.

        The stop flag is reduced over the ranks here, at the step boundary, and a checkpoint is written before leaving.
        """
        saved = start = self.done
        while self.done < self.total:
            if Watchdog.current is not None:
                Watchdog.current.at_step(self.done + 1)
            with _profiled(self.cfg.log.profile_steps, self.done + 1, self.folder, self.mesh):
                metrics = {**step(self.done + 1), "clock/seconds": self.clock.seconds()}
            self.done += 1
            metrics |= self.alarms.observe(self.done, metrics)
            self.writer.write(self.done, metrics)
            self.display.update(self.done, metrics)
            if self.alarms.ended_by:
                raise RunFailed(f"{self.folder.name} step {self.done}: {self.alarms.ended_by}")
            stopping = self.mesh.any(self.stop.requested) or self.done - start == self.cfg.checkpoint.stop_after
            every = self.cfg.checkpoint.every
            if stopping or self.done == self.total or (every and self.done % every == 0):
                last = stopping or self.done == self.total
                with self.phases("checkpoint"), self.around_checkpoint():
                    self.checkpointer.save(self.done, wait=last or not self.cfg.checkpoint.async_save)
                saved = self.done
            else:
                self.checkpointer.poll()
            if stopping and self.done < self.total:
                self.display.note(f"stopped after step {saved}; set resume=auto to continue")
                return False
        return True

    def check_applied(self, result: StepResult, micro: list[MicroBatch], number: int, role: str = "policy") -> None:
        """Keeps the micro-batches of an optimizer step that was not applied, and counts it.

        Raises RunFailed when that ends the run: nothing was changed, and going on would hide it.
        """
        if result.applied:
            return
        again = f"_{self.alarms.skips_now + 1}" if self.alarms.skips_now else ""
        kept = self.folder / "failed" / f"step_{number:06d}{again}_rank{self.mesh.rank}.safetensors"
        save_micro_batches(kept, micro, role)
        wrong = {
            "nonfinite": f"the gradient norm is {result.grad_norm:.4g}, or the loss is not finite",
            "grad_norm": f"the gradient norm is {result.grad_norm:.4g}, above alarms.grad_norm",
            "loss": "the loss is above alarms.loss",
        }[result.refused]
        where = f"{self.folder.name} step {number}{': critic' if role == 'critic' else ''}"
        then = f"no weight was changed. Its micro-batches are in {kept}: `megarl replay` shows where it comes from."
        self.alarms.refused(number, result.refused, f"{where}: {wrong}; {then}")

    @contextmanager
    def exporting(self) -> Iterator[None]:
        """The export after the last step, as a person sees it."""
        shown = task("export to Hugging Face", is_main=self.mesh.is_main, stream=launcher.terminal())
        with self.phases("export"), shown:
            yield

    def end_at(self, step: int, why: str) -> None:
        """`step` becomes the last one, before `total` was reached; the same call on every rank."""
        self.display.note(f"{self.folder.name}: {why}; ends after step {step} of at most {self.total}")
        self.total = self.display.total = step

    def close(self) -> None:
        self.checkpointer.settle(self.cfg.log.grace_seconds)
        self.display.close()
        self.writer.close()


class _profiled:
    """Records one step with torch.profiler into RUN_DIR/<part>/profile when it is asked for."""

    def __init__(self, steps: list[int], step: int, folder: Path, mesh: Mesh) -> None:
        self.path = folder / "profile" / f"step_{step:06d}_rank{mesh.rank}.json"
        self.profiler = torch.profiler.profile(activities=platform.profiler_activities()) if step in steps else None

    def __enter__(self) -> None:
        if self.profiler is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.profiler.__enter__()

    def __exit__(self, *exception: object) -> None:
        if self.profiler is not None:
            self.profiler.__exit__(*exception)
            self.profiler.export_chrome_trace(str(self.path))


def starting_checkpoint(cfg: Config, mesh: Mesh) -> str:
    """`model.path`, made from `model.generate` by the main rank when it is not there. Collective."""
    error = None
    if mesh.is_main:
        try:
            ensure_checkpoint(cfg.model)
        except BadInput as problem:
            error = str(problem)
    error = mesh.broadcast_object(error)
    if error:
        raise BadInput(error)
    return cfg.model.path


def start_path(cfg: Config, mesh: Mesh, part: str, init_from: str) -> str:
    """The checkpoint a part of the project starts from: its SFT result, or `model.path`. Collective.

    Raises BadInput when the SFT result is asked for and not there.
    """
    if init_from == "sft" and cfg.sft is not None:
        path = Path(cfg.run_dir) / "sft" / "hf"
        if not (path / "config.json").exists():
            raise BadInput(
                f"{path}: no SFT result; run `megarl sft` on this config first, or set {part}.init_from=model"
            )
        return str(path)
    return starting_checkpoint(cfg, mesh)


def memory_metrics() -> dict[str, Metric]:
    """GiB of all ranks and their reward workers together: now (`memory/rss_gib`), and the sum of the ranks' peaks."""
    used = platform.device_memory()
    out: dict[str, Metric] = {
        "memory/rss_gib": Sum(used["rss"] + used["children"]),
        "memory/peak_rss_gib": Sum(used["peak_rss"] + used["children"]),
    }
    if "peak_allocated" in used:
        out["memory/device_peak_gib"] = Max(used["peak_allocated"])
    return out


def learner_tokens(micro_batches: list[MicroBatch], mesh: Mesh) -> float:
    """Rows of all ranks' micro-batches, padding included, each counted once. Collective."""
    counts = mesh.all_gather_object(sum(micro.tokens.numel() for micro in micro_batches))
    return sum(counts) / (mesh.tp * mesh.pp)  # ranks that compute the same rows


def finish_export(policy: Policy, folder: Path, cfg: Config, extra_from: str) -> None:
    """Write the policy as a Hugging Face checkpoint at `folder`, replacing an older export. Collective."""
    from megarl.convert import save_hf

    save_hf(folder, policy.modules, policy.spec, policy.mesh, dtype=cfg.export.dtype, extra_from=extra_from)
