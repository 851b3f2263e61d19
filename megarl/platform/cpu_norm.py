"""Root-mean-square norm on a CPU in as few passes as PyTorch's operators allow.

PyTorch has no fused kernel of it there: its own one is five operators, and eleven in the backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class RMSNorm(torch.autograd.Function):
    """`x / rms(x) * weight` over the last dimension of `x [.., H]`, `weight [H]`, in the dtype of both."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        width = x.shape[-1]
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(width).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        normed = x * scale
        product = grad * normed
        grad_weight = product.sum(tuple(range(grad.dim() - 1)))
        along = (product @ weight).div_(-x.shape[-1])[..., None]
        return torch.mul(grad, weight).addcmul_(normed, along).mul_(scale), grad_weight, None
