"""`megarl verify layouts`: the same optimizer step in every layout, against one process."""

from __future__ import annotations

import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megarl import launcher
from megarl.config import check_config
from megarl.config.schema import Config
from megarl.convert.hf_io import read_json, write_json
from megarl.errors import BadInput, RunFailed
from megarl.verify.layouts.model import shrunken, write_checkpoint
from megarl.verify.layouts.names import DEFAULT, REFERENCE, Layout, parse

TOLERANCE = {"float64": 1e-10, "float32": 1e-5}
COMMAND = (sys.executable, "-m", "megarl")
STOPPED = (129, 130, 143)  # by SIGHUP, Ctrl-C, SIGTERM
HEADER = (
    f"{'layout':<22} {'ranks':>5}  {'loss of':<7} {'loss':>8} {'norm':>8} {'sgd':>8} {'adam':>8} {'gradient':>8}"
    "  verdict, tensor of the largest gradient difference"
)


@dataclass(frozen=True)
class Row:
    """One loss in one layout: differences from one process, and the tensors they were largest in."""

    layout: Layout
    loss_name: str
    tolerance: float
    loss: float  # |difference| / max(1, |loss|)
    grad_norm: float  # relative, of the worse of both steps and of all ranks
    tensors: dict[str, tuple[float, str]]  # gradient, and weights after an sgd and an adam step: (difference, worst)
    acting: str  # how the share of acting gates differs; empty: not at all

    @property
    def misses(self) -> list[str]:
        """What is above the tolerance, in words; empty: the layout does what one process does."""
        out = ["loss"] if not self.loss <= self.tolerance else []
        out += ["gradient norm"] if not self.grad_norm <= self.tolerance else []
        out += [f"{what} of {name}" for what, (gap, name) in self.tensors.items() if not gap <= self.tolerance]
        return out + ([self.acting] if self.acting else [])

    def line(self) -> str:
        """A line of the table."""
        (gradient, name), (sgd, _), (adam, _) = (self.tensors[what] for what in ("gradient", "sgd", "adam"))
        numbers = " ".join(f"{x:>8.1e}" for x in (self.loss, self.grad_norm, sgd, adam, gradient))
        verdict = f"FAIL: {', '.join(self.misses)}" if self.misses else f"ok {name}"
        return f"{self.layout.name:<22} {self.layout.world:>5}  {self.loss_name:<7} {numbers}  {verdict}"


@dataclass
class Comparison:
    """All rows, and how ranks failed by the layout's name."""

    rows: list[Row] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)

    @property
    def failed(self) -> list[str]:
        """Names of the layouts that differ from one process, or did not run."""
        return list(dict.fromkeys([*(row.layout.name for row in self.rows if row.misses), *self.broken]))

    def summary(self) -> str:
        """The last line of the table."""
        bad = [row for row in self.rows if row.misses]
        worst = max(bad or self.rows, key=lambda row: row.tensors["gradient"][0], default=None)
        if worst is None:
            return "nothing was compared"
        gap, name = worst.tensors["gradient"]
        where = f"worst gradient {gap:.1e}: {name} ({worst.layout.name}, {worst.loss_name})"
        verdict = f"{len(bad)} above" if bad else "all within"
        return f"{len(self.rows)} losses in layouts, {verdict} {worst.tolerance:.0e}; {where}"


def verify_layouts(cfg: Config, names: Sequence[str], dtype: str, nproc: int) -> None:
    """`compare_layouts`, printed. Raises RunFailed when a layout differs from one process or its ranks fail."""
    found = compare_layouts(cfg, names, dtype, nproc, say=lambda line: print(line, flush=True))
    print(found.summary())
    if found.failed:
        raise RunFailed(f"verify layouts: not as one process: {', '.join(found.failed)}")


def compare_layouts(
    cfg: Config,
    names: Sequence[str] = (),
    dtype: str = "float64",
    nproc: int = 8,
    say: Callable[[str], None] = lambda line: None,
    command: Sequence[str] = COMMAND,
) -> Comparison:
    """One step of every loss on a model of the config's kind: each layout against one process.

    `names`: see `names.parse`; none: all that the model and `nproc` processes allow. The layouts run one after the
    other, each on ranks of its own that `command` starts; `say` gets each line of the table when it is known.
    Raises BadInput for a layout that is none or cannot run, and RunFailed when the single process fails, or its step
    proves too little: its gates stay shut, or its ratios agree.
    """
    if dtype not in TOLERANCE:
        raise BadInput(f"--dtype {dtype}: set one of {', '.join(TOLERANCE)}")
    chosen = [parse(name) for name in names or DEFAULT]
    spec = shrunken(cfg)
    folder = Path(tempfile.mkdtemp(prefix="megarl-layouts-"))
    out = Comparison()
    try:
        write_checkpoint(folder / "policy", spec, seed=cfg.seed)
        write_checkpoint(folder / "critic", replace(spec, head="scalar"), seed=cfg.seed + 1)
        router = {"router_dtype": "float64"} if dtype == "float64" else {}
        own = {"path": str(folder / "policy"), "generate": None, "dtype": dtype, "fp8": "none"}  # its scales depend on layouts
        model = cfg.model.model_copy(update=own | router)
        job = Config(model=model)
        write_json(folder / "config.json", job.model_dump(mode="json"))
        runs, skipped = _sort_out(chosen, job, bool(names), spec.is_moe, nproc)
        say(f"{spec.family}, {spec.num_layers} layers, {dtype}: differences from one process, tolerance {TOLERANCE[dtype]:.0e}")
        for layout, reason in skipped:
            say(f"{layout.name:<22} skipped: {reason}")
        reference = _reference(folder, command)
        shares = [f"{result['loss_name']} {result['acting']:.0%}" for result in reference if result["acting"] is not None]
        say(f"gates that act in it: {', '.join(shares)}")
        say(HEADER)
        for layout in runs:
            found = _launch(layout, folder, command)
            if isinstance(found, str):
                out.broken[layout.name] = found
                say(f"{layout.name:<22} {layout.world:>5}  FAIL: {found}")
                continue
            for row in _rows(layout, found, reference, TOLERANCE[dtype]):
                out.rows.append(row)
                say(row.line())
    finally:
        if not out.broken and sys.exc_info()[0] is not RunFailed:  # the logs say why
            shutil.rmtree(folder)
    return out


def _sort_out(
    chosen: list[Layout], job: Config, named: bool, is_moe: bool, nproc: int
) -> tuple[list[Layout], list[tuple[Layout, str]]]:
    """What runs, and what does not and why. Raises BadInput for what was asked for by name and cannot run."""
    runs, skipped = [], []
    for layout in chosen:
        reason = None
        if layout.world > nproc:
            reason = f"needs {layout.world} processes; set --nproc {layout.world}"
        elif layout.has_experts and not is_moe:
            reason = "the model has no experts; leave it out"
        elif job.model.dtype == "float64" and layout.parallel().distributed_optimizer:
            reason = "no distributed optimizer in float64; set --dtype float32"
        if reason is None:
            check_config(job.model_copy(update={"parallel": layout.parallel(nproc=layout.world)}))
            runs.append(layout)
        elif named:
            raise BadInput(f"--layouts {layout.name}: {reason}")
        else:
            skipped.append((layout, reason))
    return runs, skipped


def _reference(folder: Path, command: Sequence[str]) -> list[dict[str, Any]]:
    found = _launch(parse(REFERENCE), folder, command)
    if isinstance(found, str):
        raise RunFailed(f"verify layouts: one process alone {found}")
    problems = [problem for result in found for problem in result["problems"]]
    if problems:
        shutil.rmtree(folder)
        raise RunFailed(f"verify layouts: this step proves too little: {'; '.join(problems)}")
    return found


def _launch(layout: Layout, folder: Path, command: Sequence[str]) -> list[dict[str, Any]] | str:
    """The results of a layout, or how its ranks failed."""
    logs = folder / "logs" / layout.name
    code = launcher.launch([*command, "verify", "layout-rank", str(folder), layout.name], layout.world, logs, 2)
    if code in STOPPED:
        raise SystemExit(code)
    if code:
        return f"ended with code {code}; logs in {logs}"
    return read_json(folder / f"{layout.name}.json", f"look into {logs}")["losses"]


def _rows(
    layout: Layout, found: list[dict[str, Any]], reference: list[dict[str, Any]], tolerance: float
) -> Iterator[Row]:
    for mine, wanted in zip(found, reference, strict=True):
        norms = [
            abs(norm - wanted[kind][0]) / wanted[kind][0]
            for kind in ("grad_norm/sgd", "grad_norm/adam")
            for norm in mine[kind]
        ]
        share, expected = mine["acting"], wanted["acting"]
        changed = share is not None and not abs(share - expected) < 1e-9
        yield Row(
            layout=layout,
            loss_name=mine["loss_name"],
            tolerance=tolerance,
            loss=_or_inf(abs(mine["loss"] - wanted["loss"]) / max(1.0, abs(wanted["loss"]))),
            grad_norm=max(_or_inf(norm) for norm in norms),
            tensors={kind: (mine[kind][0], mine[kind][1]) for kind in ("gradient", "sgd", "adam")},
            acting=f"{share:.1%} of the gates act, not {expected:.1%}" if changed else "",
        )


def _or_inf(x: float) -> float:
    return math.inf if math.isnan(x) else x
