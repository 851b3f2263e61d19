"""Held-out accuracy: greedy, or avg@k and pass@k."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

from megarl import launcher
from megarl.config.schema import Config
from megarl.data import load_eval_prompts, load_tokenizer
from megarl.errors import BadInput
from megarl.parallel import Mesh
from megarl.rewards import RewardRunner, check_failures, required_field
from megarl.rollout.engine import Sampling
from megarl.rollout.vllm_engine import VLLMEngine
from megarl.trainers.common import starting_checkpoint
from megarl.trainers.display import task
from megarl.types import Prompt

CORRECT = 1.0  # a response with at least this score counts as solved; partial credit does not


def run(cfg: Config, checkpoint: Path | None = None) -> None:
    """Evaluate a Hugging Face folder (default: the newest export of the project) and append to eval/eval.jsonl."""
    with RewardRunner(cfg.reward) as rewards:
        mesh = Mesh.build(cfg.parallel)
        path = str(checkpoint or newest_export(cfg) or starting_checkpoint(cfg, mesh))
        tokenizer = load_tokenizer(path, cfg.model.chat_template)
        prompts = eval_prompts(cfg, tokenizer, _context(path))
        with task("start vLLM", is_main=mesh.is_main, stream=launcher.terminal()):
            engine = VLLMEngine(path, cfg.rollout, cfg.rollout_dtype, cfg.seed, mesh, head_dtype=cfg.model.head_dtype)
        with task(f"evaluate {path}", is_main=mesh.is_main, stream=launcher.terminal()):
            results = evaluate(cfg, mesh, engine, rewards, prompts)
        if mesh.is_main:
            write_results(Path(cfg.run_dir) / "eval" / "eval.jsonl", results, checkpoint=path)
            stream = launcher.terminal()
            for row in results:
                figures = ", ".join(f"{k} {v:.1%}" for k, v in row.items() if isinstance(v, float))
                print(f"{row['source']}: {figures} ({row['problems']} problems)", file=stream, flush=True)


def newest_export(cfg: Config) -> Path | None:
    """RUN_DIR/rl/hf, or RUN_DIR/sft/hf, whichever is there first."""
    folders = (Path(cfg.run_dir) / part / "hf" for part in ("rl", "sft"))
    return next((folder for folder in folders if (folder / "config.json").exists()), None)


def eval_prompts(cfg: Config, tokenizer: Any, context: int) -> list[Prompt]:
    """The held-out prompts that leave room for a response. Raises BadInput when there are none."""
    if not cfg.eval.data:
        raise BadInput("eval.data is empty: name at least one held-out data source")
    limit = context - (cfg.eval.max_response_tokens or cfg.rollout.max_response_tokens)
    return load_eval_prompts(
        cfg.eval.data, tokenizer, limit, required_field=lambda reward: required_field(cfg.reward, reward)
    )


def evaluate(
    cfg: Config, mesh: Mesh, engine: VLLMEngine, rewards: RewardRunner, prompts: list[Prompt]
) -> list[dict[str, Any]]:
    """One row for all prompts and, with several sources, one for each: `accuracy`, with k > 1 `avg@k` and `pass@k`.

    Each engine answers its share; every rank returns the same rows. Raises RunFailed when too many could not be scored.
    """
    k = cfg.eval.samples
    sampling = Sampling(
        samples=k,
        max_tokens=cfg.eval.max_response_tokens or cfg.rollout.max_response_tokens,
        temperature=cfg.eval.temperature if k > 1 else 0.0,
        log_probs=False,
    )
    own = prompts[engine.layout.index :: engine.layout.count]
    groups = engine.generate(own, sampling, round_id=-1)
    mine: list[tuple[str, int, int, int]] = []
    if mesh.rank % engine.layout.tensor_parallel == 0:
        scored = iter(rewards.score([(g.prompt, t.text) for g in groups for t in g.trajectories]))
        for group in groups:
            results = [next(scored) for _ in group.trajectories]
            right = sum(r.score >= CORRECT for r in results)
            mine.append((group.prompt.source, right, k, sum(r.failed for r in results)))
    rows = [row for rank in mesh.all_gather_object(mine) for row in rank]
    check_failures(cfg.reward, sum(row[3] for row in rows), len(rows) * k)
    by_source: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for source, right, count, _failed in rows:
        by_source[source].append((right, count))
    out = [_figures("all", [row for source in by_source.values() for row in source], k)]
    return out + ([_figures(name, counts, k) for name, counts in by_source.items()] if len(by_source) > 1 else [])


def _figures(source: str, counts: list[tuple[int, int]], k: int) -> dict[str, Any]:
    accuracy = sum(right / n for right, n in counts) / len(counts)
    row: dict[str, Any] = {"source": source, "problems": len(counts), "accuracy": accuracy}
    if k > 1:
        row |= {f"avg@{k}": accuracy, f"pass@{k}": sum(pass_at_k(n, right, k) for right, n in counts) / len(counts)}
    return row


def pass_at_k(n: int, right: int, k: int) -> float:
    """Probability that at least one of k of the n samples is right: the unbiased estimator of 2107.03374, eq. 1."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def write_results(path: Path, rows: list[dict[str, Any]], **common: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as out:
        for row in rows:
            out.write(json.dumps(common | row) + "\n")


def _context(path: str) -> int:
    from megarl.convert import read_spec

    return read_spec(path).max_position_embeddings
