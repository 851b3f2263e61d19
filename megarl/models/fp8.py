"""FP8 matrix products: how matrices are scaled and rounded to 8 bits, and the three products of a linear layer.

What is emulated: every operand of the three products (`y = x w^T`, its gradient to x, its gradient to w) is rounded to
FP8 with the scales of a recipe and multiplied as the number its code stands for. What is not: a chip's narrower
accumulators (Hopper adds up in about 14 bits: DeepSeek-V3, 2412.19437, section 3.3.2), communication in FP8, and memory:
activations take as much as without FP8, and weights have no second copy.

Where the chip can, recipes with one scale a matrix multiply the codes themselves (`torch._scaled_mm`); the others multiply
dequantised numbers everywhere.

Recipes, by their names in Transformer Engine and Megatron:
- `tensorwise`: one scale a matrix, from its own largest magnitude (amax);
- `delayed`: one scale a matrix, from the amax of past steps;
- `blockwise`: a scale for 1 x 128 elements of activations and gradients and for 128 x 128 of weights (DeepSeek-V3, 3.3);
- `mxfp8`: a power of two for 32 elements along the contraction (OCP Microscaling v1.0), chosen so that none saturates, as
  Blackwell's conversion does; the specification's own suggestion rounds it down and saturates some.
E4M3 throughout, or E5M2 for gradients (`hybrid`), as default of the first two.

A matrix is always `[rows, contraction]` here: both operands of a product have the dimension that is summed over last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megarl import platform
from megarl.config.schema import Model

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
Role = Literal["input", "weight", "gradient"]
ROLES: tuple[Role, ...] = ("input", "weight", "gradient")
Tile = tuple[int, int] | None  # rows x contraction that share a scale; None: the whole matrix
EXPONENT = 0x7F800000  # its bits in a float32


class Quantised(NamedTuple):
    """`codes [n, k]` and their tiles' `factors [ceil(n / r), ceil(k / c)]` (float32): an element is code x factor."""

    codes: Tensor
    factors: Tensor
    tile: Tile

    def t(self) -> Quantised:
        """The transposed matrix, a view."""
        return Quantised(self.codes.t(), self.factors.t(), self.tile and self.tile[::-1])


Operand = Quantised | Tensor  # of a product: codes where the chip multiplies them, elsewhere the numbers they stand for


def quantize(
    x: Tensor, tile: Tile = None, dtype: torch.dtype = E4M3, power_of_two: bool = False, amax: Tensor | None = None
) -> Quantised:
    """A matrix `[n, k]` in FP8, rounded to nearest even; tiles at the end may be smaller.

    The scale of a tile takes its largest magnitude, or `amax [1, 1]` in place of it, to the largest of `dtype`, beyond
    which elements saturate. A tile of zeros has the factor 1; one with a NaN or infinity becomes NaN as a whole, so that
    no overflow is lost. `power_of_two`: scales are rounded down to one.
    """
    codes, scale = _scaled(x, tile, dtype, power_of_two, amax)
    return Quantised(_matrix(codes.to(dtype), x), 1 / scale[:, 0, :, 0], tile)


def rounded(
    x: Tensor,
    tile: Tile = None,
    dtype: torch.dtype = E4M3,
    power_of_two: bool = False,
    amax: Tensor | None = None,
    wide: torch.dtype = torch.float32,
) -> Tensor:
    """`dequantize(quantize(x, ..), wide)`, several times faster on processors that convert FP8 one by one.

    Adding and taking away a number so large that the bits below the format's do not fit rounds to nearest even.
    """
    if not x.is_contiguous() and x.t().is_contiguous():  # worked on, and given back, in the order of its memory
        return rounded(x.t(), tile and tile[::-1], dtype, power_of_two, amax, wide).t()
    codes, scale = _scaled(x, tile, dtype, power_of_two, amax)
    large = codes.view(torch.int32).bitwise_and(EXPONENT).view(torch.float32)  # the power of two at or below
    info = torch.finfo(dtype)
    large.clamp_(min=info.smallest_normal).mul_(1.5 * info.eps / torch.finfo(torch.float32).eps)
    return _matrix(codes.add_(large).sub_(large).to(wide).mul_(1 / scale), x)


def _scaled(x: Tensor, tile: Tile, dtype: torch.dtype, power_of_two: bool, amax: Tensor | None) -> tuple[Tensor, Tensor]:
    """`_tiles` times their scales, within the format, and the scales `[ceil(n / r), 1, ceil(k / c), 1]`; float32."""
    tiles = _tiles(x.float(), tile)
    scale = scales(tiles.abs().amax((1, 3), keepdim=True) if amax is None else amax[:, None, :, None], dtype, power_of_two)
    largest = torch.finfo(dtype).max
    return (tiles * scale).clamp_(-largest, largest), scale


def scales(amax: Tensor, dtype: torch.dtype, power_of_two: bool = False) -> Tensor:
    """What numbers up to `amax` are multiplied with so that they just fit `dtype`; 1 for an amax of 0."""
    # one division of tensors: PyTorch divides a number by a tensor in two roundings
    scale = torch.full_like(amax, torch.finfo(dtype).max).div_(amax).clamp_(max=torch.finfo(torch.float32).max)
    scale = torch.where(amax > 0, scale, torch.where(amax == 0, 1.0, torch.nan))
    if not power_of_two:
        return scale
    mantissa, exponent = scale.frexp()
    # 2^-127, the least of the e8m0 format of such scales, is the factor at the upper end
    return torch.ldexp(mantissa.sign(), (exponent - 1).clamp(-127, 127))


def dequantize(x: Quantised, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers that codes stand for, `[n, k]`."""
    return _matrix(_tiles(x.codes.to(dtype), x.tile) * x.factors[:, None, :, None], x.codes)


def _tiles(x: Tensor, tile: Tile) -> Tensor:
    """`[ceil(n / r), r, ceil(k / c), c]`, zeros beyond the matrix."""
    rows, columns = x.shape
    high, wide = tile or (rows, columns)
    padding = (0, -columns % wide, 0, -rows % high)
    padded = F.pad(x, padding) if any(padding) else x
    return padded.reshape(padded.shape[0] // high, high, padded.shape[1] // wide, wide)


def _matrix(tiles: Tensor, like: Tensor) -> Tensor:
    """The matrix in `_tiles`; contiguous, since products of a matrix's part can be a thousand times slower on a CPU."""
    rows, columns = like.shape
    return tiles.flatten(2).flatten(0, 1)[:rows, :columns].contiguous()


@dataclass(frozen=True)
class Recipe:
    """How the operands of a layer's products become FP8."""

    name: str
    tile: Tile  # of activations and gradients
    weight_tile: Tile
    multiples: tuple[int, int]  # of a weight's outputs and inputs
    gradients: torch.dtype
    power_of_two: bool = False
    history: int = 0  # past steps that scales come from; 0: scales are the matrix's own
    most_recent: bool = False  # of these steps, the last one counts alone, not the largest amax
    margin: int = 0  # powers of two that a delayed scale leaves free

    @property
    def rows(self) -> int:
        """Tokens of a row come in multiples of this: they are what a weight's gradient is summed over."""
        return self.multiples[1]


RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("blockwise", (1, 128), (128, 128), (16, 128), E4M3),
        Recipe("mxfp8", (1, 32), (1, 32), (32, 32), E4M3, power_of_two=True),
        Recipe("tensorwise", None, None, (16, 16), E5M2),
        Recipe("delayed", None, None, (16, 16), E5M2, history=1),
    )
}


def recipe_of(model: Model) -> Recipe | None:
    """What the `model` section asks for; None: no FP8."""
    if model.fp8 == "none":
        return None
    recipe = RECIPES[model.fp8]
    if model.fp8_format is not None:
        recipe = replace(recipe, gradients={"e4m3": E4M3, "hybrid": E5M2}[model.fp8_format])
    if recipe.name == "blockwise":
        recipe = replace(recipe, power_of_two=model.fp8_power_of_two)
    if recipe.history:
        most_recent = model.fp8_amax == "most_recent"
        recipe = replace(recipe, history=model.fp8_history, most_recent=most_recent, margin=model.fp8_margin)
    return recipe


class Product:
    """`x [.., K] @ weight[N, K]^T` in FP8, and its gradients; what a parameter's attribute `product` may hold.

    `amax [3, 1 + history]` float32, of a delayed recipe: for input, weight and gradient the largest magnitude of the
    running step, then those of past steps, newest first; 0: none yet. Until there is one a matrix is scaled by its own.
    (Transformer Engine starts with a scale of 1, in which a first step's small gradients would vanish.)
    """

    def __init__(self, recipe: Recipe, amax: Tensor | None = None, expert: int | None = None) -> None:
        """`expert`: which of `amax [E, ..]` is this product's."""
        self.recipe, self._amax, self._expert = recipe, amax, expert
        self.calibrating = False  # record passes without a gradient too

    @property
    def amax(self) -> Tensor:
        # not a view made once: parking a model on the host moves the buffer
        return self._amax if self._expert is None else self._amax[self._expert]

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        return _Linear.apply(x, weight, self, torch.is_grad_enabled() or self.calibrating)

    def operand(self, x: Tensor, role: Role, record: bool) -> Operand:
        """A matrix of a product, contraction last. `record`: it counts for the scales of later steps."""
        recipe = self.recipe
        tile = recipe.weight_tile if role == "weight" else recipe.tile
        dtype = recipe.gradients if role == "gradient" else E4M3
        amax = self._delayed(x, ROLES.index(role), record) if recipe.history else None
        if recipe.tile is None and platform.has_fp8_products():
            return quantize(x, tile, dtype, recipe.power_of_two, amax)
        return rounded(x, tile, dtype, recipe.power_of_two, amax, torch.promote_types(x.dtype, torch.float32))

    def _delayed(self, x: Tensor, role: int, record: bool) -> Tensor:
        own, past = x.abs().amax().float(), self.amax[role, 1:]
        if record:
            self.amax[role, 0] = torch.maximum(self.amax[role, 0], own)
        known = past[0] if self.recipe.most_recent else past.max()
        amax = torch.where(known > 0, known * 2**self.recipe.margin, own)
        return torch.where(own.isfinite(), amax, own)[None, None]


def advance(amax: Tensor) -> None:
    """The running step becomes the newest past one of `amax [.., 3, 1 + history]`, in place.

    A matrix that did not occur in it, or was not finite, keeps its past.
    """
    running = amax[..., :1]
    moved = torch.cat([torch.zeros_like(running), amax[..., :-1]], dim=-1)
    kept = torch.cat([torch.zeros_like(running), amax[..., 1:]], dim=-1)
    amax.copy_(torch.where((running > 0) & running.isfinite(), moved, kept))


class GroupedProduct:
    """`Product`s of several experts: rows `ends[e-1]:ends[e]` of `x` times `weights[e]^T`.

    `amax [E, 3, 1 + history]`: each expert has scales of its own. Real kernels pad an expert's rows to what FP8 needs,
    with zeros, which change no scale and no product.
    """

    def __init__(self, recipe: Recipe, experts: int, amax: Tensor | None = None) -> None:
        self.products = [Product(recipe, amax, expert) for expert in range(experts)]

    def __call__(self, x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        """x `[n, K]`, weights `[E, N, K]`, ends `[E]` int32: `[n, N]`."""
        if not len(x):  # every weight still gets a gradient
            return x @ weights.sum(0).t()
        sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
        parts = zip(self.products, x.split(sizes), weights.unbind(), strict=True)
        return torch.cat([product(rows, weight) for product, rows, weight in parts if len(rows)])


class _Linear(torch.autograd.Function):
    """Matrices with one scale are rounded once for both of their products; those of tiles, which lie along the
    contraction, once for each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, product: Product, record: bool) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        operand = product.operand(rows, "input", record)
        ctx.product = product
        ctx.is_rounded = product.recipe.tile is None and (isinstance(operand, Quantised) or operand.dtype == x.dtype)
        kept = operand if ctx.is_rounded else rows
        ctx.save_for_backward(weight, *(kept[:2] if isinstance(kept, Quantised) else (kept,)))
        return multiply(operand, product.operand(weight, "weight", record), x.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        weight, *kept = ctx.saved_tensors
        product, rows = ctx.product, Quantised(*kept, None) if len(kept) > 1 else kept[0]
        grads = grad.reshape(-1, grad.shape[-1])
        out = product.operand(grads, "gradient", True)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = multiply(out, product.operand(weight.t(), "weight", False), grad.dtype)
            grad_x = grad_x.view(*grad.shape[:-1], -1)
        out = out.t() if product.recipe.tile is None else product.operand(grads.t(), "gradient", True)
        rows = rows.t() if ctx.is_rounded else product.operand(rows.t(), "input", False)
        return grad_x, multiply(out, rows, weight.dtype), None, None


def multiply(a: Operand, b: Operand, dtype: torch.dtype) -> Tensor:
    """`a [m, k] @ b[n, k]^T` in `dtype`, added up in float32 or wider."""
    if isinstance(a, Quantised):
        return multiply_codes(a, b, dtype)
    return platform.linear(a, b).to(dtype)


def multiply_codes(a: Quantised, b: Quantised, dtype: torch.dtype) -> Tensor:
    """`multiply` of matrices with one factor each by the chip's FP8 product, for which k is padded to 16."""
    first, second = (_padded(x.codes) for x in (a, b))
    return torch._scaled_mm(first, second.t(), a.factors.view(()), b.factors.view(()), out_dtype=dtype)


def _padded(codes: Tensor) -> Tensor:
    return F.pad(codes.view(torch.uint8), (0, -codes.shape[1] % 16)).contiguous().view(codes.dtype)
