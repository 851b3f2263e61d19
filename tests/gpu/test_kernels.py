"""The CUDA platform's kernels on the device, against the same formulas in float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megarl import platform
from megarl.models.fp8 import E4M3, E5M2, RECIPES, dequantize, multiply, multiply_codes, quantize
from megarl.models.log_probs import linear_log_probs

# of the largest number: the rounding of one result, and for gradients of sums of such products
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCES))
ONE = SimpleNamespace(rank=lambda: 0, size=lambda: 1)


def drawn(*sizes: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator).to(device, dtype).requires_grad_() for size in sizes]


def assert_agree(found: Tensor, expected: Tensor, tensors: list[Tensor], precise: list[Tensor]) -> None:
    """The result and its gradients; `expected` is computed from `precise`, float64 copies of `tensors`."""
    tolerance = TOLERANCES[found.dtype]
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(found.device, found.dtype)
    mine = (found, *torch.autograd.grad(found, tensors, upstream))
    for a, b in zip(mine, (expected, *torch.autograd.grad(expected, precise, upstream.double())), strict=True):
        assert a.shape == b.shape and a.isfinite().all()
        if a.numel():
            assert float((a.detach().double() - b.detach()).abs().max()) <= tolerance * float(b.detach().abs().max())


def doubles(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


# an expert without a token, numbers of tokens that are no multiple of anything, and no token at all
@pytest.mark.parametrize("counts", [[100, 0, 37, 1], [0, 0, 0, 0]])
@pytest.mark.parametrize("width", [64, 20])  # 20 columns of bfloat16 are no multiple of 16 bytes
@DTYPES
def test_gated_experts(cuda, counts, width, dtype):
    pairs, tokens = sum(counts), 120
    x, weight1, weight2, probs = drawn(
        (tokens, width), (4, 2, 32, width), (4, width, 32), (pairs,), device=cuda, dtype=dtype
    )
    rows = torch.arange(pairs, device=cuda) * 7 % tokens
    ends = torch.tensor(counts, device=cuda).cumsum(0).int()
    found = platform.gated_experts(x, weight1, weight2, ends, probs, rows)
    tensors = [x, weight1, weight2, probs]
    precise = doubles(tensors)
    own = torch.arange(4, device=cuda).repeat_interleave(torch.tensor(counts, device=cuda))
    gate, up = torch.einsum("nk,njfk->jnf", precise[0][rows], precise[1][own]).unbind()
    out = torch.einsum("nf,nhf->nh", F.silu(gate) * up * precise[3][:, None], precise[2][own])
    expected = torch.zeros_like(precise[0]).index_add(0, rows, out)
    assert_agree(found, expected, tensors, precise)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_give_the_same_bits_every_time(cuda, dtype):
    """Eight a token, whose results are added up in whatever order they come by `index_add`: then ratios are not 1."""
    tokens, top_k, experts = 3000, 8, 16
    x, weight1, weight2, probs = tensors = drawn(
        (tokens, 64), (experts, 2, 32, 64), (experts, 64, 32), (tokens * top_k,), device=cuda, dtype=dtype
    )
    rows = torch.arange(tokens, device=cuda).repeat(top_k)
    ends = torch.arange(1, experts + 1, device=cuda).mul(tokens * top_k // experts).int()
    upstream = torch.ones_like(x)
    runs = []
    for _ in range(10):
        out = platform.gated_experts(x, weight1, weight2, ends, probs, rows)
        runs.append((out, *torch.autograd.grad(out, tensors, upstream)))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@DTYPES
def test_grouped_linear(cuda, dtype):
    counts = torch.tensor([5, 0, 100], device=cuda)
    tensors = drawn((105, 32), (3, 48, 32), (3, 48), device=cuda, dtype=dtype)
    precise, own = doubles(tensors), torch.arange(3, device=cuda).repeat_interleave(counts)
    expected = torch.einsum("nk,nmk->nm", precise[0], precise[1][own]) + precise[2][own]
    assert_agree(platform.grouped_linear(*tensors, counts.cumsum(0).int()), expected, tensors, precise)


@pytest.mark.parametrize("masked", [False, True])
@DTYPES
def test_sink_attention(cuda, masked, dtype):
    heads, kv, n, width = 8, 2, 70, 64
    tensors = drawn((2, heads, n, width), (2, kv, n, width), (2, kv, n, width), (heads,), device=cuda, dtype=dtype)
    seen = torch.ones(n, n, dtype=torch.bool, device=cuda).tril()
    if masked:
        seen &= ~seen.tril(-17)
    found = platform.sink_attention(*tensors[:3], seen[None, None] if masked else None, tensors[3])
    query, key, value, sinks = precise = doubles(tensors)
    key, value = (x.repeat_interleave(heads // kv, dim=1) for x in (key, value))
    scores = (query @ key.transpose(2, 3) / width**0.5).masked_fill(~seen, float("-inf"))
    scores = torch.cat([scores, sinks[None, :, None, None].expand(2, -1, n, 1)], dim=-1)
    assert_agree(found, scores.softmax(-1)[..., :n] @ value, tensors, precise)


@DTYPES
def test_rms_norm(cuda, dtype):
    tensors = drawn((50, 96), (96,), device=cuda, dtype=dtype)
    x, weight = precise = doubles(tensors)
    expected = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight
    assert_agree(platform.rms_norm(*tensors, 1e-6), expected, tensors, precise)


@DTYPES
def test_log_probs(cuda, dtype):
    hidden, weight = tensors = drawn((300, 64), (1000, 64), device=cuda, dtype=dtype)
    targets = torch.arange(300, device=cuda) * 3
    found, _entropy = linear_log_probs(hidden, weight, targets, 990, ONE, 0.7)
    precise = doubles(tensors)
    logits = (precise[0] @ precise[1].t())[:, :990] / 0.7
    expected = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    # log-probs are float32 of a bfloat16 model, whose logits are rounded to 8 bits
    scale = TOLERANCES[dtype] * float(logits.detach().abs().max())
    assert float((found.detach().double() - expected.detach()).abs().max()) <= scale
    mine, plain = (torch.autograd.grad(out.sum(), of) for out, of in ((found, tensors), (expected, precise)))
    for a, b in zip(mine, plain, strict=True):
        assert float((a.double() - b).abs().max()) <= TOLERANCES[dtype] * max(1.0, float(b.abs().max()))


def test_log_probs_need_blocks_of_logits(cuda, record_property):
    """8,192 rows of 151,936 logits are 4.6 GiB; a few blocks of them, and the gradients, have to be enough."""
    rows, vocab, width = 8192, 151_936, 1024
    hidden, weight = drawn((rows, width), (vocab, width), device=cuda, dtype=torch.bfloat16)
    targets = torch.zeros(rows, dtype=torch.int64, device=cuda)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    linear_log_probs(hidden, weight, targets, vocab, ONE)[0].sum().backward()
    used = torch.cuda.max_memory_allocated() - before
    record_property("GiB at most", f"{used / 2**30:.2f}")
    gradients = weight.nbytes + hidden.nbytes + 2 * hidden.numel() * 4  # of hidden in float32, and one product of it
    assert used <= gradients + 6 * platform.block_bytes()


@pytest.mark.parametrize("recipe", RECIPES)
def test_codes_are_those_of_the_cpu(cuda, recipe):
    recipe, generator = RECIPES[recipe], torch.Generator().manual_seed(0)
    x = torch.randn(160, 256, generator=generator) * torch.logspace(-6, 4, 160)[:, None]
    for tile, dtype in ((recipe.tile, E4M3), (recipe.weight_tile, E4M3), (recipe.tile, recipe.gradients)):
        here, there = (quantize(t, tile, dtype, recipe.power_of_two) for t in (x, x.to(cuda)))
        assert torch.equal(here.codes.view(torch.uint8), there.codes.cpu().view(torch.uint8))
        assert torch.equal(here.factors, there.factors.cpu())


@pytest.mark.parametrize("gradients", [E4M3, E5M2])
@pytest.mark.parametrize("columns", [512, 37])  # contraction of a multiple of 16, and padded to one
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_products_are_those_of_the_emulation(cuda, fp8_products, monkeypatch, gradients, columns, dtype, record_property):
    a, b = (torch.randn(size, columns, generator=torch.Generator().manual_seed(size)).to(cuda) for size in (96, 64))
    a, b = quantize(a, dtype=gradients), quantize(b)
    chip = multiply(a, b, dtype)  # by the chip where it can
    assert torch.equal(chip, multiply_codes(a, b, dtype))
    monkeypatch.setattr(platform, "has_fp8_products", lambda: False)
    emulated = multiply(a, b, dtype)
    exact = dequantize(a, torch.float64) @ dequantize(b, torch.float64).t()
    largest = float(exact.abs().max())
    record_property("chip against exact", f"{float((chip.double() - exact).abs().max()) / largest:.1e} of the largest")
    # Hopper adds up in about 14 bits (DeepSeek-V3, 2412.19437, section 3.3.2), and bfloat16 has 8
    tolerance = largest * (2**-8 if dtype is torch.bfloat16 else 2**-12 * columns**0.5)
    assert float((emulated.double() - exact).abs().max()) <= tolerance
    assert float((chip.double() - exact).abs().max()) <= tolerance
