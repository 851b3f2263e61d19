"""Exports of small models of many families, served by vLLM in one process."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megarl import platform
from megarl.config.schema import Model, Parallel, Rollout, Tokenizer

VOCAB, CONTEXT = 300, 96
SHAPE = dict(hidden_size=128, vocab_size=VOCAB, max_position_embeddings=CONTEXT)
PROMPTS = np.random.default_rng(0).integers(4, VOCAB, (6, 7)).tolist()
SCORED = np.random.default_rng(1).integers(4, VOCAB, (4, 40)).tolist()


def serve(folder: str, names: list[str]) -> dict[str, dict]:
    """name -> greedy responses and scores of each family's export."""
    platform.setup()
    from megarl.convert import load_hf, read_spec, save_hf
    from megarl.models.build import build_model
    from megarl.models.generate import make_tokenizer
    from megarl.parallel import Mesh
    from megarl.rollout.engine import Sampling
    from megarl.rollout.vllm_engine import VLLMEngine
    from megarl.types import Prompt
    from tests.families import all_cases

    mesh, out = Mesh.build(Parallel()), {}
    for name in names:
        source, served = Path(folder) / name, Path(folder) / f"{name}-served"
        case = all_cases()[name]
        case.write(source, **SHAPE, **case.serve)
        make_tokenizer(Tokenizer(vocab_size=VOCAB), CONTEXT).save_pretrained(source)
        spec = read_spec(source)
        chunks = build_model(spec, Model(path=str(source)), mesh, Parallel())
        load_hf(source, chunks, spec, mesh)
        save_hf(served, chunks, spec, mesh, extra_from=source)
        engine = VLLMEngine(str(served), Rollout(max_context=CONTEXT, max_response_tokens=12), "float32", 3, mesh)
        prompts = [Prompt(f"p{i}", tuple(ids), None) for i, ids in enumerate(PROMPTS)]
        groups = engine.generate(prompts, Sampling(samples=1, max_tokens=12, temperature=0.0), 0)
        responses = [list(group.trajectories[0].response_ids) for group in groups]
        out[name] = {"responses": responses, "scores": [row.tolist() for row in engine.score(SCORED)]}
        del engine
    return out
