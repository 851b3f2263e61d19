"""Hand-written backward passes against finite differences, in float64 where the code allows it."""

from __future__ import annotations

import pytest
import torch

from megarl import platform

platform.setup()

from megarl.data.packing import zigzag  # noqa: E402
from megarl.models.layers.torch_layers import attend, rotate  # noqa: E402
from megarl.models.moe.biased_experts import ClampedSwiGLU  # noqa: E402
from megarl.models.packing_params import PackedRow, attention_layout  # noqa: E402
from megarl.models.rope import tables  # noqa: E402
from megarl.models.spec import Rope  # noqa: E402
from megarl.platform import cpu, cpu_products, cuda, cuda_experts  # noqa: E402


def test_rms_norm_and_its_gradient():
    torch.manual_seed(0)
    x = torch.randn(3, 2, 5, 8, dtype=torch.float64).split([1, 4], 2)[1].requires_grad_()  # strided, as queries are
    weight = torch.randn(8, dtype=torch.float64, requires_grad=True)
    expected = torch.nn.functional.rms_norm(x, (8,), weight, 1e-3)
    assert torch.allclose(platform.rms_norm(x, weight, 1e-3), expected, atol=1e-14, rtol=0)
    assert torch.autograd.gradcheck(lambda x, weight: platform.rms_norm(x, weight, 1e-3), (x, weight))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [8, 4])
def test_rotary_and_its_gradient(interleaved, width):
    torch.manual_seed(0)
    rotary = tables(Rope(10_000.0, width), torch.arange(6) * 3, torch.float32)
    x = torch.randn(6, 2, 3, 8, requires_grad=True)
    part = x[..., :width].unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2) if interleaved else x[..., :width]
    cos, sin = (part[:, None, None] for part in rotary)
    first, second = part.chunk(2, -1)
    turned = part * cos + torch.cat([-second, first], -1) * sin
    turned = turned.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2) if interleaved else turned
    expected = torch.cat([turned, x[..., width:]], -1)
    weights = torch.randn_like(expected)
    (mine,) = torch.autograd.grad((rotate(x, rotary, interleaved) * weights).sum(), x)
    (plain,) = torch.autograd.grad((expected * weights).sum(), x)
    assert torch.allclose(rotate(x, rotary, interleaved), expected, atol=1e-6, rtol=0)
    assert torch.allclose(mine, plain, atol=1e-6, rtol=0)


def _experts(counts: list[int], tokens: int, dtype: torch.dtype) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """(x, weight1, weight2, probs) of three experts, and where their pairs end."""
    torch.manual_seed(0)
    hidden, ffn = 24, 8
    shapes = [(tokens, hidden), (3, 2, ffn, hidden), (3, hidden, ffn), (sum(counts),)]
    tensors = [torch.randn(shape, dtype=dtype) / shape[-1] ** 0.5 for shape in shapes]
    return tuple(t.requires_grad_() for t in tensors), torch.tensor(counts).cumsum(0).to(torch.int32)


def _plain_experts(x, weight1, weight2, ends, probs, rows):
    borders, out = [0, *ends.tolist()], torch.zeros_like(x)
    for expert, (up, down) in enumerate(zip(weight1, weight2, strict=True)):
        pairs = slice(borders[expert], borders[expert + 1])
        gate, linear = (x[rows[pairs]] @ up.flatten(0, 1).t()).chunk(2, -1)
        results = torch.nn.functional.silu(gate) * linear * probs[pairs, None] @ down.t()
        out = out.index_add(0, rows[pairs], results)
    return out


# pieces with and without padding; experts of several pieces and of no token
@pytest.mark.parametrize("counts", [[3, 0, 5], [20, 7, 3], [1700, 0, 30], [0, 16, 0], [0, 0, 0]])
@pytest.mark.parametrize("shared", [False, True])  # a token of several experts, and one of none; or each of one
@pytest.mark.parametrize(
    ("way", "dtype"),
    [
        (cpu.gated_experts, torch.float64),
        (cpu.gated_experts, torch.float32),
        (cuda_experts.gated_experts, torch.float32),
        (cuda_experts.gated_experts, torch.float64),
    ],
)
def test_gated_experts_and_their_gradients(counts, shared, way, dtype):
    pairs = sum(counts)
    tokens = max(counts) + 1 if shared else pairs
    tensors, ends = _experts(counts, tokens, dtype)
    rows = torch.cat([torch.randperm(tokens - 1)[:count] for count in counts]) if shared else None
    precise = tuple(t.detach().double().requires_grad_() for t in tensors)
    x, weight1, weight2, probs = tensors
    out = way(x, weight1, weight2, ends, probs, rows)
    expected = _plain_experts(*precise[:3], ends, precise[3], rows if shared else torch.arange(pairs))
    tolerance = {"atol": 1e-12 if dtype is torch.float64 else 2e-5, "rtol": 1e-5}
    assert torch.allclose(out.double(), expected, **tolerance)
    upstream = torch.randn_like(out)
    mine = torch.autograd.grad(out, tensors, upstream)
    plain = torch.autograd.grad(expected, precise, upstream.double())
    assert all(torch.allclose(a.double(), b, **tolerance) for a, b in zip(mine, plain, strict=True))
    assert counts[1] or not mine[1][1].any()  # an expert without a token


def test_expert_gradients_are_added_to_megatrons_buffer():
    tensors, ends = _experts([20, 700, 0], 720, torch.float32)
    x, weight1, weight2, probs = tensors
    plain = torch.autograd.grad(cpu.gated_experts(x, weight1, weight2, ends, probs, None).sum(), (weight1, weight2))
    for weight in (weight1, weight2):
        weight.main_grad, weight.grad_added_to_main_grad = torch.ones_like(weight), False  # as Megatron's DDP has it
    cpu.gated_experts(x, weight1, weight2, ends, probs, None).sum().backward()
    for weight, gradient in zip((weight1, weight2), plain, strict=True):
        assert weight.grad_added_to_main_grad
        assert torch.allclose(weight.main_grad, 1 + gradient, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (700, 64), (700, 128)])
def test_linear_and_its_gradients(rows, width, dtype):
    torch.manual_seed(0)
    x = torch.randn(rows, 1, 96, dtype=dtype, requires_grad=True)
    weight = torch.randn(width, 96, dtype=dtype, requires_grad=True)
    upstream = torch.randn(rows, 1, width, dtype=dtype)
    expected = torch.autograd.grad(x.double() @ weight.double().t(), (x, weight), upstream.double())
    for way in (platform.linear, cpu_products.Linear.apply):
        out = way(x, weight)
        assert torch.allclose(out.double(), x.double() @ weight.double().t(), atol=1e-4, rtol=0)
        mine = torch.autograd.grad(out, (x, weight), upstream)
        assert all(torch.allclose(a, b, atol=5e-4, rtol=0) for a, b in zip(mine, expected, strict=True))


def test_products_of_parts_of_wider_rows():
    """Copied for oneDNN, which takes 100 ms and more for them as they are; rows and transposes are not."""
    torch.manual_seed(0)
    wide, weight = torch.randn(48, 200), torch.randn(32, 96)
    sparse = wide.t()[:192:2].t()
    for whole in (wide, wide.t(), wide[3:9], wide[None, 3:9, None]):
        assert cpu_products._dense(whole).data_ptr() == whole.data_ptr()
    for part in (wide[:, 7:103], sparse, wide[:, None, 7:103], torch.ones(1, 1).expand(48, 96)):
        mine = cpu_products._dense(part)
        assert mine.is_contiguous() and mine.data_ptr() != part.data_ptr() and torch.equal(mine, part)
        assert torch.allclose(cpu_products.product(part, weight), part @ weight.t(), atol=1e-4, rtol=0)
    assert torch.allclose(cpu_products.product(weight, wide[:, 7:103]), weight @ wide[:, 7:103].t(), atol=1e-4, rtol=0)


def test_chunks_are_sorted_unless_they_are():
    from megatron.core.transformer.moe.token_dispatcher import sort_chunks_by_idxs

    tokens, probs, sizes = torch.arange(12.0).view(6, 2), torch.arange(6.0), torch.tensor([1, 2, 3])
    same, same_probs = sort_chunks_by_idxs(tokens, sizes, torch.tensor([0, 1, 2]), probs=probs)
    assert same is tokens and same_probs is probs
    turned, turned_probs = sort_chunks_by_idxs(tokens, sizes, torch.tensor([2, 0, 1]), probs=probs)
    assert turned_probs.tolist() == [3, 4, 5, 0, 1, 2] and torch.equal(turned, tokens[[3, 4, 5, 0, 1, 2]])


def _attention(query, key, value, documents, window, sinks):
    """The formula, with a mask over the whole row and one softmax."""
    n, group = len(query), query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) / query.shape[2] ** 0.5
    back = torch.arange(n)[:, None] - torch.arange(n)
    seen = (documents[:, None] == documents) & (back >= 0) & (back < (window or n))
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(-1, n, 1)], dim=-1)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1)[..., :n], value)


# shorter and longer than a window's cuts, even for the two halves that each of two ranks has
@pytest.mark.parametrize(
    ("lengths", "window"), [([4, 140, 40, 64, 204, 8], w) for w in (0, 7, 100)] + [([16, 16], 7)]
)
@pytest.mark.parametrize("ways", [None, cpu, cuda])  # where sinks are computed; None: without
def test_attention_of_packed_rows(lengths, window, ways, monkeypatch):
    torch.manual_seed(0)
    n, cu_seqlens = sum(lengths), torch.tensor([0, *lengths]).cumsum(0).int()
    tensors = [torch.randn(n, heads, 6, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True) if ways else None
    inputs = [*tensors, sinks] if ways else tensors
    if ways:
        monkeypatch.setattr(platform, "sink_attention", ways.sink_attention)
    documents = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    expected, upstream = _attention(*tensors, documents, window, sinks), torch.randn(n, 4, 6, dtype=torch.float64)
    plain = torch.autograd.grad(expected, inputs, upstream)

    for cp in (1, 2):
        held = [zigzag(torch.tensor(lengths), cp, rank) for rank in range(cp)]  # the rows of each rank
        key, value = (x[torch.cat(held)] for x in tensors[1:])
        out = torch.zeros_like(expected)
        for rank, rows in enumerate(held):
            row = PackedRow(layouts={window: attention_layout(cu_seqlens, window, cp, rank)})
            out = out.index_copy(0, rows, attend(tensors[0][rows], key, value, row, window, sinks))
        mine = torch.autograd.grad(out, inputs, upstream)
        assert all(torch.allclose(a, b, atol=1e-12, rtol=0) for a, b in zip((out, *mine), (expected, *plain), strict=True))


@pytest.mark.parametrize("width", [8, 6])  # rows of whole 16 bytes, which PyTorch's grouped product wants, and others
@pytest.mark.parametrize("way", [cpu.grouped_linear, cuda_experts.grouped_linear])
def test_grouped_linear_and_its_gradients(way, width):
    torch.manual_seed(0)
    counts = torch.tensor([5, 0, 19])
    x, weight, bias = (torch.randn(size, requires_grad=True) for size in ((24, width), (3, 16, width), (3, 16)))
    own = torch.arange(3).repeat_interleave(counts)
    expected = torch.einsum("nk,nmk->nm", x, weight[own]) + bias[own]
    out = way(x, weight, bias, counts.cumsum(0).int())
    upstream = torch.randn_like(out)
    mine, plain = (torch.autograd.grad(o, (x, weight, bias), upstream) for o in (out, expected))
    assert all(torch.allclose(a, b, atol=1e-5, rtol=0) for a, b in zip((out, *mine), (expected, *plain), strict=True))


@pytest.mark.parametrize("way", [cpu, cuda])
def test_rows_are_taken_and_summed(way):
    torch.manual_seed(0)
    rows = torch.tensor([3, 0, 3, 3, 1])
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    which = torch.nn.functional.one_hot(rows, 5).double()
    found, expected = way.sum_rows(way.take_rows(x, rows), rows, 5), which.t() @ (which @ x)
    upstream = torch.randn_like(x)
    pairs = zip((found, *torch.autograd.grad(found, x, upstream)), (expected, *torch.autograd.grad(expected, x, upstream)))
    assert all(torch.allclose(a, b, atol=1e-14, rtol=0) for a, b in pairs)


def test_clamped_activation_and_its_gradient():
    torch.manual_seed(0)
    gate_up = (6 * torch.randn(40, 8, dtype=torch.float64)).requires_grad_()
    gate, up = gate_up.chunk(2, dim=-1)
    assert (gate > 7).any() and (gate < -7).any() and (up > 7).any() and (up < -7).any()
    gate, up = gate.clamp(max=7), up.clamp(-7, 7)
    assert torch.allclose(ClampedSwiGLU.apply(gate_up), gate * torch.sigmoid(1.702 * gate) * (up + 1), atol=1e-13, rtol=0)
    assert torch.autograd.gradcheck(ClampedSwiGLU.apply, gate_up)
