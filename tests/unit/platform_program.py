"""Run by `test_platform.py`: without each named patch of the seam in turn, use Megatron, in a fork of a process that has
imported nothing but torch. Prints {patch: [exit code, output with errors]} as JSON.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch._inductor.utils
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.tensor


def use_megatron() -> None:
    """One optimizer step of a small MoE, random numbers per parallel group, and a checkpoint out and in."""
    from megarl.checkpoint import Checkpointer
    from megarl.config.schema import Config, Model, Optimizer
    from megarl.data.packing import pack
    from megarl.learner.policy import Policy
    from megarl.models.spec import ModelSpec, Rope
    from megarl.parallel import Mesh
    from megarl.types import Batch

    spec = ModelSpec(
        "qwen3_moe", 2, 32, 4, 2, 8, 64, 64, 64, Rope(1e4, 8), 1e-6, False, "head",
        num_experts=4, top_k=2, moe_intermediate_size=16, moe_layers=(0, 1),
    )  # fmt: skip
    cfg = Config(model=Model(path="unused"))
    mesh = Mesh.build(cfg.parallel)
    policy = Policy(spec, cfg, mesh, optimizer=Optimizer(lr=1e-3))
    with torch.no_grad():
        for p in policy.modules[0].parameters():
            p.normal_(std=0.05)
    policy.optimizer.reload_model_params()
    batch = Batch(torch.arange(12) + 3, torch.tensor([5, 7]), torch.ones(12), token_weights=torch.ones(12) / 12)
    result = policy.train_step([pack(batch, [0, 1])], lambda b, lp, e, s: (-(b.token_weights * lp).sum(), {}))
    assert result.applied and result.grad_norm > 0
    _check_random_numbers()
    with tempfile.TemporaryDirectory() as folder:
        checkpointer = Checkpointer(Path(folder), mesh, keep=1)
        checkpointer.register("policy", policy)
        checkpointer.save(1)
        saved = [p.clone() for p in policy.modules[0].parameters()]
        policy.train_step([pack(batch, [0, 1])], lambda b, lp, e, s: (-(b.token_weights * lp).sum(), {}))
        checkpointer.load_latest()
        assert all(torch.equal(a, b) for a, b in zip(saved, policy.modules[0].parameters()))
    _train_offloaded(spec, cfg, mesh, batch)
    _train_with_megatrons_dispatcher(spec, mesh, batch)
    _check_memory_is_kept()


def _train_offloaded(spec: Any, cfg: Any, mesh: Any, batch: Any) -> None:
    """Megatron's hybrid optimizer: two steps, of which a checkpoint takes back the second."""
    from megarl.checkpoint import Checkpointer
    from megarl.config.schema import Optimizer
    from megarl.data.packing import pack
    from megarl.learner.policy import Policy

    policy = Policy(spec, cfg, mesh, optimizer=Optimizer(lr=1e-3, cpu_offload=True))
    with torch.no_grad():
        for p in policy.modules[0].parameters():
            p.normal_(std=0.05)
        policy.optimizer.reload_model_params()
    with tempfile.TemporaryDirectory() as folder:
        checkpointer = Checkpointer(Path(folder), mesh, keep=1)
        checkpointer.register("policy", policy)
        for number in (1, 2):
            policy.train_step([pack(batch, [0, 1])], lambda b, lp, e, s: (-(b.token_weights * lp).sum(), {}))
            if number == 1:
                checkpointer.save(number)
                saved = [p.clone() for p in policy.modules[0].parameters()]
        checkpointer.load_latest()
    assert all(torch.equal(a, b) for a, b in zip(saved, policy.modules[0].parameters()))


def _train_with_megatrons_dispatcher(spec: Any, mesh: Any, batch: Any) -> None:
    """In bfloat16, where the router's product is Megatron's own: what several expert-parallel ranks run."""
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    from megarl.config.schema import Config, Model, Optimizer
    from megarl.data.packing import pack
    from megarl.learner.policy import Policy

    cfg = Config(model=Model(path="unused", dtype="bfloat16"))
    policy = Policy(spec, cfg, mesh, optimizer=Optimizer(lr=1e-3))
    for layer in policy.modules[0].decoder.layers:
        layer.mlp.router.__class__ = TopKRouter
        layer.mlp.token_dispatcher = MoEAlltoAllTokenDispatcher(
            spec.num_experts, list(range(spec.num_experts)), policy.config, get_default_pg_collection()
        )
    with torch.no_grad():
        for p in policy.modules[0].parameters():
            p.normal_(std=0.05)
    policy.optimizer.reload_model_params()
    assert policy.train_step([pack(batch, [0, 1])], lambda b, lp, e, s: (-(b.token_weights * lp).sum(), {})).applied


def _check_memory_is_kept() -> None:
    """Ten blocks of 24 MiB take the pages that ten earlier ones had."""
    _page_faults(10, 24 << 20)
    again = _page_faults(10, 24 << 20)
    assert again < 1000, f"page faults: {again} of 61,440"


def _page_faults(count: int, size: int) -> int:
    """Those of allocating, filling and freeing `count` blocks of `size` bytes."""
    library = ctypes.CDLL(None)
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.argtypes, library.memset.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [library.malloc(size) for _ in range(count)]
    for block in blocks:
        library.memset(block, 1, size)
    for block in reversed(blocks):
        library.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def _check_random_numbers() -> None:
    """Megatron keeps a generator state per parallel group: different, repeatable, and apart from the default one."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

    drawn = []
    for _ in range(2):
        model_parallel_cuda_manual_seed(7, force_reset_rng=True)
        tracker, outside = get_cuda_rng_tracker(), torch.get_rng_state()
        for name in ("model-parallel-rng", "expert-parallel-rng", "model-parallel-rng"):
            with tracker.fork(name):
                drawn.append(torch.rand(1).item())
        assert torch.equal(outside, torch.get_rng_state())
    assert drawn[:3] == drawn[3:] and len(set(drawn)) == 3, drawn


def leave_out(name: str) -> None:
    """Take the patch `name` out of the seam before it is installed."""
    from megarl.platform import cpu, megatron_patches, optimizers

    kept = torch.Tensor.cuda
    installers = {
        "factories": lambda: cpu.FACTORIES.clear(),
        "device constructors": lambda: setattr(torch.utils._device, "_device_constructors", lambda: None),
        "Tensor.type": lambda: setattr(cpu, "_patch_tensor_type", lambda: None),
        "Tensor.cuda": lambda: _after(cpu, lambda: setattr(torch.Tensor, "cuda", kept)),
        "te_general_gemm": lambda: _after(megatron_patches, _forget_te_general_gemm),
        "writers": lambda: setattr(megatron_patches, "_write_in_this_process", _refuse),
        "te version": lambda: setattr(optimizers, "_if_installed", lambda plain: plain),
        "offload on a CPU": lambda: setattr(optimizers, "_from_a_cpu", lambda plain: plain),
        "offload in float32": lambda: setattr(optimizers, "_of_any_precision", lambda plain: plain),
        "Event.wait": lambda: delattr(cpu.Event, "wait"),
        "keep step": lambda: setattr(megatron_patches, "_keep_step", lambda plain: plain),
        "keep memory": lambda: setattr(cpu, "_keep_memory", lambda: None),
        "nothing": lambda: None,
    }
    if name in installers:
        installers[name]()
    else:
        del cpu.CUDA_ANSWERS[name]


def _after(module: object, change: object) -> None:
    plain = module.install
    module.install = lambda: (plain(), change())


def _forget_te_general_gemm() -> None:
    import megatron.core.transformer.moe.moe_utils as moe_utils

    del moe_utils.te_general_gemm


def _refuse(*args: object, **kwargs: object) -> None:
    raise RuntimeError("the patched writer is in use")


def outcome(patch: str) -> tuple[int, str]:
    """(exit code, output with errors) of a fork that does without `patch`."""
    with tempfile.NamedTemporaryFile("r+") as output:
        child = os.fork()
        if not child:
            os.dup2(output.fileno(), 1), os.dup2(output.fileno(), 2)
            code = 1
            try:
                leave_out(patch)
                use_megatron()
                code = 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status), Path(output.name).read_text()


if __name__ == "__main__":
    print(json.dumps({patch: outcome(patch) for patch in sys.argv[1:]}))
