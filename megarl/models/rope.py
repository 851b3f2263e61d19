"""The frequencies of rotary positions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megarl.models.spec import Rope


def tables(rope: Rope, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin `[n, rope.width]` of positions `[n]`; both halves of the width are equal."""
    angles = position_ids.to(dtype)[:, None] * frequencies(rope, dtype).to(position_ids.device)
    angles = torch.cat([angles, angles], dim=-1)
    scale = attention_factor(rope)
    return angles.cos() * scale, angles.sin() * scale


def frequencies(rope: Rope, dtype: torch.dtype = torch.float32) -> Tensor:
    """`[rope.width / 2]` angles a position turns by: RoFormer (2104.09864) eq. 15, stretched by `rope.kind`.

    In `dtype`, float32 or wider; transformers has the same rounding in float32.
    """
    exponents = torch.arange(0, rope.width, 2, dtype=torch.int64).to(dtype) / rope.width
    plain = 1.0 / rope.theta**exponents
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, plain)
    if rope.kind == "yarn":
        return _yarn(rope, plain)
    return plain


def _llama3(rope: Rope, plain: Tensor) -> Tensor:
    """Llama 3.1: long waves are stretched, short ones kept, those between blended (by turns over the old context)."""
    turns = rope.original_context * plain / (2 * math.pi)
    low, high = rope.low_freq_factor, rope.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return plain * kept + plain / rope.factor * (1 - kept)


def _yarn(rope: Rope, plain: Tensor) -> Tensor:
    """YaRN (2309.00071) section 3.2, with the ramp over dimensions that transformers and vLLM use."""

    def dimension(turns: float) -> float:
        return rope.width * math.log(rope.original_context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.width - 1)
    ramp = (torch.arange(rope.width // 2, dtype=plain.dtype) - low) / (high - low or 1e-3)
    stretched = ramp.clamp(0, 1)
    return plain / rope.factor * stretched + plain * (1 - stretched)


def attention_factor(rope: Rope) -> float:
    """What cos and sin are multiplied by: YaRN (2309.00071) eq. 22, or DeepSeek's two scales."""
    if rope.kind != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return magnitude(rope.factor, rope.mscale) / magnitude(rope.factor, rope.mscale_all_dim)
    return magnitude(rope.factor)


def magnitude(factor: float, scale: float = 1.0) -> float:
    """YaRN's temperature of a context stretched by `factor`."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0
