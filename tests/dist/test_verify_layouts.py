"""The layout oracle: layouts agree with one process to rounding, and a wrong one is found out, by loss and tensor."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from megarl.config import load_config
from megarl.errors import BadInput
from megarl.verify.layouts.oracle import Row, compare_layouts

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "cpu" / "quickstart.yaml"
LOSSES = ["grpo", "dapo", "gspo", "sapo", "ppo", "critic", "sft"]
FAULTS = {
    "cp2": "local_sequence_ratio",
    "cp2+permuted": "keys_without_gradient",
    "dp2+budget80": "mean_of_micro_batches",
    "tp2": "experts_not_reduced",
    "tp2+permuted": "norms_not_reduced",
}


@pytest.fixture(scope="module")
def cfg():
    return load_config(CONFIG, [], require="model")


def test_layouts_agree_with_one_process(cfg):
    """Every loss, gradient and weight in float64, at 1e-10."""
    names = ["pp2vpp2", "tp2", "cp2ep2", "one+permuted", "one+unpacked"]
    found = compare_layouts(cfg, names, "float64")
    assert found.broken == {}
    assert [(row.layout.name, row.loss_name) for row in found.rows] == [(n, loss) for n in names for loss in LOSSES]
    assert [row.line() for row in found.rows if row.misses] == []
    assert found.failed == [] and "all within 1e-10" in found.summary()


@pytest.fixture(scope="module")
def faulty(cfg):
    """Rows by layout and loss, each layout with its fault."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEGARL_TEST_FAULTS", json.dumps(FAULTS))
        patch.syspath_prepend(str(CONFIG.parents[2]))
        lines: list[str] = []
        command = (sys.executable, "-m", "tests.dist.layout_faults")
        found = compare_layouts(cfg, list(FAULTS), "float64", say=lines.append, command=command)
    assert found.broken == {} and found.failed == list(FAULTS)
    assert sum("FAIL" in line for line in lines) == sum(bool(row.misses) for row in found.rows)
    return {(row.layout.name, row.loss_name): row for row in found.rows}


def failing(faulty: dict[tuple[str, str], Row], layout: str) -> list[str]:
    return [loss for loss in LOSSES if faulty[layout, loss].misses]


def test_a_sequence_ratio_of_local_tokens_shows_in_gspo_alone(faulty):
    assert failing(faulty, "cp2") == ["gspo"]
    misses = faulty["cp2", "gspo"].misses
    assert "loss" in misses and "gradient norm" in misses


def test_gathered_keys_without_their_gradient_show_in_every_gradient_and_no_loss(faulty):
    assert failing(faulty, "cp2+permuted") == LOSSES
    for loss in LOSSES:
        row = faulty["cp2+permuted", loss]
        assert "loss" not in row.misses and row.tensors["gradient"][0] > 1e-3


def test_a_mean_over_micro_batches_shows_in_every_loss(faulty):
    assert failing(faulty, "dp2+budget80") == LOSSES
    assert all("loss" in faulty["dp2+budget80", loss].misses for loss in LOSSES)


def test_unreduced_experts_are_named(faulty):
    assert failing(faulty, "tp2") == LOSSES
    assert all(".mlp.experts." in faulty["tp2", loss].tensors["gradient"][1] for loss in LOSSES)


def test_unreduced_norms_are_named(faulty):
    assert failing(faulty, "tp2+permuted") == LOSSES
    assert all("norm" in faulty["tp2+permuted", loss].tensors["gradient"][1] for loss in LOSSES)


@pytest.mark.parametrize(
    "name, problem",
    [
        ("xp2", "xp2 is not a degree"),
        ("tp", "give degrees such as"),
        ("tp2+fast", "\\+fast is unknown"),
        ("dp2tp2ep8", "its 4 ranks do not hold"),
        ("tp2+unpacked", "use one\\+unpacked"),
        ("tp4cp4", "needs 16 processes; set --nproc 16"),
        ("dp2+distopt", "no distributed optimizer in float64; set --dtype float32"),
    ],
)
def test_a_layout_that_is_none_is_refused(cfg, name, problem):
    with pytest.raises(BadInput, match=problem):
        compare_layouts(cfg, [name], "float64")
