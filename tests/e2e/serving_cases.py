"""Small models of many families, served by vLLM in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megarl import platform
from megarl.config.schema import Model, Parallel, Rollout, Tokenizer

VOCAB, CONTEXT = 300, 96
SHAPE = dict(hidden_size=128, vocab_size=VOCAB, max_position_embeddings=CONTEXT)
PROMPTS = [np.random.default_rng(n).integers(4, VOCAB, n).tolist() for n in (1, 3, 7, 20, 33)]  # some longer than a window
SCORED = np.random.default_rng(1).integers(4, VOCAB, (4, 40)).tolist()


LENGTH = 12


def serve(folder: str, names: list[str]) -> dict[str, dict]:
    """What an engine answers, of each family's checkpoint as transformers writes it, `NAME`, and of `NAME-export`."""
    platform.setup()
    from megarl.convert import load_hf, read_spec, save_hf
    from megarl.models.build import build_model
    from megarl.models.generate import make_tokenizer
    from megarl.parallel import Mesh
    from tests.families import all_cases

    mesh, out = Mesh.build(Parallel()), {}
    for name in names:
        source, export = Path(folder) / name, Path(folder) / f"{name}-export"
        case = all_cases()[name]
        case.write(source, **SHAPE, **case.serve)
        spec = read_spec(source)
        chunks = build_model(spec, Model(path=str(source)), mesh, Parallel())
        load_hf(source, chunks, spec, mesh)
        save_hf(export, chunks, spec, mesh)
        for path in (source, export):
            make_tokenizer(Tokenizer(vocab_size=VOCAB), CONTEXT).save_pretrained(path)
            out[path.name] = answers(str(path), spec.is_moe, mesh)
    return out


def answers(path: str, routed: bool, mesh: Any) -> dict[str, list]:
    """Greedy responses to `PROMPTS`, the experts [tokens, L, k] recorded with each, and the log-probs of `SCORED`."""
    from megarl.rollout.engine import Sampling
    from megarl.rollout.vllm_engine import VLLMEngine
    from megarl.types import Prompt

    settings = Rollout(max_context=CONTEXT, max_response_tokens=LENGTH, kv_cache_gib=0.05, routed_experts=routed)
    engine = VLLMEngine(path, settings, "float32", 3, mesh)
    prompts = [Prompt(f"p{i}", tuple(ids), None) for i, ids in enumerate(PROMPTS)]
    groups = engine.generate(prompts, Sampling(samples=1, max_tokens=LENGTH, temperature=0.0), 0)
    rows = [group.trajectories[0] for group in groups]
    return {
        "responses": [row.response_ids for row in rows],
        "experts": [row.routed_experts.tolist() for row in rows if routed],
        "scores": [row.tolist() for row in engine.score(SCORED)],
    }
