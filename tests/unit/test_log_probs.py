"""`linear_log_probs` against torch's log_softmax of materialised logits; `tests/dist` has it over several ranks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from megarl import platform
from megarl.models.log_probs import linear_log_probs

ONE = SimpleNamespace(rank=lambda: 0, size=lambda: 1)
ROWS, HIDDEN, VOCAB, PADDED = 9, 7, 29, 32


def inputs(dtype: torch.dtype, rows: int = ROWS) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = (3 * torch.randn(rows, HIDDEN, dtype=torch.float64)).to(dtype).requires_grad_()
    weight = torch.randn(PADDED, HIDDEN, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(VOCAB, (rows,))


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The definition, in float64."""
    logits = (hidden.double() @ weight.double().t())[:, :VOCAB] / temperature
    every = logits.log_softmax(-1)
    return every.gather(1, targets[:, None])[:, 0], -(every.exp() * every).sum(-1)


def blocks_of(monkeypatch: pytest.MonkeyPatch, columns: int | None, size: int = 8) -> None:
    if columns is not None:
        monkeypatch.setattr(platform, "block_bytes", lambda: columns * ROWS * size)


# None: all logits at once. 29 real columns in blocks of 6 leave one of 5, and 0 is one column at a time
@pytest.mark.parametrize("columns", [None, 6, 0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_float64_is_exact(monkeypatch, columns, temperature):
    blocks_of(monkeypatch, columns)
    hidden, weight, targets = inputs(torch.float64)
    log_probs, entropy = linear_log_probs(hidden, weight, targets, VOCAB, ONE, temperature)
    expected, expected_entropy = plain(hidden, weight, targets, temperature)
    assert log_probs.dtype == entropy.dtype == torch.float64 and not entropy.requires_grad
    torch.testing.assert_close(log_probs, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(entropy, expected_entropy, atol=1e-12, rtol=0)
    upstream = torch.randn(ROWS, dtype=torch.float64)
    mine = torch.autograd.grad(log_probs, (hidden, weight), upstream)
    for own, true in zip(mine, torch.autograd.grad(expected, (hidden, weight), upstream), strict=True):
        torch.testing.assert_close(own, true, atol=1e-12, rtol=0)
    assert not mine[1][VOCAB:].any()  # padding rows


@pytest.mark.parametrize("columns", [None, 6])
def test_finite_differences(monkeypatch, columns):
    blocks_of(monkeypatch, columns)
    hidden, weight, targets = inputs(torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_log_probs(h, w, targets, VOCAB, ONE, 0.7)[0], (hidden, weight), nondet_tol=0.0
    )


@pytest.mark.parametrize("dtype, value, slope", [(torch.float32, 1e-5, 2e-5), (torch.bfloat16, 0.1, 0.1)])
@pytest.mark.parametrize("columns", [None, 6])
def test_lower_precisions(monkeypatch, columns, dtype, value, slope):
    """Results are float32; gradients have the dtype of what they belong to and are as good as its products."""
    blocks_of(monkeypatch, columns, size=4)
    hidden, weight, targets = inputs(dtype)
    log_probs, entropy = linear_log_probs(hidden, weight, targets, VOCAB, ONE)
    expected, expected_entropy = plain(hidden, weight, targets, 1.0)
    assert log_probs.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(log_probs.double(), expected, atol=value, rtol=0)
    torch.testing.assert_close(entropy.double(), expected_entropy, atol=value, rtol=0)
    mine = torch.autograd.grad(log_probs.sum(), (hidden, weight))
    for own, true in zip(mine, torch.autograd.grad(expected.sum(), (hidden, weight)), strict=True):
        assert own.dtype == dtype
        torch.testing.assert_close(own.double(), true.double(), atol=slope, rtol=0.02 if dtype.itemsize == 2 else 0)


@pytest.mark.parametrize("columns", [None, 6])
def test_a_float32_head_over_bfloat16_weights_rounds_no_logit(monkeypatch, columns):
    """Values as of a float32 model, a hundred times closer than the same products in bfloat16; gradients in their dtypes."""
    blocks_of(monkeypatch, columns, size=4)
    hidden, weight, targets = inputs(torch.bfloat16)
    expected, expected_entropy = plain(hidden, weight, targets, 1.0)
    rounded, _ = linear_log_probs(hidden, weight, targets, VOCAB, ONE)
    log_probs, entropy = linear_log_probs(hidden.float(), weight, targets, VOCAB, ONE)
    torch.testing.assert_close(log_probs.double(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy.double(), expected_entropy, atol=1e-5, rtol=0)
    assert (rounded - expected).abs().max() > 100 * (log_probs - expected).abs().max()
    mine = torch.autograd.grad(log_probs.sum(), (hidden, weight))
    for own, true in zip(mine, torch.autograd.grad(expected.sum(), (hidden, weight)), strict=True):
        assert own.dtype == torch.bfloat16
        torch.testing.assert_close(own.double(), true.double(), atol=2e-5, rtol=2**-8)  # rounded once


def test_logits_far_apart_do_not_overflow(monkeypatch):
    """Whatever the order in which the blocks see the largest logit."""
    blocks_of(monkeypatch, 6)
    weight = torch.linspace(-1e4, 1e4, PADDED)[:, None]
    for slope in (1.0, -1.0):
        hidden = torch.full((ROWS, 1), slope, requires_grad=True)
        targets = torch.full((ROWS,), VOCAB - 1 if slope > 0 else 0)
        log_probs, entropy = linear_log_probs(hidden, weight.requires_grad_(), targets, VOCAB, ONE)
        assert torch.equal(log_probs, torch.zeros(ROWS)) and torch.equal(entropy, torch.zeros(ROWS))
        assert all(g.isfinite().all() for g in torch.autograd.grad(log_probs.sum(), (hidden, weight)))


def test_no_rows():
    hidden, weight, targets = inputs(torch.float32, rows=0)
    log_probs, entropy = linear_log_probs(hidden, weight, targets, VOCAB, ONE)
    assert log_probs.shape == entropy.shape == (0,)
    log_probs.sum().backward()
    assert hidden.grad.shape == (0, HIDDEN) and torch.equal(weight.grad, torch.zeros(PADDED, HIDDEN))


def test_no_temporary_is_as_large_as_the_logits(monkeypatch):
    """Neither pass makes a tensor above the block and the gradients themselves."""
    from torch.utils._python_dispatch import TorchDispatchMode

    blocks_of(monkeypatch, 6)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, Tensor) and tensor.dim() == 2 and tensor.shape[0] == ROWS:
                    largest = max(largest, tensor.shape[1])
            return out

    hidden, weight, targets = inputs(torch.float64)
    with Watch():
        linear_log_probs(hidden, weight, targets, VOCAB, ONE)[0].sum().backward()
    assert largest == HIDDEN
