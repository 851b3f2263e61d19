"""FP8 of Transformer Engine's layers: Megarl's settings as Megatron's, and what stays outside of the scales."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from megarl import platform
from megarl.config.schema import Model
from megarl.models.fp8 import E4M3, Recipe, recipe_of
from megarl.models.layers.fp8_layers import _check_sizes, _Padding, check_skipped
from megarl.models.spec import ModelSpec
from megarl.parallel import Mesh
from megarl.platform import features, te_patches
from megarl.types import MicroBatch


def fp8_settings(model: Model) -> dict[str, Any]:
    """The `model` section's FP8 as arguments of Megatron's `TransformerConfig`; none of them without FP8."""
    recipe = recipe_of(model)
    if recipe is None:
        return {}
    return dict(
        fp8="e4m3" if recipe.gradients is E4M3 else "hybrid",
        fp8_recipe=recipe.name,
        fp8_param=model.fp8_params,
        fp8_margin=model.fp8_margin,
        fp8_amax_history_len=model.fp8_history,
        fp8_amax_compute_algo=model.fp8_amax,
        first_last_layers_bf16=model.fp8_skip_first + model.fp8_skip_last > 0,
        num_layers_at_start_in_bf16=model.fp8_skip_first,
        num_layers_at_end_in_bf16=model.fp8_skip_last,
    )


class TEFP8:
    """What a policy does about FP8 when Transformer Engine computes it; see `FP8Layers` for the torch layers.

    In higher precision stay what `FP8Layers` keeps. Rows of padding are 0 where a layer multiplies, so that they raise no
    amax; experts' rows are padded with zeros too, by Megatron, before their products. (Its router padding instead,
    `moe_router_padding_for_fp8`, sends real tokens to further experts, whose scales would count them.) Padding still touches:
    a tile of `blockwise` or `mxfp8` may hold rows of padding beside real ones, which its scale does not see as they are 0;
    and experts with biases (gpt-oss) make of padding the activation of a bias, which counts for linear_fc2's input.

    Scales of `delayed` move with every micro-batch that has a gradient, and start at 1; an expert-parallel rank's k-th
    expert shares its amax with those of the other ranks.
    """

    def __init__(self, chunks: Sequence[nn.Module], recipe: Recipe, model: Model, spec: ModelSpec, mesh: Mesh) -> None:
        """Raises BadInput, naming what works, for sizes or a number of kept layers that cannot be."""
        check_skipped(model, spec)
        if recipe.name == "blockwise":
            te_patches.scale_blocks(recipe.power_of_two)
        self._configs = [chunk.config for chunk in chunks]
        weights: dict[str, nn.Parameter] = {}
        for layer in (layer for chunk in chunks for layer in chunk.decoder.layers):
            number = layer.layer_number - 1
            if not model.fp8_skip_first <= number < spec.num_layers - model.fp8_skip_last:
                continue
            for name, parameter in layer.named_parameters():
                if ".linear_" in name and parameter.ndim == 2:
                    weights[f"layer {number} {name}"] = parameter
            _Padding(layer, mesh)
        offered = [name for name in features.TE_RECIPES if features.recipe_problem(name) is None]
        _check_sizes(recipe, weights, model, mesh, offered)

    def real_rows(self, micro_batch: MicroBatch) -> Tensor | None:
        """[n] bool, on the device: the rows that are not padding; None: all."""
        real = micro_batch.held >= 0
        return None if real.all() else real.to(platform.device())

    def advance(self) -> None:
        """Transformer Engine moves its scales itself."""

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """In the block layers compute without FP8."""
        before = [config.fp8 for config in self._configs]
        for config in self._configs:
            config.fp8 = None
        try:
            yield
        finally:
            for config, fp8 in zip(self._configs, before, strict=True):
                config.fp8 = fp8

    @contextlib.contextmanager
    def calibrating(self) -> Iterator[None]:
        """Passes without a gradient cannot count for its scales."""
        yield
