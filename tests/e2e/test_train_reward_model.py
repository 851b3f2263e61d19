"""`megarl reward-model` as a user runs it: it learns a preference, and transformers reads what it leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.dist.harness import run_in_turn
from tests.e2e.program import Project
from tests.e2e.test_bad_input import ONE_RANK, refused
from tests.e2e.test_pipeline import assert_same_weights

STEPS = 40


def pairs(file: Path, seed: int, count: int) -> list[dict[str, Any]]:
    """An even number is preferred to an odd one, whatever the question."""
    rng, rows = np.random.default_rng(seed), []
    for _ in range(count):
        a, b, chosen, rejected = rng.integers(0, 50, 4)
        rows.append({"prompt": f"{a} + {b} = ", "chosen": str(2 * chosen), "rejected": str(2 * rejected + 1)})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The project after `megarl reward-model` on two expert-parallel ranks."""
    folder = tmp_path_factory.mktemp("reward_model")
    for name, seed, count in (("train", 1, 400), ("held_out", 2, 60)):
        pairs(folder / f"{name}.jsonl", seed, count)
    section = {
        "data": [{"type": "jsonl", "path": str(folder / "train.jsonl")}],
        "validation": [{"type": "jsonl", "path": str(folder / "held_out.jsonl")}],
        "validate_every": 20,
        "steps": STEPS,
        "batch_size": 32,
        "micro_batch_tokens": 512,
        "optimizer": {"lr": 3e-3, "warmup_steps": 4},
        "init_from": "model",
    }
    project = Project.create(folder, reward_model=section, checkpoint={"every": 0})
    done = project.megarl("reward-model", project.config)
    assert (done.returncode, done.stderr) == (0, "")
    return project


def test_it_learns_the_preference_and_transformers_gives_the_same_scores(project: Project) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    rows = project.rows("reward_model/metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[0]["reward_model/loss"] == pytest.approx(np.log(2), abs=1e-6)  # the head starts at 0
    assert rows[0]["reward_model/margin"] == rows[0]["reward_model/score_mean"] == 0.0
    assert [row["step"] for row in rows if "reward_model/validation_loss" in row] == [20, STEPS]
    last = rows[-1]
    assert last["reward_model/validation_accuracy"] > 0.9
    assert last["reward_model/accuracy"] > 0.9 and last["reward_model/loss"] < 0.3 < last["reward_model/margin"]
    assert last["reward_model/grad_norm"] > 0 and last["throughput/learner_tokens_per_second"] > 1

    model = AutoModelForSequenceClassification.from_pretrained(project.run / "reward_model/hf", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(project.run / "reward_model/hf")
    assert type(model).__name__ == "Qwen3MoeForSequenceClassification" and model.config.num_labels == 1
    scores = {}
    for side in ("chosen", "rejected"):
        chats = [
            [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}]
            for row in map(json.loads, (project.folder / "held_out.jsonl").open())
        ]
        batch = tokenizer.apply_chat_template(chats, padding=True, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        scores[side] = logits[:, 0].double().numpy()
    margin = scores["chosen"] - scores["rejected"]
    assert np.mean(margin > 0) == pytest.approx(last["reward_model/validation_accuracy"])
    assert np.mean(np.logaddexp(0, -margin)) == pytest.approx(last["reward_model/validation_loss"], rel=1e-4)


def test_its_checkpoint_converts_to_the_export_and_bad_pairs_are_named(project: Project, tmp_path: Path) -> None:
    (bad := project.folder / "bad.jsonl").write_text(
        '{"prompt": "p", "chosen": "1", "rejected": "2"}\n{"prompt": "p", "chosen": "1"}\n'
    )
    data = [f"reward_model.data=[{{type: jsonl, path: {bad}}}]", f"run_dir={tmp_path}/new", *ONE_RANK]
    checkpoint = project.run / f"reward_model/checkpoints/step_{STEPS:06d}"
    cases = {
        "converted": dict(checkpoint=str(checkpoint), target=str(tmp_path / "out")),
        "refusal": dict(part="reward_model", config=str(project.config), overrides=data),
    }
    done = run_in_turn("tests.e2e.cases", 1, {name: (name, arguments) for name, arguments in cases.items()})
    export = project.run / "reward_model/hf"
    assert_same_weights(tmp_path / "out", export)
    assert (tmp_path / "out/config.json").read_text() == (export / "config.json").read_text()
    assert f"{bad}:2: no rejected" in done["refusal"][0]
    assert "resume=auto" in refused(project, "reward-model", project.config)
