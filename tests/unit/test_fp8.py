"""FP8 products against rounding by hand, torchao's and vLLM's quantisation and PyTorch's own FP8 product; and FP8 in a
whole model."""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megarl import platform

platform.setup()

from megarl.checkpoint import Checkpointer  # noqa: E402
from megarl.config.schema import Config, Model, Optimizer, Parallel  # noqa: E402
from megarl.convert import read_spec  # noqa: E402
from megarl.data.packing import micro_batches, pack  # noqa: E402
from megarl.errors import BadInput  # noqa: E402
from megarl.learner.policy import Policy  # noqa: E402
from megarl.learner.probes import probe_log_probs  # noqa: E402
from megarl.models.fp8 import (  # noqa: E402
    E4M3,
    E5M2,
    RECIPES,
    GroupedProduct,
    Product,
    advance,
    dequantize,
    multiply,
    multiply_codes,
    quantize,
    recipe_of,
    rounded,
)
from megarl.parallel import Mesh  # noqa: E402
from megarl.types import Batch  # noqa: E402
from megarl.verify import precision  # noqa: E402
from tests.dist.checkpoints import make  # noqa: E402
from tests.dist.learner_cases import fixed_batch, negative_log_likelihood  # noqa: E402
from tests.families import all_cases  # noqa: E402
from tests.unit.vectors import make_fp8_torchao as vectors  # noqa: E402

CASES = all_cases()
TILES = {"tensorwise": None, "blockwise": (1, 128), "mxfp8": (1, 32)}
BLOCK = (128, 128)


def spread(*shape: int, seed: int = 0) -> torch.Tensor:
    """Rows of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.randn(shape[0], 1, generator=generator).exp()


def by_hand(x: np.ndarray, tile: tuple[int, int] | None, dtype: torch.dtype, power_of_two: bool) -> np.ndarray:
    """A matrix rounded to the nearest of all numbers of an FP8 format, ties to the even code, tile by tile."""
    codes = torch.arange(256, dtype=torch.uint8).view(dtype).double().numpy()
    codes = codes[:128]  # positive ones, ascending; the largest finite one and no infinity
    codes = codes[np.isfinite(codes)]
    out = np.zeros(x.shape)
    high, wide = tile or x.shape
    for top in range(0, x.shape[0], high):
        for left in range(0, x.shape[1], wide):
            part = x[top : top + high, left : left + wide].astype(np.float32)
            amax = float(np.abs(part).max())
            scale = np.float32(codes[-1] / amax) if amax else np.float32(1)
            if power_of_two:
                scale = np.float32(2.0 ** np.floor(np.log2(scale)))
            wanted = np.abs((part * scale).astype(np.float64))
            distance = np.abs(wanted[..., None] - codes)
            nearest = distance.argmin(-1)
            above = np.minimum(nearest + 1, len(codes) - 1)
            tie = (np.take_along_axis(distance, above[..., None], -1)[..., 0] == distance.min(-1)) & (nearest % 2 == 1)
            number = codes[np.where(tie, above, nearest)] * np.float64(np.float32(1) / scale)
            out[top : top + high, left : left + wide] = np.sign(part) * number
    return out


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("tile", [None, (1, 128), (1, 32), (128, 128), (16, 64)])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_rounding_is_to_the_nearest_number_of_the_format(tile, dtype, power_of_two):
    """With tiles that the matrix does not fill, one of them zero."""
    x = spread(150, 200)
    x[:128, :128] = x[3] = 0
    mine = dequantize(quantize(x, tile, dtype, power_of_two), torch.float64)
    assert np.array_equal(mine.numpy(), by_hand(x.numpy(), tile, dtype, power_of_two))


@pytest.mark.parametrize(
    ("tile", "amax"), [(None, None), (None, 0.1), (None, 1e4), ((1, 128), None), ((1, 32), None), (BLOCK, None)]
)
def test_rounding_without_codes_is_that_of_the_codes(tile, amax):
    """Of subnormal numbers, ones beyond the format, transposes and numbers that are none, too."""
    x = spread(150, 200)
    x[7], x[8], x[:128, :128] = x[7] * 2**-9, x[8] * 2**-30, x[:128, :128] * 2**-40
    x[140, 190], x[3] = torch.inf, 0
    amax = None if amax is None else torch.tensor([[amax]])
    for dtype, power_of_two, finite in itertools.product((E4M3, E5M2), (False, True), (False, True)):
        for matrix in (x[:140], x[:140].t()) if finite else (x, x.t(), x[:, 1:]):
            for wide in (torch.float32, torch.float64):
                codes = dequantize(quantize(matrix, tile, dtype, power_of_two, amax), wide)
                mine = rounded(matrix, tile, dtype, power_of_two, amax, wide)
                assert mine.dtype == wide and torch.equal(mine.nan_to_num(nan=1e9), codes.nan_to_num(nan=1e9))
            assert not finite or mine.isfinite().all()


def test_agrees_with_torchao_bit_for_bit():
    """Tensorwise, blockwise (rows of activations, columns for a weight's gradient, blocks of weights) and mxfp8."""
    how = {
        "tensorwise": {},
        "tensorwise e5m2": dict(dtype=E5M2),
        "tensorwise power of two": dict(power_of_two=True),
        "rows 1 x 128": dict(tile=(1, 128)),
        "columns 128 x 1": dict(tile=(128, 1)),
        "blocks 128 x 128": dict(tile=BLOCK),
        "mxfp8": dict(tile=(1, 32), power_of_two=True),
    }
    expected = load_file(vectors.FILE)
    assert how.keys() == vectors.SHAPES.keys() and len(expected) == 2 * len(how)
    for case, settings in how.items():
        codes, factors = (expected[f"{case}/{name}"] for name in ("codes", "factors"))
        mine = quantize(vectors.matrix(case), **settings)
        assert torch.equal(mine.codes.view(torch.uint8), codes), case
        # what torchao does with tiles of zeros is another thing
        empty = mine.factors == 1
        assert torch.equal(mine.factors[~empty], factors[~empty]) and not empty.all(), case


def test_agrees_with_vllm_bit_for_bit():
    from vllm.model_executor.layers.quantization.utils.mxfp8_utils import _mxfp8_e4m3_quantize_torch
    from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape, scaled_quantize

    x = spread(256, 384)
    codes, exponents = _mxfp8_e4m3_quantize_torch(x)
    mine = quantize(x, (1, 32), power_of_two=True)
    assert same(mine.codes, codes) and torch.equal(mine.factors.log2() + 127, exponents.float())
    for tile, shape in ((None, (-1, -1)), ((1, 128), (1, 128)), (BLOCK, BLOCK)):
        # vLLM divides in two roundings: with a power of two for every tile's amax both are exact
        high, wide = tile or x.shape
        even = x.view(256 // high, high, 384 // wide, wide).clone()
        even /= even.abs().amax(dim=(1, 3), keepdim=True) * 2**0.001
        even[:, 0, :, 0] = 1
        even = even.view_as(x) * 2.0**5
        codes, factors = scaled_quantize(even, GroupShape(*shape), E4M3)
        mine = quantize(even, tile)
        assert same(mine.codes, codes) and torch.equal(mine.factors, factors.view_as(mine.factors))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("columns", [64, 37])  # contraction of a multiple of 16, and padded to one
def test_emulated_product_is_pytorchs_product_of_the_codes(columns):
    a, b = (spread(48, columns),), (spread(32, columns, seed=1), None, E5M2)
    mine, chip = multiply(rounded(*a), rounded(*b), torch.float32), multiply_codes(quantize(*a), quantize(*b), torch.float32)
    assert torch.allclose(mine, chip, rtol=1e-5, atol=1e-5 * float(chip.abs().max()))


@pytest.mark.parametrize("name", ["tensorwise", "delayed"])
def test_chips_that_multiply_codes_compute_the_emulated_numbers(name, monkeypatch):
    """By PyTorch's FP8 product on this processor; in the backward pass codes are kept and transposed."""

    def step() -> list[torch.Tensor]:
        amax = torch.zeros(3, 2)
        amax[:, 1] = torch.tensor([3.0, 1.0, 0.1])
        x, weight = spread(48, 64).requires_grad_(), spread(32, 64, seed=1).requires_grad_()
        out = Product(RECIPES[name], amax)(x[None], weight)
        out.backward(spread(48, 32, seed=2)[None])
        return [out, x.grad, weight.grad, amax]

    emulated = step()
    monkeypatch.setattr(platform, "has_fp8_products", lambda: True)
    for mine, chip in zip(emulated, step(), strict=True):
        assert torch.allclose(mine, chip, rtol=1e-5, atol=1e-5 * float(chip.abs().max()))


def test_infinite_and_missing_numbers_reach_the_result():
    for bad in (torch.inf, torch.nan):
        for tile, power_of_two in ((None, False), ((1, 32), True), (BLOCK, True)):
            x = spread(8, 64)
            x[2, 3] = bad
            for found in (dequantize(quantize(x, tile, power_of_two=power_of_two)), rounded(x, tile, E4M3, power_of_two)):
                assert found[2, 3].isnan()
    tiny = torch.full((1, 32), 1e-44)  # its scale would be infinite
    assert dequantize(quantize(tiny)).isfinite().all()


@pytest.mark.parametrize("format", ["e4m3", "hybrid"])
@pytest.mark.parametrize(
    ("name", "power_of_two"), [("tensorwise", False), ("blockwise", False), ("blockwise", True), ("mxfp8", True)]
)
def test_gradients_are_those_of_the_straight_through_function(name, power_of_two, format):
    """Every product's operands rounded by hand; and central differences of the product in which rounding is a constant.

    The differences are those of `sum(signs * (x w^T))`, whose gradient to the product FP8 holds without rounding.
    """
    recipe = recipe_of(Model(path="", fp8=name, fp8_format=format, fp8_power_of_two=power_of_two))
    gradients = {"e4m3": E4M3, "hybrid": E5M2}[format]
    tile, weight_tile = TILES[name], BLOCK if name == "blockwise" else TILES[name]
    # columns so different that the small ones of a block lose bits, even to a scale that is a power of two
    draw = torch.Generator().manual_seed(3)
    x, weight, g = (
        spread(*shape, seed=seed) * 2.0 ** torch.randint(-12, 1, (1, shape[1]), generator=draw)
        for seed, shape in enumerate(((160, 192), (144, 192), (160, 144)))
    )

    def part(matrix: torch.Tensor, tile, dtype=E4M3) -> np.ndarray:
        return by_hand(matrix.numpy(), tile, dtype, power_of_two)

    def near(mine: torch.Tensor, a: np.ndarray, b: np.ndarray) -> bool:
        """`a @ b`, up to as many float32 roundings as it has terms."""
        return bool((np.abs(mine.detach().numpy() - a @ b) <= len(b) * 2.0**-24 * (np.abs(a) @ np.abs(b))).all())

    def emulated(upstream: torch.Tensor) -> tuple[torch.Tensor, ...]:
        inputs, weights = x.clone().requires_grad_(), weight.clone().requires_grad_()
        out = Product(recipe)(inputs[None], weights)
        return out[0], *torch.autograd.grad(out, (inputs, weights), upstream[None])

    # as the gradient's products see them: blocks lie along what is summed over
    seen_x, seen_weight = part(x.t(), tile).T, part(weight.t(), weight_tile).T
    out, to_x, to_weight = emulated(g)
    assert near(out, part(x, tile), part(weight, weight_tile).T)
    assert near(to_x, part(g, tile, gradients), seen_weight) and near(to_weight, part(g.t(), tile, gradients), seen_x)

    signs = g.sign()
    _, to_x, to_weight = emulated(signs)
    for row, column in ((0, 0), (7, 191), (130, 45)):
        for found, turned, fixed, along in (
            (to_x, seen_x, seen_weight, signs.double().numpy()),
            (to_weight, seen_weight, seen_x, signs.double().numpy().T),
        ):
            values = []
            for step in (1e-3, -1e-3):
                moved = turned.copy()  # rounding added a constant: the matrix moves as what is rounded does
                moved[row, column] += step
                values.append((along * (moved @ fixed.T)).sum())
            assert float(found[row, column]) == pytest.approx((values[0] - values[1]) / 2e-3, rel=1e-4, abs=1e-5)


def test_experts_are_products_of_their_own():
    recipe, ends = RECIPES["tensorwise"], torch.tensor([20, 20, 33], dtype=torch.int32)
    x, weights = spread(33, 64).requires_grad_(), torch.stack([spread(48, 64, seed=e) for e in (1, 2, 3)]).requires_grad_()
    out = GroupedProduct(recipe, 3)(x, weights, ends)
    expected = torch.cat([Product(recipe)(x[:20], weights[0]), Product(recipe)(x[20:], weights[2])])
    assert torch.equal(out, expected)
    upstream = spread(33, 48, seed=4)
    mine, plain = (torch.autograd.grad(y, (x, weights), upstream) for y in (out, expected))
    assert all(torch.equal(a, b) for a, b in zip(mine, plain, strict=True)) and not mine[1][1].any()


@pytest.mark.parametrize("most_recent", [False, True])
def test_delayed_scales_come_from_the_past(most_recent):
    how = "most_recent" if most_recent else "max"
    recipe = recipe_of(Model(path="", fp8="delayed", fp8_history=2, fp8_amax=how, fp8_margin=1))
    amax = torch.zeros(3, 3)
    product, weight = Product(recipe, amax), torch.eye(16)
    used = []
    for largest in (4.0, 1.0, 2.0, 8.0, None, 1.0):  # None: a step in which the matrix did not occur
        if largest is not None:
            x = torch.zeros(16, 16)
            x[0, 0] = largest
            # what is larger than a scale allows for saturates
            used.append(float(product.operand(x * (1e6 if used else 1), "input", record=False).max()))
            x.requires_grad_()
            (product(x, weight) * 1e-3).sum().backward()
        advance(amax)
    # the first is its own; then twice (margin) the last one, or the largest of the last two
    past = [4, 8, 2, 4, 16] if most_recent else [4, 8, 8, 4, 16]
    assert used == pytest.approx(past, rel=1e-6)
    assert amax[1, 1] == 1 and amax[2, 1] == pytest.approx(1e-3)
    with torch.no_grad():
        product(torch.full((16, 16), 100.0), weight)
    assert amax[0, 0] == 0  # a pass without a gradient counts for nothing


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("fp8")
    make(path, hidden_size=128, intermediate_size=256, moe_intermediate_size=128, head_dim=32, num_hidden_layers=3)
    return str(path)


@pytest.fixture(scope="module")
def mesh():
    yield Mesh.build(Parallel())
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def policy_of(folder: str, mesh: Mesh, recompute: str = "none", **model) -> Policy:
    cfg = Config(model=Model(path=folder, **model), parallel=Parallel(recompute=recompute))
    return Policy.from_hf(folder, cfg, mesh, optimizer=Optimizer(lr=1e-3), total_steps=10)


def test_which_products_are_in_fp8(folder, mesh):
    policy = policy_of(folder, mesh, fp8="tensorwise", fp8_skip_first=1)
    names = [name for name, p in policy.modules[0].named_parameters() if hasattr(p, "product")]
    kinds = [f"self_attention.linear_{which}.weight" for which in ("proj", "qkv")]
    kinds += ["mlp.experts.weight1", "mlp.experts.weight2"]
    assert sorted(names) == sorted(f"decoder.layers.{layer}.{kind}" for layer in (1, 2) for kind in kinds)
    # the check of a weight sync has to see weights that differ, and not FP8
    probes = [[5, 6, 7, 8], [9, 10, 11]]
    mine, plain = (probe_log_probs(one, probes) for one in (policy, policy_of(folder, mesh)))
    assert all(np.allclose(a, b, atol=1e-5) for a, b in zip(mine, plain, strict=True))
    with pytest.raises(BadInput, match="fp8_skip_first . fp8_skip_last = 3: no layer of 3 is left in FP8"):
        policy_of(folder, mesh, fp8="tensorwise", fp8_skip_first=1, fp8_skip_last=2)


def whole_row() -> Batch:
    """160 tokens: a row of every recipe without padding."""
    draw = torch.Generator().manual_seed(0)
    batch = Batch(torch.randint(4, 120, (160,), generator=draw), torch.full((8,), 20), torch.ones(160))
    batch.response_mask[batch.offsets()[:-1]] = 0
    return batch.replace(token_weights=batch.response_mask * torch.rand(160, generator=draw) / 160)


def padded_step(folder: str, mesh: Mesh, rows: int, embedding: float, recompute: str, **model) -> list[torch.Tensor]:
    """Log-probs, then gradients, then histories of a step over a row of so many tokens, 160 of them real, the others with
    an embedding of this size."""
    cfg = Config(model=Model(path=folder, **model), parallel=Parallel(recompute=recompute))
    spec = replace(read_spec(folder), qkv_bias=True, output_bias=True)
    policy = Policy(spec, cfg, mesh, optimizer=Optimizer(lr=1e-3), total_steps=10)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.modules[0].named_parameters():
            parameter.normal_(float("norm" in name), 10.0 if name.endswith("bias") else 0.1)
        policy.modules[0].embedding.word_embeddings.weight[0] = embedding
    policy.optimizer.reload_model_params()
    packed = [pack(whole_row(), range(8), policy.layout, rows)]
    assert len(packed[0].tokens) == rows and int((packed[0].held >= 0).sum()) == 160
    log_probs, _ = policy.log_probs(packed)
    result = policy.train_step(packed, negative_log_likelihood)
    assert result.applied
    buffers = [buffer for name, buffer in policy.modules[0].named_buffers() if name.endswith("_amax")]
    assert len(buffers) == (4 * spec.num_layers if cfg.model.fp8 == "delayed" else 0)
    return [*log_probs, *(p.main_grad for p in policy.chunks[0].parameters()), *buffers]


@pytest.mark.parametrize(("recipe", "recompute"), [("tensorwise", "selective"), ("delayed", "full"), ("mxfp8", "none")])
def test_padding_has_no_part_in_scales(folder, mesh, recipe, recompute):
    """What stands in rows of padding changes no bit of a log-prob, gradient or history, even where biases are.

    Their number changes the order in which products are added up, and so last bits, from which rounding to FP8 makes
    large steps; but almost none of them in float64, whose last bits are below those that are rounded.
    """
    small, huge = (padded_step(folder, mesh, 320, size, recompute, fp8=recipe) for size in (0.1, 1e4))
    assert all(torch.equal(a, b) for a, b in zip(small, huge, strict=True))
    short, long = (padded_step(folder, mesh, rows, 1e4, recompute, fp8=recipe, dtype="float64") for rows in (160, 320))
    for a, b in zip(short, long, strict=True):
        close = 1e-9 if a.dtype is torch.float64 else 1e-6  # histories are float32
        if a.ndim == 3 and a.dtype is torch.float32:  # of an expert that only padding chose the weight is known as well
            nobody = a[:, 0, 1] == 0
            b = b.clone()
            b[nobody, 1] = a[nobody, 1]
        assert torch.allclose(a, b, rtol=close, atol=close / 10 * float(a.abs().max()))


def test_first_ratio_is_1_and_the_history_moves_by_steps(folder, mesh):
    """Old log-probs, read with the scales of a step, are those of its training pass."""
    policy = policy_of(folder, mesh, fp8="delayed", dtype="bfloat16")
    packed = micro_batches(fixed_batch(), 64, policy.layout)
    assert len(packed) > 1
    amax = policy.modules[0].decoder.layers[0].self_attention.linear_qkv.weight_amax
    assert amax.dtype == torch.float32
    for step in range(2):
        old = torch.cat(policy.log_probs(packed)[0])
        seen: list[torch.Tensor] = []

        def loss(batch, log_probs, entropy, shards, seen=seen):
            seen.append(log_probs.detach().float())
            return -(batch.token_weights * log_probs).sum(), {}

        assert policy.train_step(packed, loss).applied
        assert torch.equal(torch.cat(seen), old[old != 0])
        assert (amax[:, 1 + step] > 0).all() and not amax[:, 2 + step :].any() and not amax[:, 0].any()


def test_verify_precision_names_the_layer_that_loses_most(folder, mesh):
    cfg = Config(model=Model(path=folder))
    batches = [precision._batch(cfg, policy_of(folder, mesh).spec, part) for part in (0, 1)]
    settings = {"float32": {}, "bfloat16": dict(dtype="bfloat16"), "tensorwise": dict(fp8="tensorwise")}
    settings["last"] = dict(fp8="tensorwise", fp8_skip_first=2)
    exact, *others = (precision._measure(cfg, Path(folder), mesh, batches, model) for model in settings.values())
    bf16, fp8, last = (precision.Gap.of(other, exact) for other in others)
    assert 0 < bf16.layers[0] < fp8.layers[0] < 0.3 and fp8.worst[0] in range(3)
    assert last.layers[:2] == [0, 0] and last.worst[:2] == (2, 0) and last.layers[2] > 0.01
    assert fp8.mean < fp8.max and 0 < bf16.gradient < fp8.gradient and 0 < last.gradient < fp8.gradient < 1
    text = precision.render({"bfloat16": bf16, "last": last})
    assert len(text) == 1 + 3 + 3 + 2 and text[-1].startswith("last: layer 2 adds most (0.0e+00 -> ")


def test_sizes_that_fp8_cannot_multiply(tmp_path, mesh):
    make(tmp_path, moe_intermediate_size=32, num_hidden_layers=1)
    with pytest.raises(BadInput) as error:
        policy_of(str(tmp_path), mesh, fp8="blockwise")
    assert str(error.value) == (
        "model.fp8 = 'blockwise': layer 0 self_attention.linear_qkv.weight is 192 x 64, and the recipe needs multiples of 16 x "
        "128; set model.fp8: mxfp8"
    )


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss"])
def test_verify_precision_of_a_model_that_is_too_large(name, tmp_path, mesh, monkeypatch, capsys):
    """A small one of its kind, with latent attention or with biases, that every recipe can multiply."""
    CASES[name].configuration().save_pretrained(tmp_path)
    monkeypatch.setattr(precision, "LARGEST", 0)
    monkeypatch.setattr(precision.Mesh, "build", lambda parallel: mesh)  # the groups that this process has
    monkeypatch.setattr(precision.launcher, "terminal", lambda: sys.stdout)
    precision.verify_precision(Config(model=Model(path=str(tmp_path), fp8_skip_first=2, fp8_skip_last=1)))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{tmp_path}: 0.0B parameters are too many here; a random {name} of 4 layers, hidden 128")
    assert lines[1].split()[-5:] == ["bfloat16", *RECIPES]
    assert lines[-1] == "FP8 recipes on top of float32; layers 0, 3 without FP8"
    rows = {line[:24].strip(): [float(number) for number in line.split()[-5:]] for line in lines[2:9]}
    # a row is padded to what the recipe needs, and its length decides the order of some sums
    assert max(rows["hidden after layer 0"][1:]) < 1e-6 and all(1e-3 < x < 0.5 for x in rows["hidden after layer 3"])
    with pytest.raises(BadInput, match="fp8_skip_first . fp8_skip_last = 4: no layer of 4 is left in FP8"):
        precision.verify_precision(Config(model=Model(path=str(tmp_path), fp8_skip_first=2, fp8_skip_last=2)))
    named = [line for line in lines if "adds most" in line]
    assert len(named) == 5 and all(": layer 1 " in line or ": layer 2 " in line for line in named[1:])


def test_past_of_delayed_scales_that_a_checkpoint_lacks(folder, mesh, tmp_path):
    def checkpointer(trained: bool = False, **model) -> Checkpointer:
        out, policy = Checkpointer(tmp_path, mesh, keep=1), policy_of(folder, mesh, **model)
        out.register("policy", policy)
        if trained:  # Megatron saves no optimizer without a step
            policy.train_step(micro_batches(fixed_batch(), 512, policy.layout), negative_log_likelihood)
        return out

    checkpointer(trained=True, fp8="tensorwise").save(1)
    with pytest.raises(BadInput, match=r"step_000001: holds no past of model.fp8 = 'delayed'; resume with the model.fp8 that"):
        checkpointer(fp8="delayed").load_latest()
    checkpointer(trained=True, fp8="delayed", fp8_history=2).save(2)
    with pytest.raises(BadInput, match=r"^model.fp8_history = 3: .*step_000002 holds 2 steps; set 2$"):
        checkpointer(fp8="delayed", fp8_history=3).load_latest()
    assert checkpointer(fp8="delayed", fp8_history=2).load_latest() == checkpointer().load_latest() == 2
