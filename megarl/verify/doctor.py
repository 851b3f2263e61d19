"""`megarl doctor`: what this machine has, what is missing, and what each absence costs."""

from __future__ import annotations

import os
import platform as host
import sys
from importlib import metadata

from megarl.platform import features

NEVER_INSTALL_APEX = (
    "the package called apex on the Python index is not NVIDIA Apex: never install it from there; "
    "build NVIDIA Apex from its source (github.com/NVIDIA/apex)"
)


def examine() -> tuple[list[str], bool]:
    """Lines to print, and whether everything required is there and works."""
    device, healthy = _device()
    cores = len(os.sched_getaffinity(0))
    lines = [
        f"{'machine':<20}{host.system()} {host.machine()}, {cores} CPU cores, {_memory_gib():.0f} GiB memory",
        f"{'python':<20}{host.python_version()} ({sys.executable})",
        f"{'device':<20}{device}",
    ]
    for package in features.PACKAGES:
        found = features.version(package)
        if found is not None:
            lines.append(f"{package.name:<20}{found}")
        else:
            level = "MISSING, required" if package.required else "not installed"
            lines.append(f"{package.name:<20}{level}: {package.cost}")
            healthy = healthy and not package.required
    lines.append(f"{'NVIDIA Apex':<20}{_apex()}")
    lines.append(f"{'layers':<20}{_layers()}")
    lines.append(f"note: {NEVER_INSTALL_APEX}")
    lines.append("everything required is installed" if healthy else "something required is missing: run tools/setup.sh")
    return lines, healthy


def _device() -> tuple[str, bool]:
    try:
        import torch

        from megarl import platform
    except Exception as e:  # a broken torch shows itself in many ways; the doctor says which and goes on
        return f"unknown: torch cannot be imported ({type(e).__name__}: {str(e).splitlines()[0]})", False
    if platform.name() == "cpu":
        return f"CPU over gloo, {torch.get_num_threads()} threads ({torch.backends.cpu.get_cpu_capability()})", True
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"CUDA {torch.version.cuda} over NCCL: {', '.join(names)}", True


def _layers() -> str:
    """Which layer provider model.layers: auto is here, and why; with te, the FP8 recipes that the chip has."""
    problem = features.transformer_engine_problem()
    if problem is not None:
        return f"torch ({problem})"
    recipes = {name: features.recipe_problem(name) for name in features.TE_RECIPES}
    works = ", ".join(name for name, why in recipes.items() if why is None) or "none"
    missing = "".join(f"; no {name}: {why}" for name, why in recipes.items() if why is not None)
    return f"te in float32 and bfloat16, torch in float64; FP8 by te in bfloat16: {works}{missing}"


def _apex() -> str:
    kind = features.apex()
    if kind == "nvidia":
        return "installed"
    if kind == "missing":
        return f"not installed: {features.APEX_COST}"
    try:
        version = metadata.version("apex")
    except metadata.PackageNotFoundError:
        version = "unknown version"
    return f"WARNING: another package named apex ({version}) is installed; uninstall it (pip uninstall apex)"


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
