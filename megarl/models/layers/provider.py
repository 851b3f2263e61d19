"""Layer providers: which modules the layers of a model are made of, and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from megarl.config.schema import Model
from megarl.errors import BadInput
from megarl.platform import features


@dataclass(frozen=True)
class Layers:
    """The modules of one provider. Linears take Megatron's arguments and return (output, bias)."""

    name: str
    norm: type
    column: type
    row: type
    replicated: type  # held whole by every rank, which applies it to its own tokens: (config, inputs, outputs)
    moe: type
    norm_column: type | None = None  # a norm and the column-parallel linear after it; none: they stand apart
    # an attention module's core, of queries, keys, values and the packed row; none where the provider has none
    core: Callable[..., Any] = lambda *_, **__: None
    shard_names: Mapping[str, str] = field(default_factory=dict)  # in a layer -> in a checkpoint's shards


class Choice(NamedTuple):
    """`name`: torch or te; `why` in words."""

    name: str
    why: str


def choose(model: Model) -> Choice:
    """The provider of a `model` section on this machine. Raises BadInput when te is asked for and cannot be."""
    if model.layers == "torch":
        return Choice("torch", "model.layers: torch")
    problem = _problem(model)
    if problem is None:
        return Choice("te", f"Transformer Engine {features.installed('transformer-engine')}")
    why, instead = problem
    if model.layers == "te":
        raise BadInput(f"model.layers = 'te': {why}; set {instead}")
    return Choice("torch", why)


def _problem(model: Model) -> tuple[str, str] | None:
    """Why Transformer Engine cannot be the provider, and what can be set instead."""
    problem = features.transformer_engine_problem()
    if problem is not None:
        return problem, "model.layers: torch (or auto)"
    if model.dtype == "float64":
        return "Transformer Engine has no float64", "model.layers: torch (or auto)"
    if model.fp8 == "none":
        return None
    if model.dtype != "bfloat16":
        return f"its FP8 layers take bfloat16, and model.dtype = {model.dtype!r}", "model.dtype: bfloat16"
    problem = features.recipe_problem(model.fp8)
    if problem is not None:
        works = [name for name in features.TE_RECIPES if features.recipe_problem(name) is None]
        nearest = f"model.fp8: {works[0]}" if works else "model.fp8: none"
        return f"model.fp8 = {model.fp8!r}: {problem}", f"{nearest}, or model.layers: torch"
    if model.fp8 == "delayed" and model.fp8_skip_first + model.fp8_skip_last:
        skipped = f"fp8_skip_first + fp8_skip_last = {model.fp8_skip_first + model.fp8_skip_last}"
        return f"its delayed recipe holds for all layers, and {skipped}", "model.fp8: tensorwise"
    return None


def layers_of(name: str) -> Layers:
    """The modules of a provider by its name."""
    if name == "te":
        from megarl.models.layers.te_layers import TE

        return TE
    from megarl.models.layers.torch_layers import TORCH

    return TORCH
