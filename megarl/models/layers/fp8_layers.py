"""FP8 in a built model: which weights multiply in it, what padding does meanwhile, and the state of delayed scales."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megarl import platform
from megarl.config.schema import Model
from megarl.errors import BadInput
from megarl.models.fp8 import RECIPES, GroupedProduct, Product, Recipe, advance, recipe_of
from megarl.models.moe.experts import GroupedExperts
from megarl.models.spec import ModelSpec
from megarl.parallel import Mesh
from megarl.types import MicroBatch

AMAX = "_amax"  # after a weight's name: that of its buffer


class FP8Layers:
    """Gives the linears and experts of a model's layers FP8 products, except in the first and last layers that are kept.

    In higher precision stay the embedding, routers, gates, norms, attention's scores, and the output layer or head.
    A matrix is what a rank multiplies: its shard of a weight, and all tokens of its packed row, whose padding has no
    part in any scale. Scales of `tensorwise` so depend on the layout a little, as they do in Transformer Engine.

    The state of `delayed` moves once an optimizer step (`advance`), and not with every micro-batch as in Transformer
    Engine: the pass that reads old log-probs and the first update then have the same scales, so that ratios start at 1.
    """

    def __init__(self, chunks: Sequence[nn.Module], recipe: Recipe, model: Model, spec: ModelSpec, mesh: Mesh) -> None:
        """Raises BadInput, naming a recipe that works, for weights of sizes that the recipe cannot multiply."""
        self.recipe, self.mesh = recipe, mesh
        check_skipped(model, spec)
        self._weights: list[tuple[nn.Parameter, Product | GroupedProduct]] = []  # those in FP8
        self._products: list[Product] = []
        self._linears: list[Tensor] = []  # buffers of amaxes
        self._experts: list[Tensor] = []
        self._expert_groups: tuple[Any, ...] = ()
        weights: dict[str, nn.Parameter] = {}
        for layer in (layer for chunk in chunks for layer in chunk.decoder.layers):
            number = layer.layer_number - 1
            is_fp8 = model.fp8_skip_first <= number < spec.num_layers - model.fp8_skip_last
            for name, module in layer.named_modules():
                for which, weight in _weights(name, module).items():
                    # other layers have the buffers too, since a checkpoint stacks all layers
                    product = self._product(module, which, weight)
                    if is_fp8:
                        weights[f"layer {number} {name}.{which}"] = weight
                        self._weights.append((weight, product))
                        weight.product = product
            if is_fp8:
                _Padding(layer, mesh)
        _check_sizes(recipe, weights, model, mesh)

    @classmethod
    def of(cls, chunks: Sequence[nn.Module], model: Model, spec: ModelSpec, mesh: Mesh) -> FP8Layers | None:
        """None when the `model` section asks for no FP8."""
        recipe = recipe_of(model)
        return None if recipe is None else cls(chunks, recipe, model, spec, mesh)

    def _product(self, module: nn.Module, which: str, weight: nn.Parameter) -> Product | GroupedProduct:
        grouped, amax = isinstance(module, GroupedExperts), None
        if self.recipe.history:
            shape = (*((len(weight),) if grouped else ()), 3, 1 + self.recipe.history)
            amax = torch.zeros(shape, dtype=torch.float32, device=platform.device())
            module.register_buffer(which + AMAX, amax)
            (self._experts if grouped else self._linears).append(amax)
        if not grouped:
            self._products.append(Product(self.recipe, amax))
            return self._products[-1]
        self._expert_groups = (module.etp_group, module.dp_group)
        product = GroupedProduct(self.recipe, len(weight), amax)
        self._products += product.products
        return product

    def real_rows(self, micro_batch: MicroBatch) -> Tensor | None:
        """[n] bool, on the device: the rows that are not padding; None: all."""
        real = micro_batch.held >= 0
        return None if real.all() else real.to(platform.device())

    @torch.no_grad()
    def advance(self) -> None:
        """The step's amaxes, over all ranks with shards or tokens of the same matrices, become the newest of the past.

        Experts' are reduced over the ranks that have the same experts. (Transformer Engine reduces the k-th experts of
        all expert-parallel ranks together.) Collective.
        """
        mesh = self.mesh
        dense = (mesh.tp_group, mesh.cp_group, mesh.dp_group)
        for buffers, groups in ((self._linears, dense), (self._experts, self._expert_groups)):
            if not buffers:
                continue
            running = torch.cat([buffer[..., 0].flatten() for buffer in buffers]).nan_to_num(nan=torch.inf)
            for group in groups:
                if group.size() > 1:
                    dist.all_reduce(running, op=dist.ReduceOp.MAX, group=group)
            for buffer, part in zip(buffers, running.split([b[..., 0].numel() for b in buffers]), strict=True):
                buffer[..., 0] = part.view(buffer.shape[:-1])
                advance(buffer)

    @contextlib.contextmanager
    def calibrating(self) -> Iterator[None]:
        """Passes without a gradient count for the scales of `delayed` too."""
        for product in self._products:
            product.calibrating = True
        try:
            yield
        finally:
            for product in self._products:
                product.calibrating = False


@contextlib.contextmanager
def multiplying(chunks: Sequence[nn.Module], product: Callable[[int], Any], layers: range) -> Iterator[None]:
    """In the block the weights of these layers multiply by products of `product(experts)`, 0 experts for a linear, and
    all others without FP8."""
    found = [
        (weight, layer.layer_number - 1, isinstance(module, GroupedExperts))
        for chunk in chunks
        for layer in chunk.decoder.layers
        for name, module in layer.named_modules()
        for weight in _weights(name, module).values()
    ]
    before = [weight.__dict__.pop("product", None) for weight, _, _ in found]
    for weight, layer, grouped in found:
        if layer in layers:
            weight.product = product(len(weight) if grouped else 0)
    try:
        yield
    finally:
        for (weight, _, _), former in zip(found, before, strict=True):
            weight.__dict__.pop("product", None)
            if former is not None:
                weight.product = former


class _Padding:
    """Keeps rows of padding 0 where a layer multiplies, so that they raise no amax.

    Zeros stay zeros in norms, MLPs and experts without biases; attention may make other numbers of them, and is put
    right before and after its output projection. What else is computed from padding is read by nobody.
    """

    def __init__(self, layer: nn.Module, mesh: Mesh) -> None:
        self._mesh = mesh
        self._real: Tensor | None = None  # of the row that the layer computes now
        layer.register_forward_pre_hook(self._enter, with_kwargs=True)
        layer.self_attention.linear_proj.register_forward_pre_hook(self._project)
        layer.self_attention.register_forward_hook(self._leave_attention)

    def _enter(self, _layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        self._real = kwargs["packed_seq_params"].real
        return args, kwargs | {"hidden_states": self._own(kwargs["hidden_states"])}

    def _project(self, _linear: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (_without(args[0], self._real),)

    def _leave_attention(self, _attention: nn.Module, _args: tuple, out: tuple) -> tuple:
        hidden, bias = out
        return out if self._real is None else (self._own(hidden if bias is None else hidden + bias), None)

    def _own(self, hidden: Tensor) -> Tensor:
        """`hidden [n / tp, 1, H]` under sequence parallelism, `[n, 1, H]` without."""
        real = self._real
        if real is not None and len(hidden) < len(real):
            real = real.view(self._mesh.tp, -1)[self._mesh.tp_rank]
        return _without(hidden, real)


def _without(x: Tensor, real: Tensor | None) -> Tensor:
    return x if real is None else x.masked_fill(~real[:, None, None], 0.0)


def _weights(name: str, module: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that a module of a layer multiplies with, in FP8 where a recipe is on."""
    if isinstance(module, GroupedExperts):
        return {"weight1": module.weight1, "weight2": module.weight2}
    weight = getattr(module, "weight", None)  # none of Transformer Engine's grouped linears
    return {"weight": weight} if name.split(".")[-1].startswith("linear_") and weight is not None else {}


def check_skipped(model: Model, spec: ModelSpec, setting: str = "model.fp8") -> None:
    """Raises BadInput where the `model` section leaves no layer in FP8, which `setting` asks for."""
    kept = model.fp8_skip_first + model.fp8_skip_last
    if kept >= spec.num_layers:
        raise BadInput(
            f"model.fp8_skip_first + fp8_skip_last = {kept}: no layer of {spec.num_layers} is left in FP8; lower them, or set "
            f"{setting}: none"
        )


def _check_sizes(
    recipe: Recipe, weights: dict[str, nn.Parameter], model: Model, mesh: Mesh, offered: Collection[str] = tuple(RECIPES)
) -> None:
    """`offered`: the recipes that one can be advised to set."""
    # of experts: [E, N, K], or [E, 2, F, K] for two matrices in one product
    sizes = {name: (weight[0].numel() // weight.shape[-1] if weight.ndim > 2 else len(weight), weight.shape[-1])
             for name, weight in weights.items()}  # fmt: skip

    def fits(other: Recipe, size: tuple[int, int]) -> bool:
        return not any(number % multiple for number, multiple in zip(size, other.multiples))

    for name, size in sizes.items():
        if not fits(recipe, size):
            others = (RECIPES[name] for name in RECIPES if name in offered)
            working = (other.name for other in others if all(fits(other, size) for size in sizes.values()))
            better = next(working, f"none ({model.dtype})")
            cut = " on a rank" if max(mesh.tp, mesh.etp) > 1 else ""
            raise BadInput(
                f"model.fp8 = {recipe.name!r}: {name} is {size[0]} x {size[1]}{cut}, and the recipe needs multiples of "
                f"{recipe.multiples[0]} x {recipe.multiples[1]}; set model.fp8: {better}"
                + (", or lower parallel.tp and etp" if cut else "")
            )
