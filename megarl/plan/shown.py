"""A plan as a table for a terminal and as a page with bars."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megarl.errors import BadInput
from megarl.plan.hardware import GIB, Hardware
from megarl.plan.memory import OWNERS, MemoryPlan
from megarl.plan.search import Found
from megarl.plan.seconds import PHASES, PhaseTime
from megarl.plan.volume import Volume
from megarl.report.bars import Bars, render_bars
from megarl.report.page import document

PARTS = ("compute", "memory", "communication", "idle")
WIDTH = 110  # characters of a table that is not on a terminal


@dataclass(frozen=True)
class Plan:
    """Everything that `megarl plan` says about one layout."""

    memory: MemoryPlan
    times: dict[str, PhaseTime]
    volumes: list[Volume]  # of one optimizer step, on the stage that sends most
    steps: int  # optimizer steps a rollout
    found: tuple[Found, ...] = ()  # of a search


def render_table(plan: Plan, source: str) -> str:
    """Bytes by owner and phase, seconds, communication and, after a search, the layouts that were found."""
    console = Console(file=io.StringIO(), width=WIDTH, no_color=True, highlight=False)
    memory = plan.memory
    console.print(_title(memory, source), soft_wrap=True)
    console.print(_memory_table(memory))
    for line in _remarks(memory):
        console.print(line, soft_wrap=True)
    console.print(_time_table(plan.times))
    if plan.volumes:
        console.print(_volume_table(plan))
    if plan.found:
        console.print(_search_table(plan.found))
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def _title(memory: MemoryPlan, source: str) -> str:
    p, r = memory.cfg.parallel, memory.cfg.rollout
    dp = memory.world // (p.tp * p.pp * p.cp)
    engine = f"vLLM: {r.tensor_parallel} x {r.data_parallel} ranks" + (", whole experts" if r.expert_parallel else "")
    return (
        f"{source}: {memory.world} x {memory.hardware.name} = dp {dp} x cp {p.cp} x tp {p.tp} x pp {p.pp}; ep {p.ep}, "
        f"etp {p.etp}; recompute {p.recompute}; {engine}; layers of {memory.provider}"
    )


def _memory_table(memory: MemoryPlan) -> Table:
    what = "host" if memory.is_cpu else "device"
    table = Table(title=f"GiB of a {what} by owner, on the fullest rank of each phase", title_justify="left")
    table.add_column("owner")
    for phase in PHASES:
        table.add_column(phase, justify="right")
    worst = {phase: memory.worst(phase) for phase in PHASES}
    for owner in OWNERS:
        amounts = [worst[phase].phases[phase].get(owner, (0.0, 0.0))[memory.place] for phase in PHASES]
        if any(amounts):
            table.add_row(owner, *(_gib(amount) for amount in amounts))
    table.add_section()
    table.add_row("together", *(_gib(memory.need(phase)) for phase in PHASES))
    table.add_row("of", *(_gib(memory.capacity) for _ in PHASES))
    table.add_row("fits", *("yes" if memory.need(phase) <= memory.capacity else "NO" for phase in PHASES))
    table.add_row("rank (stage)", *(f"{worst[phase].rank} ({worst[phase].stage})" for phase in PHASES))
    if not memory.is_cpu:
        table.add_row("on the host", *(_gib(max(rank.total(phase, 1) for rank in memory.ranks)) for phase in PHASES))
    return table


def _remarks(memory: MemoryPlan) -> list[str]:
    cache, kept = memory.cache, memory.worst("update").kept
    saved = ", ".join(f"{name} {_gib(size)}" for name, size in kept.items())
    return [
        f"{memory.hardware.name}: {memory.hardware.memory_bytes / GIB:.1f} GiB, of which {memory.reserve / GIB:.1f} are reserved "
        "for what nobody counts (context, communicators, fragments)",
        f"key/value cache: {cache.tokens:,} tokens = {cache.sequences:.1f} sequences of {cache.sequence:,} a rank",
        f"activations kept between forward and backward, GiB by parallel.recompute: {saved}",
    ]


def _time_table(times: dict[str, PhaseTime]) -> Table:
    table = Table(title="Seconds of one step, by the roofline of this hardware", title_justify="left")
    table.add_column("phase")
    for name in ("seconds", *PARTS):
        table.add_column(name, justify="right")
    table.add_column("bound by")
    for phase in PHASES:
        time = times[phase]
        table.add_row(phase, _seconds(time.seconds), *(_seconds(getattr(time, part)) for part in PARTS), time.bound)
    table.add_section()
    whole = sum(time.seconds for phase, time in times.items() if phase != "checkpoint")
    table.add_row("a step", _seconds(whole), *[""] * len(PARTS), "without checkpoint")
    return table


def _volume_table(plan: Plan) -> Table:
    table = Table(title="Bytes that a rank sends in one optimizer step, by group", title_justify="left")
    for name, side in (("group", "left"), ("ranks", "right"), ("what", "left"), ("operation", "left"), ("GiB", "right")):
        table.add_column(name, justify=side)
    for volume in sorted(plan.volumes, key=lambda v: (v.group, -v.wire)):
        if volume.wire >= 0.005 * GIB or plan.memory.is_cpu:
            table.add_row(volume.group, str(volume.ranks), volume.what, volume.operation, _gib(volume.wire))
    return table


def _search_table(found: Sequence[Found]) -> Table:
    table = Table(title="Layouts that fit, best first (seconds of a step without sync)", title_justify="left")
    for name, side in (("seconds", "right"), ("set", "left"), ("why", "left")):
        table.add_column(name, justify=side, overflow="fold")
    for one in found:
        table.add_row(f"{one.total:.1f}", one.overrides or "as it is", one.why)
        table.add_section()
    return table


def _gib(size: float) -> str:
    value = size / GIB
    return "-" if not size else f"{value:.2f}" if value >= 0.01 else f"{value:.5f}"


def _seconds(value: float) -> str:
    return "-" if value <= 0 else f"{value:.2f}" if value >= 0.01 else f"{value:.1e}"


def write_page(plan: Plan, path: Path, source: Path) -> None:
    """The plan as one self-contained HTML file. Raises BadInput when it cannot be written."""
    memory = plan.memory
    bars = [_memory_bars(memory), _time_bars(plan.times), _volume_bars(plan)]
    charts = "".join(render_bars(panel) for panel in bars if panel.rows)
    table = f"<details open><summary>As printed</summary><pre>{escape(render_table(plan, str(source)))}</pre></details>"
    verdict = memory.problem or "fits"
    header = (
        f'<div class="name"><h1>{escape(source.stem)} on {memory.world} x {escape(memory.hardware.name)}</h1></div>'
        f'<dl class="facts"><dt>layout</dt><dd>{escape(_title(memory, source.name))}</dd>'
        f"<dt>verdict</dt><dd>{escape(verdict)}</dd></dl>"
    )
    parts = [("phases", "By phase", f'<div class="charts">{charts}</div>'), ("figures", "Figures", table)]
    partial = path.with_name(path.name + ".partial")
    try:
        partial.unlink(missing_ok=True)
        partial.write_text(document(f"{source.stem} plan", header, parts, source), encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise BadInput(f"--html {path}: cannot be written ({error.strerror}); give another file") from None


def _memory_bars(memory: MemoryPlan) -> Bars:
    rows = []
    for phase in PHASES:
        owners = memory.worst(phase).phases[phase]
        parts = {owner: amounts[memory.place] / GIB for owner, amounts in owners.items() if amounts[memory.place]}
        rows.append((phase, parts))
    rows.append(("capacity", {"free to use": memory.capacity / GIB, "reserve": memory.reserve / GIB}))
    what = "Host" if memory.is_cpu else "Device"
    return Bars(f"{what} memory by owner", "The fullest rank of each phase, against what the chip has.", rows, "GiB", OWNERS)


def _time_bars(times: dict[str, PhaseTime]) -> Bars:
    rows = [(phase, {part: getattr(times[phase], part) for part in PARTS if getattr(times[phase], part) > 0}) for phase in PHASES]
    return Bars("Seconds of a step", "By what most of each moment waits for.", rows, "s", PARTS)


def _volume_bars(plan: Plan) -> Bars:
    groups: dict[str, dict[str, float]] = {}
    for volume in plan.volumes:
        parts = groups.setdefault(volume.group, {})
        parts[volume.what] = parts.get(volume.what, 0.0) + volume.wire / GIB
    return Bars("Sent in one optimizer step", "By a rank of the stage that sends most, by group.", list(groups.items()), "GiB")


def describe_hardware(hardware: Hardware) -> list[str]:
    """Lines of what a calibration found."""
    peaks = ", ".join(f"{name} {value / 1e12:.3g} TFLOP/s" for name, value in hardware.flops.items())
    return [
        f"{hardware.name}: {peaks}",
        f"memory {hardware.memory_bytes / GIB:.1f} GiB at {hardware.memory_bandwidth / 1e9:.1f} GB/s, "
        f"link {hardware.link_bandwidth / 1e9:.2f} GB/s",
    ]
