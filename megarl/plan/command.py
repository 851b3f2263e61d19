"""`megarl plan`: will it fit, how long will it take, and what would be better."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megarl.config import check_world, smallest_world
from megarl.config.schema import Config
from megarl.errors import BadInput
from megarl.plan.hardware import GIB, Hardware
from megarl.plan.memory import plan_memory, spec_of_config
from megarl.plan.search import refuse, search
from megarl.plan.seconds import phase_seconds
from megarl.plan.shape import ModelShape, Rows, Workload
from megarl.plan.shown import Plan, render_table, write_page
from megarl.plan.volume import Volume, layout_of, update_volumes


def make_plan(
    cfg: Config,
    world: int | None,
    hardware: Hardware,
    reserve_gib: float | None = None,
    prompt: float | None = None,
    response: float | None = None,
    wide: bool = False,
) -> Plan:
    """The plan of `cfg.rl` on `world` ranks (none: what the configuration asks for); `wide`: with a search for others.

    `prompt`, `response`: mean lengths in tokens. Raises BadInput for a configuration that cannot be, whatever its size.
    """
    if cfg.rl is None:
        raise BadInput("rl: missing; a plan is of an RL step, so give a configuration with an rl section")
    world = world or cfg.parallel.nproc or smallest_world(cfg)
    check_world(cfg, world, "model")
    if response is not None and response > cfg.rollout.max_response_tokens:
        raise BadInput(
            f"--response-tokens {response:g}: above rollout.max_response_tokens = {cfg.rollout.max_response_tokens}; "
            "give a mean below it"
        )
    reserve = None if reserve_gib is None else reserve_gib * GIB
    if reserve is not None and reserve >= hardware.memory_bytes:
        raise BadInput(f"--reserve {reserve_gib:g}: {hardware.name} has {hardware.memory_bytes / GIB:.1f} GiB; give less")
    work = Workload.of(cfg, prompt, response)
    memory = plan_memory(cfg, world, hardware, work, reserve)
    shape = ModelShape.of(spec_of_config(cfg))
    found = tuple(search(cfg, world, hardware, work, reserve=reserve)) if wide else ()
    times = phase_seconds(cfg, shape, hardware, world, work, memory.cache.tokens)
    return Plan(memory, times, _volumes(cfg, shape, world, work), work.optimizer_steps, found)


def _volumes(cfg: Config, shape: ModelShape, world: int, work: Workload) -> list[Volume]:
    """Of the stage whose ranks send most."""
    p = cfg.parallel
    rows = Rows.of(work, shape, world // (p.tp * p.cp * p.pp), p.pp if p.vpp else 1)
    layout = layout_of(cfg, shape, world, rows)
    stages = [update_volumes(layout, stage) for stage in range(p.pp)]
    return max(stages, key=lambda volumes: sum(volume.wire for volume in volumes))


def run(plan: Plan, config: Path, html: Path | None, say: Callable[[str], None] = print) -> None:
    """Print it, write the page, and raise BadInput with what would fit when it does not."""
    say(render_table(plan, str(config)))
    if html is not None:
        write_page(plan, html, config)
        say(f"page: {html}")
    refuse(plan.memory)
