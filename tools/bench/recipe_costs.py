"""What every recipe costs by `megarl plan`, as lines at its head: .venv/bin/python tools/bench/recipe_costs.py [--write]

Bytes are those of the fullest GPU at each phase, seconds those of one step, both on H100s, with mean lengths of a quarter of
the longest prompt and half of the longest response. Without `--write`: a table of recipes and variants.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

from megarl import platform
from megarl.config import load_config
from megarl.plan.command import make_plan
from megarl.plan.hardware import GIB, named
from megarl.plan.seconds import PHASES, step_seconds
from megarl.plan.shown import Plan

ROOT = Path(__file__).parents[2]
GPU = "h100"
VARIANT = re.compile(r"#   ([^:]+): ([a-z_0-9.]+=.*)")
BYTES, SECONDS = "# Expected GiB a GPU", "# Expected seconds a step"


def variants(file: Path) -> dict[str, str]:
    """Label -> overrides, of the lines at the head; the recipe itself has the label ''."""
    found = map(VARIANT.fullmatch, file.read_text().splitlines())
    return {"": ""} | dict(match.groups() for match in found if match)


def planned(file: Path, overrides: str = "") -> Plan:
    return make_plan(load_config(file, overrides.split()), None, named(GPU))


def lines(plan: Plan) -> list[str]:
    """The two lines at the head of a recipe."""
    need = ", ".join(f"{_name(phase)} {plan.memory.need(phase) / GIB:.1f}" for phase in PHASES)
    took = ", ".join(f"{_name(phase)} {plan.times[phase].seconds:.1f}" for phase in PHASES[:-1])
    return [
        f"{BYTES}, of {plan.memory.capacity / GIB:.1f} on {GPU}: {need}.",
        f"{SECONDS}, {step_seconds(plan.times):.0f} in all: {took}; a checkpoint {plan.times['checkpoint'].seconds:.1f}.",
    ]


def _name(phase: str) -> str:
    return phase.replace("old_log_probs", "old log-probs")


def write(file: Path, said: list[str]) -> None:
    """Replace or add the lines, above the variants."""
    kept = [line for line in file.read_text().splitlines() if not line.startswith((BYTES, SECONDS))]
    at = next(i for i, line in enumerate(kept) if line.startswith("# Variants"))
    file.write_text("\n".join([*kept[:at], *said, *kept[at:]]) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="Write the lines into the recipes.")
    args = parser.parse_args()
    platform.setup()
    os.chdir(ROOT)
    for file in sorted(Path("configs/recipes").glob("*-gspo.yaml")):
        for label, overrides in (variants(file) if not args.write else {"": ""}).items():
            plan = planned(file, overrides)
            said = lines(plan)
            print(f"{file.stem} {label}: {plan.memory.problem or 'fits'}", *said, sep="\n", flush=True)
            if args.write:
                write(file, said)
                write(file.with_name(file.name.replace("-gspo", "-sapo")), said)


if __name__ == "__main__":
    main()
