"""What a rank of the GPU tests does: a sync, and how fast a model of a real one's widths trains, samples and syncs."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from megarl import platform
from megarl.config.schema import Config, Model, Optimizer, Parallel, Rollout
from megarl.types import Batch, Prompt
from tests.gpu.chips import forward_flops, peak

LENGTH, SEQUENCES, STEPS = 1024, 64, 5  # tokens of a sequence, of a training step; steps that are timed
PROMPTS, PROMPT_LENGTH, NEW = 256, 128, 256


def sync(path: str, dtype: str, degrees: dict[str, int] = {}, **rollout: Any) -> dict[str, Any]:
    """Syncs of a learner into an engine that started without weights: straight into its layers, and by vLLM's reload."""
    platform.setup()
    from megarl.learner.policy import Policy
    from megarl.learner.probes import probe_log_probs
    from megarl.parallel import Mesh
    from megarl.rollout.vllm_engine import VLLMEngine
    from megarl.rollout.weight_sync import WeightSync, check_checksums, check_sync, default_threshold, make_probes

    parallel = Parallel(**degrees)
    mesh = Mesh.build(parallel)
    policy = Policy.from_hf(path, Config(model=Model(path=path, dtype=dtype), parallel=parallel), mesh)
    engine = VLLMEngine(path, Rollout(max_context=96, gpu_memory_utilization=0.3, **rollout), dtype, 3, mesh, load=False)
    probes = make_probes(policy.spec.vocab_size, 4, engine.probe_length)
    expected = probe_log_probs(policy, probes)
    direct, out = engine._direct, {"reason": engine.reload_reason}
    for way, reason in (("direct", None), ("reload", "it is asked for")):
        if reason is None and direct is None:
            continue
        engine.reload_reason, engine._direct = reason, None if reason else direct
        weight_sync = WeightSync(policy.spec, parallel, mesh, engine)
        engine.load_weights(((name, tensor * 1.1) for name, tensor in weight_sync.stream(policy.modules)), 0)
        weight_sync.run(policy.modules, 1)
        gap = check_sync(weight_sync, policy.modules, probes, expected, default_threshold(dtype))
        check_checksums(weight_sync, policy.modules)
        out[way] = asdict(gap)
    return out


def speed(path: str, dtype: str = "bfloat16") -> dict[str, Any]:
    """Tokens a second of learner and rollout on one device, with their shares of its peak, and the sync's bytes a second."""
    platform.setup()
    from megarl.data.packing import micro_batches
    from megarl.learner.policy import Policy
    from megarl.parallel import Mesh
    from megarl.rollout.engine import Sampling
    from megarl.rollout.vllm_engine import VLLMEngine
    from megarl.rollout.weight_sync import WeightSync
    from megarl.trainers.losses import token_mean_loss

    mesh = Mesh.build(Parallel())
    cfg = Config(model=Model(path=path, dtype=dtype))
    policy = Policy.from_hf(path, cfg, mesh, optimizer=Optimizer(lr=1e-6), total_steps=100)
    spec = policy.spec
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, spec.vocab_size, (SEQUENCES * LENGTH,), generator=draw)
    mask = torch.ones(len(tokens))
    batch = Batch(tokens, torch.full((SEQUENCES,), LENGTH), mask).replace(token_weights=mask / mask.sum())
    packed = micro_batches(batch, 16 * LENGTH, policy.layout)
    seconds = []
    for _ in range(2 + STEPS):
        platform.synchronize()
        start = time.perf_counter()
        assert policy.train_step(packed, token_mean_loss).applied
        platform.synchronize()
        seconds.append(time.perf_counter() - start)
    trained = len(tokens) / float(np.median(seconds[2:]))
    out = {"learner_tokens_per_second": trained, "learner_flops": 3 * trained * forward_flops(spec, LENGTH)}

    rollout = Rollout(max_context=PROMPT_LENGTH + NEW, max_response_tokens=NEW, gpu_memory_utilization=0.35)
    engine = VLLMEngine(path, rollout, dtype, 3, mesh, load=False)
    weight_sync = WeightSync(spec, cfg.parallel, mesh, engine)
    reports = [weight_sync.run(policy.modules, version) for version in range(1, 5)]
    best = max(reports, key=lambda report: report.speed)
    ids = torch.randint(4, spec.vocab_size, (PROMPTS, PROMPT_LENGTH), generator=draw).tolist()
    prompts = [Prompt(f"p{i}", tuple(row), None) for i, row in enumerate(ids)]
    engine.generate(prompts, Sampling(1, 8), 0)
    start = time.perf_counter()
    groups = engine.generate(prompts, Sampling(1, NEW), 1)
    sampled = sum(len(t.response_ids) for group in groups for t in group.trajectories) / (time.perf_counter() - start)
    rollout_flops = sampled * forward_flops(spec, 2 * PROMPT_LENGTH + NEW)  # a query sees half of its length on average
    return out | {
        "rollout_tokens_per_second": sampled,
        "rollout_flops": rollout_flops,
        "peak_flops": peak(torch.cuda.get_device_name()),
        "sync_bytes_per_second": best.speed,
        "copy_bytes_per_second": best.copy_speed,
        "reason": engine.reload_reason,
        "device_peak_gib": platform.device_memory()["peak_allocated"],
    }
