"""The device seam: CUDA or CPU, decided once, and the only place that patches torch, Megatron-core or vLLM.

`setup()` runs before megatron.core is imported, because Megatron binds names of `torch.cuda` at import time. Code above
this package asks `device()` and `backend()` and has no device branches of its own.
"""

from __future__ import annotations

import functools
import os
from types import ModuleType

import torch

from megarl.platform.quantised import forget_initial as forget_initial
from megarl.platform.quantised import is_quantised as is_quantised
from megarl.platform.quantised import parts_of as parts_of
from megarl.platform.quantised import plain as plain
from megarl.platform.quantised import rebuilt as rebuilt
from megarl.platform.shared_memory import Gather, Mapped, SharedWindows

_settled = False


@functools.cache
def _module() -> ModuleType:
    if torch.cuda.is_available():
        from megarl.platform import cuda as chosen
    else:
        from megarl.platform import cpu as chosen
    return chosen


def setup() -> None:
    """Make Megatron-core importable and runnable on this machine. Idempotent; call before importing megatron.core."""
    global _settled
    if _settled:
        return
    _settled = True
    _module().install()
    from megarl.platform import megatron_patches

    megatron_patches.install()


def name() -> str:
    """`cuda` or `cpu`."""
    return _module().NAME


def device() -> torch.device:
    """The device this process computes on."""
    return _module().device()


def backend() -> str:
    """The torch.distributed backend: `cpu:gloo,cuda:nccl` or `gloo`."""
    return _module().BACKEND


def set_device(local_rank: int) -> None:
    """Bind this process to its device; nothing to do on a CPU. Raises BadInput when there is none for this rank."""
    _module().set_device(local_rank)


def set_threads(count: int | None = None) -> None:
    """Set the number of CPU threads torch uses: `count`, or OMP_NUM_THREADS, or what torch chose.

    Called again after an engine started, because vLLM changes it.
    """
    count = count or int(os.environ.get("OMP_NUM_THREADS", "0"))
    if count:
        torch.set_num_threads(count)


def device_memory() -> dict[str, float]:
    """GiB on this rank's device and host: `rss`, `peak_rss`, and on CUDA `allocated`, `peak_allocated`."""
    return _module().device_memory()


def capacity() -> tuple[int | None, int, int]:
    """Devices of this machine (None where ranks share the host), and free and all bytes of this process's own."""
    return _module().capacity()


def used_bytes() -> tuple[int, int]:
    """Bytes in use on this rank's device, by whomever (0 on a CPU), and resident of this process on the host."""
    return _module().used_bytes()


def synchronize() -> None:
    """Wait until the device has done everything it was given, so that a clock reads the truth."""
    _module().synchronize()


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x [.., K] @ weight[N, K].T` by the fastest product of the device; differentiable.

    A weight's attribute `product`, where there is one, is a product in place of the device's (FP8).
    """
    return (getattr(weight, "product", None) or _module().linear)(x, weight)


def has_fp8_products() -> bool:
    """Whether the device multiplies FP8 matrices with one scale each (`torch._scaled_mm`) faster than others."""
    return _module().has_fp8_products()


def gated_experts(
    x: torch.Tensor,
    weight1: torch.Tensor,
    weight2: torch.Tensor,
    ends: torch.Tensor,
    probs: torch.Tensor,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """The sum over a token's experts of `down(silu(gate x) * (up x) * prob)`, the fastest way of the device;
    differentiable.

    Of n token-expert pairs sorted by expert, `ends[e-1]:ends[e]` go through expert e; pair i is of the token
    `x[rows[i]]`, or of `x[i]` when `rows` is None. x `[tokens, H]`, weight1 `[E, 2, F, H]` (gate, up),
    weight2 `[E, H, F]`, ends `[E]` int32, probs `[n]` in the dtype of `x`, rows `[n]` int64. Returns `[tokens, H]`. An
    expert may have no token. The gradient of a weight that Megatron's DDP holds may go straight into its `main_grad`.
    Weights with an attribute `product` are multiplied by it: `product(x, weights [E, N, K], ends)`.
    """
    if hasattr(weight1, "product"):
        from megarl.platform import cuda_experts

        return cuda_experts.gated_experts(x, weight1, weight2, ends, probs, rows)
    return _module().gated_experts(x, weight1, weight2, ends, probs, rows)


def take_rows(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """`x[rows]`, rows several times or never; differentiable. The gradient is the same bits every time."""
    return _module().take_rows(x, rows)


def sum_rows(values: torch.Tensor, rows: torch.Tensor, count: int) -> torch.Tensor:
    """`[count, ..]`: the sums of those `values [n, ..]` that have the same of `rows [n]`; differentiable.

    The same bits every time: a pass that is computed again has to give the same log-probs.
    """
    return _module().sum_rows(values, rows, count)


def grouped_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Rows `ends[e-1]:ends[e]` of `x [n, K]` times `weight[e].T` plus `bias[e]`: `[n, N]`; differentiable.

    weight `[E, N, K]`, bias `[E, N]`, ends `[E]` int32. An expert may have no row. N may be two dimensions, gate and up.
    Of a weight with an attribute `product` as in `gated_experts`.
    """
    flat, bias = weight.flatten(1, -2), bias.flatten(1)
    if hasattr(weight, "product"):
        return weight.product(x, flat, ends) + bias.repeat_interleave(ends.diff(prepend=ends.new_zeros(1)), dim=0)
    return _module().grouped_linear(x, flat, bias, ends)


def sink_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, sinks: torch.Tensor
) -> torch.Tensor:
    """`softmax([q k / sqrt(d), sink])` without its last column, times the values; differentiable.

    query `[B, heads, q, d]`, key and value `[B, kv_heads, k, d]`, sinks `[heads]`. `mask [B or 1, 1, q, k]` bool: what a
    query may see; None: causal, where q = k.
    """
    return _module().sink_attention(query, key, value, mask, sinks)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`x / rms(x) * weight` over the last dimension, `weight [H]`, in the dtype of both; differentiable."""
    return _module().rms_norm(x, weight, eps)


def block_bytes() -> int:
    """How large a temporary is worth making at once, by an algorithm that can work in blocks."""
    return _module().BLOCK_BYTES


def empty_cache() -> None:
    """Return unused device memory to the driver; nothing to do on a CPU."""
    _module().empty_cache()


def profiler_activities() -> list:
    """What torch.profiler records here."""
    return _module().profiler_activities()


def shared_windows(size: int, place: tuple[int, int], gather: Gather, topics: int, timeout: float) -> SharedWindows:
    """Memory that ranks of one machine read from each other, see `shared_memory.share`; without windows where messages
    of the process group are the faster way. Collective."""
    return _module().shared_windows(size, place, gather, topics, timeout)


def map_tensors(tensors: dict[str, torch.Tensor], place: tuple[int, int], gather: Gather) -> Mapped | None:
    """Tensors of all ranks where every rank can read them, see `shared_memory.map_tensors`; None where that is not the
    faster way. Collective."""
    return _module().map_tensors(tensors, place, gather)
