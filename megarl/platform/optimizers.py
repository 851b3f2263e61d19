"""Which Adam Megatron-core builds, and what its optimizers need to run on a CPU.

Megatron binds the first of Transformer Engine's, Apex's and PyTorch's Adam to a name when it is imported, and asks flags
of its modules which one that was: these are what `use_adam` sets.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch

FUSED = {"te": "transformer_engine.pytorch.optimizers", "apex": "apex.optimizers"}  # each has a FusedAdam
PACKAGES = {"te": "Transformer Engine", "apex": "NVIDIA Apex"}
# PyTorch's ways, as its optimizers take them: one kernel over all elements, one for each operator, or one for each tensor too
WAYS = {
    "fused": {"fused": True, "foreach": False},
    "foreach": {"fused": False, "foreach": True},
    "for-loop": {"fused": False, "foreach": False},
}
_used: list[str] = []


def fused_adam(kind: str) -> Any:
    """FusedAdam of `te` or `apex`. Raises ImportError with the reason when it is not there."""
    try:
        return importlib.import_module(FUSED[kind]).FusedAdam
    except (ImportError, AttributeError, OSError, RuntimeError) as error:  # a library of it may be missing
        raise ImportError(f"{PACKAGES[kind]} has no FusedAdam here ({str(error).splitlines()[0]})") from error


def use_adam(kind: str) -> None:
    """The next optimizers that Megatron builds are of this kind: `te`, `apex`, or PyTorch's. One kind in a process.

    Raises ImportError when it is not there, ValueError after another kind was used: Megatron writes step counts in
    checkpoints by these flags.
    """
    import megatron.core.optimizer as builder
    from megatron.core.optimizer import distrib_optimizer as distributed

    kind = kind if kind in FUSED else "torch"
    if _used and _used != [kind]:
        raise ValueError(f"{_used[0]} is in use")
    adam = torch.optim.AdamW if kind == "torch" else fused_adam(kind)
    _used[:] = [kind]
    builder.Adam, builder.USING_PYTORCH_OPTIMIZER = adam, kind == "torch"
    distributed.Adam = torch.optim.Adam if kind == "torch" else adam  # AdamW is one of these
    distributed.HAVE_APEX_OR_TE = kind != "torch"
    distributed.USING_TE_OPTIMIZER, distributed.USING_APEX_OPTIMIZER = kind == "te", kind == "apex"


def muon_problem() -> str | None:
    """Why Megatron's Muon cannot be built here; None: it can."""
    import inspect

    from megatron.core.optimizer import muon

    if not muon.HAVE_EMERGING_OPTIMIZERS:
        return "megatron-core's Muon needs emerging_optimizers 0.1, which is not installed"
    for function, name in ((muon.OrthogonalizedOptimizer.__init__, "use_nesterov"), (muon.newton_schulz_tp, "mode")):
        if name not in inspect.signature(function).parameters:
            return f"the installed emerging_optimizers takes no {name}, which megatron-core's Muon gives; install 0.1"
    return None


def install(on_cpu: bool) -> None:
    """Patch Megatron's hybrid device optimizer."""
    from megatron.core.optimizer import optimizer_config
    from megatron.core.optimizer.cpu_offloading.hybrid_optimizer import HybridDeviceOptimizer

    optimizer_config.is_te_min_version = _if_installed(optimizer_config.is_te_min_version)
    split = _of_any_precision(HybridDeviceOptimizer._get_sub_optimizer_param_groups)
    HybridDeviceOptimizer._get_sub_optimizer_param_groups = _from_a_cpu(split) if on_cpu else split


def _if_installed(plain: Any) -> Any:
    """Without Transformer Engine its version is None, which Megatron compares; the hybrid optimizer does not need it."""

    def at_least(*version: Any, **how: Any) -> bool:
        return importlib.util.find_spec("transformer_engine") is not None and plain(*version, **how)

    return at_least


def _of_any_precision(plain: Any) -> Any:
    """Copies on the host of float32 parameters are main weights like those of bfloat16 ones.

    Megatron leaves them out of this map: they then miss new weights of the model, and a checkpoint cannot be loaded.
    """

    def split(self: Any, fraction: float) -> tuple:
        *rest, copies, originals, main = plain(self, fraction)
        return *rest, copies, originals, main | copies

    return split


def _from_a_cpu(plain: Any) -> Any:
    """On a CPU no parameter says that it is on a device, so none would be copied, and the step then asks for the copies."""

    def split(self: Any, fraction: float) -> tuple:
        own = {id(p) for group in self.param_groups for p in group["params"]}
        torch.Tensor.is_cuda = property(lambda tensor: id(tensor) in own)
        torch.Tensor.pin_memory = lambda tensor: tensor
        try:
            return plain(self, fraction)
        finally:  # what they hid shows again
            del torch.Tensor.is_cuda, torch.Tensor.pin_memory

    return split
