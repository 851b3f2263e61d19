"""vLLM inside the ranks: the environment it needs, the arguments a device needs, and every patch of it.

`environment()` must be in place before vllm is imported, `install()` runs right after. Each entry says why it is there;
`tests/unit/test_vllm_patches.py` fails when one is no longer needed or no longer enough.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import os
import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from megarl import platform
from megarl.platform import vllm_cpu_parallel, vllm_direct, vllm_fp8, vllm_gpt_oss
from megarl.platform.vllm_sampler import SeededSampler

COMMON = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives in the rank, not in a child process
    "VLLM_NO_USAGE_STATS": "1",  # vLLM's telemetry
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",  # banners, argument dumps, and a warning at every reload that tables were not reloaded
}
CPU = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # otherwise every rank pins itself to the same first cores
    "VLLM_HOST_IP": "127.0.0.1",  # otherwise it opens sockets to find its address, which a VPN can stall
    "TORCHDYNAMO_DISABLE": "1",  # it compiles parts of its sampler even when eager: 9 s at the first generate
}
CUDA = {
    # otherwise Triton multiplies float32 in TF32, 11 bits, for which a sync's check at 1e-5 is too strict
    "TRITON_F32_DEFAULT": "ieee",
}
# names of torch.cuda that vLLM's CPU worker replaces by placeholders whose events are None, which Megatron waits for
CUDA_NAMES = ("Event", "Stream", "set_stream", "current_stream", "stream")
KEPT = ("VLLM_", "DO_NOT_TRACK", "TORCHDYNAMO_")


def environment() -> dict[str, str]:
    """What must be in os.environ before vllm is imported; what the user has set wins."""
    return COMMON | (CPU if platform.name() == "cpu" else CUDA)


def engine_arguments(kv_cache_gib: float, gpu_memory_utilization: float, data_parallel: int) -> dict[str, Any]:
    """Keyword arguments of vllm.LLM that depend on the device."""
    if platform.name() == "cpu":
        return {
            "enforce_eager": True,  # no graphs to capture, and compiling costs minutes
            "kv_cache_memory_bytes": int(kv_cache_gib * 2**30),  # otherwise a share of all memory, touched at start
            "async_scheduling": False,  # overlaps the host with a device; here both are one thread
            "block_size": 32,  # the smallest: of the default 128 a prompt seldom fills one, so samples would share nothing
        }
    arguments = {"gpu_memory_utilization": gpu_memory_utilization, "enable_sleep_mode": True}
    if data_parallel > 1:
        # replicas that share experts step together, one forward pass a step; ahead of its results vLLM also takes steps
        # without a token, in which its second model runner forgets the other replicas: they would wait for ever
        arguments["async_scheduling"] = False
    return arguments


def head_sizes(latent: bool = False) -> list[int] | None:
    """The widths of a cached key that vLLM has kernels for here; None: it chooses among several backends itself.

    In `latent` attention that is the latent and the rotated key, otherwise a head.
    """
    if platform.name() != "cpu":
        return None
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
    from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend

    return (CPUMLABackend if latent else CPUAttentionBackend).get_supported_head_sizes()


def seeded(params: Any, seed: int) -> Any:
    """A shallow copy of vllm.SamplingParams that samples with `seed`."""
    params = copy.copy(params)
    if platform.name() == "cpu":
        params.extra_args = {"seed": seed}
    else:
        params.seed = seed
        vars(params).pop("sampling_type", None)  # cached from before there was a seed
    return params


def version() -> str:
    """The installed vLLM's."""
    import vllm

    return vllm.__version__


def records_routing() -> bool:
    """Whether this vLLM can return the experts of every token."""
    from vllm.engine.arg_utils import EngineArgs

    return any(field.name == "enable_return_routed_experts" for field in dataclasses.fields(EngineArgs))


def recorded_routing(runner: Any) -> tuple[int, int] | None:
    """(layers, experts a token) of what a started engine records of every token; None: it records nothing.

    vLLM has two model runners, of which the one without Triton has no such attribute until it records.
    """
    capturer = getattr(runner, "routed_experts_capturer", None)
    return None if capturer is None else tuple(capturer.get_device_buffer().shape[1:])


def can_sleep() -> bool:
    """Whether the engine gives its device memory back while the learner works: on a CPU vLLM ignores sleep."""
    return platform.name() == "cuda"


def memory(runner: Any) -> list[tuple[int, int]]:
    """Bytes of weights and of the key/value cache on (device, host).

    What sleeps keeps its tensors without memory behind them, so on CUDA vLLM's allocator is asked. Copies that a CPU
    kernel keeps outside of tensors are not in it.
    """
    if platform.name() == "cuda":
        from vllm.device_allocator.cumem import CuMemAllocator

        held = CuMemAllocator.get_instance().pointer_to_data.values()
        return [
            (
                sum(data.handle[1] for data in held if data.tag == tag and not data.is_asleep),
                sum(data.cpu_backup_tensor.nbytes for data in held if data.tag == tag and data.cpu_backup_tensor is not None),
            )
            for tag in ("weights", "kv_cache")
        ]
    model = runner.get_model()
    owners = ([*model.parameters(), *model.buffers()], runner.kv_caches)
    return [(0, sum({s._cdata: s.nbytes() for s in (t.untyped_storage() for t in found)}.values())) for found in owners]


def install() -> None:
    """Settle what the environment came too late for. Idempotent; call after importing vllm."""
    if platform.name() == "cpu":
        import torch._dynamo.config

        # TORCHDYNAMO_DISABLE is read when torch._dynamo is imported, which may be long ago
        torch._dynamo.config.disable = True
        vllm_cpu_parallel.install()
        vllm_fp8.install()
        from vllm.model_executor.layers.layernorm import RMSNorm

        RMSNorm.forward_cpu = _rms_norm
        from vllm import _custom_ops
        from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

        if not hasattr(_custom_ops.cpu_attention_with_kv_cache, "__wrapped__"):
            _custom_ops.cpu_attention_with_kv_cache = _sinks_in_bfloat16(_custom_ops.cpu_attention_with_kv_cache)
            RotaryEmbedding.forward_cpu = _turns_neighbours(RotaryEmbedding.forward_cpu)


def _turns_neighbours(rotary: Any) -> Any:
    """vLLM's CPU kernel turns a part of a head's neighbours (latent attention without YaRN) wrongly: by PyTorch instead."""

    @functools.wraps(rotary)
    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        return (rotary if layer.is_neox_style else type(layer).forward_native)(layer, *args, **kwargs)

    return call


def _sinks_in_bfloat16(attention: Any) -> Any:
    """vLLM's CPU kernel takes attention sinks in bfloat16 only, whatever the rest is in: they are rounded for it."""

    @functools.wraps(attention)
    def call(*args: Any, s_aux: torch.Tensor | None = None, **kwargs: Any) -> None:
        attention(*args, s_aux=None if s_aux is None else s_aux.bfloat16(), **kwargs)

    return call


def _rms_norm(self: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
    """vLLM has kernels for it and uses them on GPUs; on a CPU it computes five to seven operators, four times a layer."""
    if self.variance_size_override is not None or not self.has_weight:
        return self.forward_native(x, residual)
    if residual is not None:
        torch.ops._C.fused_add_rms_norm(x, residual, self.weight.data, self.variance_epsilon)  # both in place
        return x, residual
    x = x.contiguous()
    out = torch.empty_like(x)
    torch.ops._C.rms_norm(out, x, self.weight.data, self.variance_epsilon)
    return out


def after_start(runner: Any) -> None:
    """Settle what needs the engine's model runner."""
    _unlink_shared_memory()
    if platform.name() == "cpu":
        runner.sampler.topk_topp_sampler.forward = SeededSampler(runner)


def _unlink_shared_memory() -> None:
    """Take back the names of segments that all ranks have mapped by now: a job that is killed then leaves none behind."""
    from vllm.distributed import get_tp_group

    group = get_tp_group()
    if group.mq_broadcaster is not None and group.rank_in_group == 0:
        group.mq_broadcaster.buffer.shared_memory.unlink()
    if platform.name() == "cpu" and group.world_size > 1:
        vllm_cpu_parallel.shared_memory_file(group.device_communicator).unlink(missing_ok=True)


@contextlib.contextmanager
def starting(rank: int, local_rank: int) -> Iterator[None]:
    """Around engine construction: name the rank as torchrun would, and put back what vLLM changes for the whole process.

    vLLM's external launcher reads RANK and LOCAL_RANK, which a world of one started by hand lacks. vLLM seeds Python, numpy
    and torch (the learner's dropout and data order would repeat), sets the thread count, replaces torch.set_num_threads
    by a warning and the CPU's answers of torch.cuda by its own, and writes LOCAL_WORLD_SIZE (wrong for the learner) and
    LD_PRELOAD (inherited by reward workers) into the environment.
    """
    environ, threads, set_threads = dict(os.environ), torch.get_num_threads(), torch.set_num_threads
    cuda = {name: getattr(torch.cuda, name) for name in CUDA_NAMES if platform.name() == "cpu"}
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    device_state = torch.cuda.get_rng_state() if platform.name() == "cuda" else None
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(local_rank))
    try:
        yield
    finally:
        for key in set(os.environ) | set(environ):
            if os.environ.get(key) != environ.get(key) and not key.startswith(KEPT):
                os.environ.pop(key) if key not in environ else os.environ.__setitem__(key, environ[key])
        for name, answer in cuda.items():
            setattr(torch.cuda, name, answer)
        torch.set_num_threads = set_threads
        torch.set_num_threads(threads)
        random.setstate(states[0]), np.random.set_state(states[1]), torch.set_rng_state(states[2])
        if device_state is not None:
            torch.cuda.set_rng_state(device_state)


def load_weights(runner: Any, direct: vllm_direct.Direct | None, tensors: Iterable) -> None:
    """Replace the weights by a stream of Hugging Face tensors, each of which is copied before the next is asked for."""
    if direct is None:
        from vllm.config import set_current_vllm_config

        model, sinks = runner.get_model(), {}
        with reloading(model), set_current_vllm_config(runner.vllm_config):  # kernels that are made anew ask for it
            runner.reload_weights(weights_iterator=vllm_gpt_oss.watched(_copies(tensors), sinks))
        vllm_gpt_oss.place(model, sinks)
    else:
        direct.load(tensors)


def _copies(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in tensors:
        yield name, tensor.detach().clone()


@contextlib.contextmanager
def reloading(model: torch.nn.Module) -> Iterator[None]:
    """Around a weight reload: forget the experts' CPU kernels, so that the reload builds them again.

    On a reload vLLM skips the re-pack of CPU expert weights because the kernel is already there: every expert keeps the
    weights of the last sync, without an error. A layer whose experts were not reloaded gets its kernel back.

    Pack a tied output layer again, too: it is given no weights of its own, so a reload that changes the embedding leaves
    the output layer's packed copy as it was.
    """
    methods = [getattr(module, "quant_method", None) for module in model.modules()] if platform.name() == "cpu" else []
    kernels = [(method, method.moe_kernel) for method in methods if getattr(method, "moe_kernel", None) is not None]
    for method, _ in kernels:
        method.moe_kernel = None
    try:
        yield
    finally:
        for method, kernel in kernels:
            if method.moe_kernel is None:
                method.moe_kernel = kernel
        if platform.name() == "cpu":
            _pack_tied_output(model)


def _pack_tied_output(model: torch.nn.Module) -> None:
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for head in [module for module in model.modules() if isinstance(module, ParallelLMHead)]:
        if any(other is not head and getattr(other, "weight", None) is head.weight for other in model.modules()):
            head.quant_method.process_weights_after_loading(head)
