"""Rewards from models on the learner's ranks: the scores of transformers, in any layout, alone and in a weighted sum."""

from __future__ import annotations

import math

import pytest
import torch

from megarl.config.schema import Tokenizer
from megarl.models.generate import make_tokenizer
from tests.dist.checkpoints import make
from tests.dist.harness import run_ranks
from tests.dist.scoring_cases import FACTORS, JUDGED, LONG, groups

LAYOUTS = [dict(ep=2), dict(tp=2), dict(pp=2)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A policy's folder (its tokenizer is all that counts), an MoE and a dense reward model; and the two as modules."""
    root = tmp_path_factory.mktemp("scoring")
    models = {"quality": make(root / "quality", scorer=True), "style": make(root / "style", "qwen3", 4, scorer=True)}
    tokenizer = make_tokenizer(Tokenizer(), 64)
    for name in ("policy", "quality", "style"):
        tokenizer.save_pretrained(root / name)
    return [str(root / name) for name in ("policy", "quality", "style")], models


@pytest.fixture(scope="module")
def ranks(folders, tmp_path_factory):
    """What each of two ranks scored, and what they said to a language model and to one with another tokenizer."""
    root = tmp_path_factory.mktemp("others")
    make(root / "lm", "qwen3")
    make(root / "other", "qwen3", scorer=True)
    make_tokenizer(Tokenizer(vocab_size=270), 64).save_pretrained(root / "other")
    others = [str(root / name) for name in ("lm", "other")]
    return run_ranks("tests.dist.scoring_cases:score_and_refuse", 2, *folders[0], LAYOUTS, others)


def test_scores_are_those_of_transformers_in_any_layout(folders, ranks):
    models = folders[1]
    expected = {}
    for group in groups():
        for t in group.trajectories:
            with torch.no_grad():
                tokens = torch.tensor([t.prompt_ids + t.response_ids])
                said = {name: float(model(tokens).logits[0, 0]) for name, model in models.items()}
            said["right"] = float(t.text == "7")
            expected[f"{t.group_id}/{t.sample_index}"] = said
    assert max(abs(said["quality"]) for said in expected.values()) > 0.5
    results = [rank["scored"] for rank in ranks]
    for index, layout in enumerate(LAYOUTS):
        found = {name: row for rank in results for name, row in rank[index]["said"].items()}
        assert found.keys() == expected.keys(), layout
        for name, (score, shaped, failed, parts) in found.items():
            said, where = expected[name], f"{layout} {name}"
            assert shaped == score, where
            if name == LONG:
                assert (score, failed, parts) == (-1.0, True, {"right": 0.0, "quality": -3.0, "style": 0.0}), where
            elif name.startswith(JUDGED):
                assert (failed, parts) == (False, {}) and score == pytest.approx(said["quality"], abs=1e-4), where
            else:
                assert not failed and parts == pytest.approx({name: said[name] for name in FACTORS}, abs=1e-4), where
                assert score == pytest.approx(sum(f * said[part] for part, f in FACTORS.items()), abs=1e-3), where
    first = results[0][0]  # of the two ranks of ep=2, each with its own share
    mean = [row[3]["quality"] for row in first["said"].values() if row[3]]
    assert first["metrics"]["reward/quality"] == pytest.approx(sum(mean) / len(mean))
    assert set(first["metrics"]) == {f"reward/{name}" for name in FACTORS}
    assert all(math.isfinite(value) for value in first["metrics"].values())


def test_other_models_and_other_tokenizers_are_refused(ranks):
    for rank in ranks:
        (lm, other) = rank["refused"]
        assert "/lm: a language model gives no scores" in lm and "\n" not in lm
        assert "/other: its tokenizer is not that of" in other and "\n" not in other
