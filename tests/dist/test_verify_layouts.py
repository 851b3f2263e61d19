"""The layout oracle: layouts agree with one process to rounding, and a wrong one is found out, by loss and tensor."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megarl.config import Config, Model, load_config
from megarl.config.schema import Generate
from megarl.convert import family
from megarl.convert.hf_io import write_json
from megarl.errors import BadInput, RunFailed
from megarl.models.generate import spec_of
from megarl.verify.layouts import oracle
from megarl.verify.layouts.names import parse
from megarl.verify.layouts.oracle import Comparison, Row, compare_layouts

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "cpu" / "quickstart.yaml"
LOSSES = ["grpo", "dapo", "gspo", "sapo", "ppo", "critic", "sft"]
FAULTS = {
    "cp2": "local_sequence_ratio",
    "cp2+permuted": "keys_without_gradient",
    "dp2+budget80": "mean_of_micro_batches",
    "tp2": "experts_not_reduced",
    "tp2+permuted": "norms_not_reduced",
    "one+permuted": "other_experts",
}


@pytest.fixture(scope="module")
def cfg():
    return load_config(CONFIG, [], require="model")


def test_layouts_agree_with_one_process(cfg):
    """Every loss, gradient and weight in float64, at 1e-10."""
    names = ["pp2vpp2", "tp2", "cp2ep2", "one+unpacked"]
    found = compare_layouts(cfg, names, "float64")
    assert found.broken == {}
    assert [(row.layout.name, row.loss_name) for row in found.rows] == [(n, loss) for n in names for loss in LOSSES]
    assert [row.line() for row in found.rows if row.misses] == []
    assert found.failed == [] and "all within 1e-10" in found.summary()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("kind", ["dense", "mixed"])
def test_other_kinds_of_model_agree_too(tmp_path, kind, dtype):
    """Dense with tied embeddings; MoE behind dense layers, whose gates are not renormalised."""
    spec = spec_of(Generate(family="qwen3" if kind == "dense" else "qwen3_moe", tie_embeddings=True, num_layers=12))
    if kind == "mixed":
        spec = replace(spec, top_k=3, moe_layers=tuple(range(6, 12)), norm_topk_prob=False)
    write_json(tmp_path / "config.json", family(spec.family).write_config(spec))
    names = ["pp2vpp2", "tp2cp2", "dp2", "pp2+selective", *(["etp2", "tp2ep2"] if spec.is_moe else [])]
    found = compare_layouts(Config(model=Model(path=str(tmp_path))), names, dtype)
    assert found.failed == [] and {row.layout.name for row in found.rows} == set(names)


def compare_with_faults(cfg: Config, faults: dict[str, str], names: list[str]) -> tuple[Comparison, list[str]]:
    """The comparison and its lines when the ranks of some layouts have a fault."""
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEGARL_TEST_FAULTS", json.dumps(faults))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(CONFIG.parents[2]), os.environ.get("PYTHONPATH", "")]))
        command = (sys.executable, "-m", "tests.dist.layout_faults")
        return compare_layouts(cfg, names, "float64", say=lines.append, command=command), lines


@pytest.fixture(scope="module")
def faulty(cfg):
    """Rows by layout and loss, each layout with its fault."""
    found, lines = compare_with_faults(cfg, FAULTS, list(FAULTS))
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


def test_routers_do_take_the_experts_of_the_single_process(faulty):
    assert failing(faulty, "one+permuted") == LOSSES


def test_a_step_whose_gates_stay_shut_is_refused(cfg):
    with pytest.raises(RunFailed, match="this step proves too little: grpo: 0% of the gates act, not 20% to 60%"):
        compare_with_faults(cfg, {"one": "quiet_gates"}, ["tp2"])


def test_the_command_fails_when_a_layout_does(cfg, monkeypatch, capsys):
    row = Row(parse("tp2"), "grpo", 1e-10, 0.0, 0.0, {what: (1e-3, "a.weight") for what in ("gradient", "sgd", "adam")}, "")
    found = Comparison([row], {"pp2": "ended with code 1"})
    monkeypatch.setattr(oracle, "compare_layouts", lambda *args, **kwargs: found)
    with pytest.raises(RunFailed, match="not as one process: tp2, pp2$"):
        oracle.verify_layouts(cfg, ["tp2", "pp2"], "float64", 2)
    assert "1 above 1e-10; worst gradient 1.0e-03: a.weight (tp2, grpo)" in capsys.readouterr().out
    found.rows, found.broken = [], {}
    oracle.verify_layouts(cfg, [], "float64", 2)


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
