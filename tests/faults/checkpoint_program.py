"""Run by `test_checkpoint_faults.py`: FOLDER KILLS SEED. Children of one process that has imported everything save
checkpoints, are killed in it, run out of disk, or may not write any more. Prints what was seen as JSON."""

from __future__ import annotations

import codecs
import ctypes
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megarl import manifest, platform
from megarl.checkpoint import Checkpointer, checkpoints
from megarl.config.schema import Config, Model, Optimizer
from megarl.errors import RunFailed
from megarl.learner.policy import Policy
from megarl.models.spec import ModelSpec, Rope
from megarl.parallel import Mesh

CLONE_NEWNS, CLONE_NEWUSER, MS_REC, MS_PRIVATE = 0x20000, 0x10000000, 0x4000, 1 << 18
NOBODY = 65534
libc = ctypes.CDLL(None, use_errno=True)


class Run:
    """A model whose weights are a function of the step: a checkpoint that is not what it says shows itself."""

    def __init__(self, folder: Path) -> None:
        spec = ModelSpec(
            "qwen3_moe", 2, 64, 4, 2, 16, 64, 256, 64, Rope(1e4, 16), 1e-6, False, "head",
            num_experts=8, top_k=2, moe_intermediate_size=64, moe_layers=(0, 1),
        )  # fmt: skip
        cfg = Config(model=Model(path="unused"))
        mesh = Mesh.build(cfg.parallel)
        self.policy = Policy(spec, cfg, mesh, optimizer=Optimizer(lr=1e-3))
        self.checkpointer = Checkpointer(folder, mesh, keep=2)
        self.checkpointer.register("policy", self.policy)

    def at(self, step: int) -> list[torch.Tensor]:
        draw = torch.Generator().manual_seed(step)
        return [torch.randn(p.shape, generator=draw) for p in self.policy.modules[0].parameters()]

    def go_to(self, step: int) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.policy.modules[0].parameters(), self.at(step), strict=True):
                parameter.copy_(value)
        self.policy.optimizer.reload_model_params()

    def resume(self) -> int:
        """The step of the newest whole checkpoint, 0: none."""
        step = self.checkpointer.load_latest() or 0
        own = self.policy.modules[0].parameters()
        assert not step or all(torch.equal(a, b) for a, b in zip(own, self.at(step), strict=True)), step
        return step


def child(work: Callable[[], Any]) -> tuple[int, int]:
    """(process, end of a pipe) of a fork: lines of JSON that `work` writes with `say`, and what it returns, the last."""
    read, write = os.pipe()
    process = os.fork()
    if process:
        os.close(write)
        return process, read
    os.close(read)
    code = 1
    try:
        say.end = write
        say(work())
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)


def say(item: Any) -> None:
    os.write(say.end, json.dumps(item).encode() + b"\n")


def result(work: Callable[[], Any]) -> Any:
    process, end = child(work)
    with os.fdopen(end) as lines:
        said = lines.read().splitlines()
    _, status = os.waitpid(process, 0)
    assert status == 0, f"a child failed: {os.waitstatus_to_exitcode(status)}"
    return json.loads(said[-1])


def save_for_ever(folder: Path) -> None:
    """Every other save is written by the thread."""
    run = Run(folder)
    step = run.resume()
    say(["resumed", step])
    while True:
        step += 1
        run.go_to(step)
        start = time.perf_counter()
        say(["saving", step])
        run.checkpointer.save(step, wait=step % 2 == 0)
        run.checkpointer.finish()
        say(["saved", step, time.perf_counter() - start])


def killed(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """Kills at random moments of saves; after each, all that can be seen is whole, and nothing that was saved is lost."""
    draw, seconds, safe = random.Random(seed), 0.1, 0
    out: dict[str, Any] = {"kills": 0, "partial": 0, "steps": 0}
    while out["kills"] < kills:
        process, end = child(lambda: save_for_ever(folder))
        with os.fdopen(end) as lines:
            said = json.loads(next(lines))
            assert said[0] == "resumed" and said[1] >= safe, f"{said} after {safe} was saved"
            for _ in range(draw.randrange(1, 6)):  # whole saves before the one that is cut off
                said = json.loads(next(lines))
                if said[0] == "saved":
                    safe, seconds = said[1], said[2]
            if said[0] == "saved":
                next(lines)
            time.sleep(draw.uniform(0, 1.1 * seconds))
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            safe = max([safe, *(json.loads(line)[1] for line in lines if line.startswith('["saved"'))])
        out["kills"] += 1
        out["partial"] += any(folder.glob(".partial_*"))
        for path in folder.glob("step_*"):
            assert manifest.problem(path, manifest.listed(path)) is None, path
    out["steps"] = result(lambda: Run(folder).resume())
    assert out["steps"] >= safe
    return out


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def failing(run: Run, step: int) -> dict[str, Any]:
    """What two saves of `step` say that cannot succeed, one waited for and one not, and what is there after them."""
    out: dict[str, Any] = {}
    for name, wait in (("waiting", True), ("behind", False)):
        run.go_to(step)
        try:
            run.checkpointer.save(step, wait)
            run.checkpointer.finish()
            out[name] = "nothing"
        except RunFailed as error:
            out[name] = str(error)
    out["left"] = sorted(path.name for path in run.checkpointer.folder.iterdir())
    out["restored"] = run.resume()
    return out


def on_a_full_disk(folder: Path, room: int) -> dict[str, Any]:
    """On a disk of `room` bytes, on which one checkpoint fits and two do not; in a mount namespace of its own."""
    user, group = os.geteuid(), os.getegid()
    assert libc.unshare(CLONE_NEWNS | (CLONE_NEWUSER if user else 0)) == 0, os.strerror(ctypes.get_errno())
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None)
    assert libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, f"size={room}".encode()) == 0
    run = Run(folder)
    run.go_to(1)
    run.checkpointer.save(1)
    return failing(run, 2)


def without_permission(folder: Path) -> dict[str, Any]:
    """In a folder that may not be written any more, as any other user than root."""
    run = Run(folder)
    run.go_to(1)
    run.checkpointer.save(1)
    folder.chmod(0o555)
    codecs.lookup("ascii")  # for reading pickles: the interpreter may lie where only root reads
    if os.geteuid() == 0:
        libc.setfsuid(NOBODY)  # of this thread and those it starts
    return failing(run, 2)


def main(folder: Path, kills: int, seed: int) -> None:
    platform.setup()
    parts = {name: folder / name for name in ("killed", "whole", "full", "refused")}
    for part in parts.values():
        part.mkdir(parents=True)

    def one() -> int:
        run = Run(parts["whole"])
        run.checkpointer.save(1)
        return size_of(checkpoints(parts["whole"])[0])

    room = result(one) * 3 // 2
    out = {
        "full": result(lambda: on_a_full_disk(parts["full"], room)),
        "refused": result(lambda: without_permission(parts["refused"])),
        "killed": killed(parts["killed"], kills, seed),
    }
    shutil.rmtree(folder)
    print(json.dumps(out))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
