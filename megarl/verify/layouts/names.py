"""Layouts by name: `tp2ep2`, `pp2vpp2+recompute`, `one+unpacked`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from megarl.config.schema import Parallel
from megarl.errors import BadInput

FORM = (
    "degrees such as tp2, pp2vpp2, tp2ep2, etp2, cp2, dp2 (or `one`: one process), then any of "
    "+recompute, +selective, +allgather, +distopt, +unpacked, +permuted, +budget<tokens>"
)
DEGREES = ("dp", "tp", "cp", "pp", "vpp", "ep", "etp")
SETTINGS: dict[str, dict[str, Any]] = {
    "recompute": {"recompute": "full"},
    "selective": {"recompute": "selective"},
    "allgather": {"dispatcher": "allgather"},
    "distopt": {"distributed_optimizer": True},
}
PACKINGS = ("unpacked", "permuted")
REFERENCE = "one"  # the layout that all are compared with
BUDGET = 160  # tokens of a packed row, over all context-parallel ranks
DEFAULT = (
    "dp2", "tp2", "pp2", "pp2vpp2", "ep2", "ep4", "etp2", "cp2", "cp4", "tp2ep2", "cp2ep2", "pp2cp2", "tp2pp2ep2",
    "tp2cp2pp2", "one+unpacked", "one+permuted", "one+budget80",
)  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """A way to run the same step: degrees, and how the batch is laid out. The default is one process."""

    name: str
    degrees: dict[str, int]
    settings: dict[str, Any]
    unpacked: bool = False  # every sequence in a micro-batch of its own
    permuted: bool = False  # the sequences in another order
    budget: int = BUDGET

    @property
    def world(self) -> int:
        """Ranks: the fewest on which dense layers and experts fit, or as many as `dp` asks for."""
        get = self.degrees.get
        pp = get("pp", 1)
        dense, expert = get("tp", 1) * get("cp", 1) * pp, get("etp", 1) * get("ep", 1) * pp
        return dense * self.degrees["dp"] if "dp" in self.degrees else math.lcm(dense, expert)

    @property
    def has_experts(self) -> bool:
        """Whether it needs a model with experts."""
        return bool({"ep", "etp"} & set(self.degrees)) or "dispatcher" in self.settings

    def parallel(self, **changes: Any) -> Parallel:
        """The `parallel` section; the optimizer's state is whole on every rank unless the name says `+distopt`."""
        degrees = {name: degree for name, degree in self.degrees.items() if name != "dp"}
        return Parallel(
            **{"distributed_optimizer": False, "timeout_minutes": 3.0, **degrees, **self.settings, **changes}
        )


def parse(name: str) -> Layout:
    """The layout of a name. Raises BadInput, with the form, for anything else."""
    base, *suffixes = name.split("+")
    degrees: dict[str, int] = {}
    for kind, degree in re.findall(r"([a-z]+)(\d+)", base):
        if kind not in DEGREES or kind in degrees or not int(degree):
            raise BadInput(f"--layouts {name}: {kind}{degree} is not a degree; give {FORM}")
        degrees[kind] = int(degree)
    if not re.fullmatch(r"one|([a-z]+\d+)+", base):
        raise BadInput(f"--layouts {name}: give {FORM}")
    settings: dict[str, Any] = {}
    packing: dict[str, Any] = {}
    for suffix in suffixes:
        if suffix in SETTINGS:
            settings |= SETTINGS[suffix]
        elif suffix in PACKINGS:
            packing[suffix] = True
        elif match := re.fullmatch(r"budget(\d+)", suffix):
            packing["budget"] = int(match[1])
        else:
            raise BadInput(f"--layouts {name}: +{suffix} is unknown; give {FORM}")
    layout = Layout(name, degrees, settings, **packing)
    expert = degrees.get("etp", 1) * degrees.get("ep", 1) * degrees.get("pp", 1)
    if layout.world % expert:
        raise BadInput(f"--layouts {name}: its {layout.world} ranks do not hold etp x ep x pp = {expert}; change dp")
    if layout.unpacked and layout.world > 1:
        raise BadInput(f"--layouts {name}: +unpacked is for one process; use one+unpacked")
    return layout
