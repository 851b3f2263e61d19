"""`megarl verify layouts`: the same optimizer step in every layout, against one process."""

from __future__ import annotations

import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megarl import launcher
from megarl.config import check_config
from megarl.config.schema import Config
from megarl.convert.hf_io import read_json, write_json
from megarl.errors import BadInput, RunFailed
from megarl.verify.layouts.model import shrunken, write_checkpoint
from megarl.verify.layouts.names import DEFAULT, Layout, parse

TOLERANCE = {"float64": 1e-10, "float32": 1e-5}
REFERENCE = "one"
COMMAND = (sys.executable, "-m", "megarl")
HEADER = (
    f"{'layout':<22} {'ranks':>5}  {'loss':<6} {'loss':>8} {'gradient':>8} {'norm':>8} {'sgd':>8} {'adam':>8}  verdict"
)


@dataclass(frozen=True)
class Row:
    """One loss in one layout: differences from one process, and the tensors they were largest in."""

    layout: Layout
    loss_name: str
    loss: float  # |difference| / max(1, |loss|)
    grad_norm: float  # relative, of the worse of both steps
    tensors: dict[str, tuple[float, str]]  # gradient, and weights after an sgd and an adam step: (difference, worst)
    acting: str  # how the share of acting gates differs; empty: not at all

    def misses(self, tolerance: float) -> list[str]:
        """What is above the tolerance, in words."""
        out = [f"loss {self.loss:.1e}"] if not self.loss <= tolerance else []
        out += [f"gradient norm {self.grad_norm:.1e}"] if not self.grad_norm <= tolerance else []
        for what, (difference, name) in self.tensors.items():
            if not difference <= tolerance:
                out.append(f"{what} of {name}")
        return out + ([self.acting] if self.acting else [])

    def line(self, tolerance: float) -> str:
        """A line of the table."""
        numbers = [self.loss, self.tensors["gradient"][0], self.grad_norm, self.tensors["sgd"][0], self.tensors["adam"][0]]
        misses = self.misses(tolerance)
        return (
            f"{self.layout.name:<22} {self.layout.world:>5}  {self.loss_name:<6} "
            + " ".join(f"{x:>8.1e}" for x in numbers)
            + ("  ok" if not misses else "  FAIL: " + ", ".join(misses))
        )


def verify_layouts(
    cfg: Config,
    names: Sequence[str] = (),
    dtype: str = "float64",
    nproc: int = 8,
    say: Callable[[str], None] = print,
    command: Sequence[str] = COMMAND,
) -> list[Row]:
    """Compare layouts (default: all that the model and `nproc` processes allow) with one process, telling each line.

    Runs the layouts one after the other, each on ranks of its own started with `command`. Raises BadInput for a name
    that is none, RunFailed when a layout differs or its ranks fail.
    """
    if dtype not in TOLERANCE:
        raise BadInput(f"--dtype {dtype}: set one of {', '.join(TOLERANCE)}")
    chosen = [parse(name) for name in names or DEFAULT]
    spec = shrunken(cfg)
    folder = Path(tempfile.mkdtemp(prefix="megarl-layouts-"))
    write_checkpoint(folder / "policy", spec, seed=cfg.seed)
    write_checkpoint(folder / "critic", replace(spec, head="scalar"), seed=cfg.seed + 1)
    model = cfg.model.model_copy(
        update={"path": str(folder / "policy"), "generate": None, "dtype": dtype}
        | ({"router_dtype": "float64"} if dtype == "float64" else {})
    )
    job = Config(model=model.model_dump(mode="json"))
    write_json(folder / "config.json", job.model_dump(mode="json"))
    runs, skipped = _sort_out(chosen, job, bool(names), spec.is_moe, nproc, dtype)
    say(f"{spec.family}, {spec.num_layers} layers, {dtype}, tolerance {TOLERANCE[dtype]:.0e}; differences from one process")
    for layout, reason in skipped:
        say(f"{layout.name:<22} skipped: {reason}")
    say(HEADER)
    failed, rows = [], []
    reference = _launch(parse(REFERENCE), folder, command)
    if isinstance(reference, str):
        raise RunFailed(f"verify layouts: one process alone {reference}")
    unproven = [problem for result in reference for problem in result["problems"]]
    if unproven:
        raise RunFailed(f"verify layouts: this step proves too little: {'; '.join(unproven)}")
    for layout in runs:
        found = _launch(layout, folder, command)
        if isinstance(found, str):
            say(f"{layout.name:<22} {layout.world:>5}  FAIL: {found}")
            failed.append(layout.name)
            continue
        mine = list(_rows(layout, found, reference))
        for row in mine:
            say(row.line(TOLERANCE[dtype]))
        failed += [layout.name] if any(row.misses(TOLERANCE[dtype]) for row in mine) else []
        rows += mine
    say(_summary(rows, TOLERANCE[dtype]))
    if failed:
        raise RunFailed(f"verify layouts: {len(failed)} of {len(runs)} layouts differ from one process: {', '.join(failed)}")
    shutil.rmtree(folder)
    return rows


def _sort_out(
    chosen: list[Layout], job: Config, named: bool, is_moe: bool, nproc: int, dtype: str
) -> tuple[list[Layout], list[tuple[Layout, str]]]:
    """What runs, and what does not and why. Raises BadInput for what was asked for by name and cannot run."""
    runs, skipped = [], []
    for layout in chosen:
        reason = None
        if layout.world > nproc:
            reason = f"needs {layout.world} processes; set --nproc {layout.world}"
        elif layout.has_experts and not is_moe:
            reason = "the model has no experts"
        elif dtype == "float64" and layout.parallel().distributed_optimizer:
            reason = "no distributed optimizer in float64; set --dtype float32"
        if reason is None:
            check_config(job.model_copy(update={"parallel": layout.parallel(nproc=layout.world)}))
            runs.append(layout)
        elif named:
            raise BadInput(f"--layouts {layout.name}: {reason}")
        else:
            skipped.append((layout, reason))
    return runs, skipped


def _launch(layout: Layout, folder: Path, command: Sequence[str]) -> list[dict[str, Any]] | str:
    """The results of a layout, or how its ranks failed."""
    logs = folder / "logs" / layout.name
    code = launcher.launch([*command, "verify", "layout-rank", str(folder), layout.name], layout.world, logs, 2)
    if code > 2:
        raise KeyboardInterrupt
    if code:
        return f"ended with code {code}; logs in {logs}"
    return read_json(folder / f"{layout.name}.json", f"look into {logs}")["losses"]


def _rows(layout: Layout, found: list[dict[str, Any]], reference: list[dict[str, Any]]) -> Iterator[Row]:
    for mine, wanted in zip(found, reference, strict=True):
        norms = [
            abs(norm - wanted[kind][0]) / wanted[kind][0]
            for kind in ("grad_norm/sgd", "grad_norm/adam")
            for norm in mine[kind]
        ]
        shares = mine["acting"], wanted["acting"]
        changed = shares[0] is not None and not abs(shares[0] - shares[1]) < 1e-9
        yield Row(
            layout,
            mine["loss_name"],
            _or_inf(abs(mine["loss"] - wanted["loss"]) / max(1.0, abs(wanted["loss"]))),
            _or_inf(max(norms)),
            {kind: (mine[kind][0], mine[kind][1]) for kind in ("gradient", "sgd", "adam")},
            f"{shares[0]:.1%} of the gates act, not {shares[1]:.1%}" if changed else "",
        )


def _or_inf(x: float) -> float:
    return math.inf if math.isnan(x) else x


def _summary(rows: list[Row], tolerance: float) -> str:
    bad = [row for row in rows if row.misses(tolerance)]
    if bad:
        worst = max(bad, key=lambda row: row.tensors["gradient"][0])
        difference, name = worst.tensors["gradient"]
        return f"worst gradient: {name}, {difference:.1e} ({worst.layout.name}, {worst.loss_name})"
    layouts = len({row.layout.name for row in rows})
    worst = max((row.tensors["gradient"][0] for row in rows), default=0.0)
    return f"{layouts} layouts, {len(rows)} losses: all within {tolerance:.0e}; worst gradient {worst:.1e}"

