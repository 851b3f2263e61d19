"""How fast a model with the widths of Qwen3-30B-A3B, but four layers, trains, samples and syncs. Nothing is asserted of
times: the figures go into the table."""

from __future__ import annotations

import pytest

from megarl.config.schema import Generate, Tokenizer
from tests.dist.harness import run_ranks

WIDE = dict(hidden_size=2048, num_layers=4, num_heads=32, num_kv_heads=4, head_dim=128, num_experts=128, top_k=8)


@pytest.mark.timeout(3600)
def test_speed(cuda, tmp_path, record_property):
    from megarl.models.generate import generate_checkpoint

    path = str(tmp_path / "model")
    shape = Generate(moe_intermediate_size=768, context=2048, tokenizer=Tokenizer(vocab_size=320), **WIDE)
    generate_checkpoint(path, shape)
    found = run_ranks("tests.gpu.engine_cases:speed", 1, path, timeout=3000)[0]
    for part in ("learner", "rollout"):
        share = f"{found[f'{part}_flops'] / found['peak_flops']:.1%}" if found["peak_flops"] else "unknown: not in chips.py"
        record_property(f"{part} tokens a second", f"{found[f'{part}_tokens_per_second']:,.0f}")
        record_property(f"{part}, share of the chip's bfloat16 peak", share)
        assert found[f"{part}_tokens_per_second"] > 0
    sync, copy = found["sync_bytes_per_second"], found["copy_bytes_per_second"]
    record_property("weight sync", f"{sync / 1e9:,.1f} GB/s, a device copy {copy / 1e9:,.1f} GB/s")
    record_property("weight sync into vLLM's layers", found["reason"] or "yes")
    record_property("device memory at most", f"{found['device_peak_gib']:.1f} GiB")
    assert sync > 0
