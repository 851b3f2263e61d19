"""`megarl verify sync`: one weight sync, then every tensor family and the log-probs of both engines compared."""

from __future__ import annotations

import math

from megarl import launcher
from megarl.config.schema import Config
from megarl.errors import RunFailed
from megarl.learner.policy import Policy
from megarl.learner.probes import probe_log_probs
from megarl.models.generate import ensure_checkpoint
from megarl.parallel import Mesh
from megarl.rollout.checksums import differing_tensors
from megarl.rollout.engine_weights import WeightGap
from megarl.rollout.fp8_weights import Fp8Weights
from megarl.rollout.vllm_engine import VLLMEngine
from megarl.rollout.weight_sync import (
    SyncGap,
    SyncReport,
    WeightSync,
    compare_with_learner,
    default_threshold,
    explain,
    make_probes,
    measure_gap,
)


def verify_sync(cfg: Config) -> int:
    """Sync a fresh learner into a fresh engine and print what is compared; returns 0 when all agree.

    Runs on the ranks of `cfg.parallel`. Starts the engine without the checkpoint's weights, so that whatever is equal
    afterwards came through the sync. Raises RunFailed, naming the tensor families, when something differs.
    """
    mesh = Mesh.build(cfg.parallel)
    if mesh.is_main:
        ensure_checkpoint(cfg.model)
    mesh.barrier()
    policy = Policy.from_hf(cfg.model.path, cfg, mesh)
    fp8 = Fp8Weights.of(policy.spec, cfg.model, cfg.rollout)
    how = dict(load=False, fp8=fp8, head_dtype=cfg.model.head_dtype)
    engine = VLLMEngine(cfg.model.path, cfg.rollout, cfg.rollout_dtype, cfg.seed, mesh, **how)
    sync = WeightSync(policy.spec, cfg.parallel, mesh, engine)
    threshold = cfg.rollout.sync_threshold or default_threshold(
        cfg.model.dtype, cfg.rollout_dtype, fp8=fp8 is not None
    )
    probes = make_probes(policy.spec.vocab_size, cfg.rollout.probe_sequences, engine.probe_length)
    report = sync.run(policy.modules, policy_version=0)
    gap = measure_gap(engine, probes, probe_log_probs(policy, probes, fp8), mesh)
    weights = compare_with_learner(engine, mesh, sync.stream(policy.modules))
    sums = None if sync.plan.whole else differing_tensors(sync, policy.modules)
    stream = launcher.terminal()
    if mesh.is_main and stream is not None:
        print("\n".join(render(sync, report, gap, threshold, weights, sums)), file=stream, flush=True)
    differing = [item for item in weights if item.differs]
    if sums:
        raise RunFailed(f"verify sync: the checksums of {len(sums)} tensors differ: {', '.join(sums)}")
    if differing or not gap.median <= threshold:
        raise RunFailed(
            f"verify sync: learner and engine log-probs differ by {gap.mean:.1e} on average (threshold {threshold:.0e}): "
            f"{explain(differing)}"
        )
    return 0


def render(
    sync: WeightSync,
    report: SyncReport,
    gap: SyncGap,
    threshold: float,
    weights: list[WeightGap],
    sums: list[str] | None,
) -> list[str]:
    """The lines `verify sync` prints: one per tensor family, then the checksums and the log-prob gap.

    `sums`: the tensors whose checksums differ; none when the engine's weights cannot be read.
    """
    families: dict[str, list[WeightGap]] = {}
    for item in weights:
        families.setdefault(item.family, []).append(item)
    lines = [
        f"{len(sync.plan.entries)} tensors; {report.describe(sync.engine.reload_reason)}",
        f"{'tensor family':36} {'layers':>6}  {'largest gap':>11}  verdict",
    ]
    for name, items in families.items():
        wrong = [item for item in items if item.differs]
        known = all(item.compared for item in items)
        verdict = ("equal" if known else "not compared") if not wrong else "DIFFERS: " + "; ".join(map(str, wrong[:3]))
        largest = max((item.gap for item in items), key=lambda gap: math.inf if math.isnan(gap) else gap)
        lines.append(f"{name:36} {len(items):6}  {largest:11.1e}  {verdict}")
    if sums is not None:
        lines.append(f"checksums: {len(sums)} of {len(sync.plan.entries)} tensors differ")
    lines.append(
        f"log-prob gap on the probes: mean {gap.mean:.1e}, median {gap.median:.1e}, max {gap.max:.1e}, "
        f"threshold {threshold:.0e}"
    )
    return lines
