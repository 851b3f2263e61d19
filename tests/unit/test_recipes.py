"""The recipes of real models: each loads, with every variant at its head, and says on how many GPUs it runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from megarl import algorithms, platform
from megarl.config import load_config
from megarl.config.families import FAMILIES
from megarl.convert import read_spec
from megarl.errors import BadInput
from tools.bench.recipe_costs import BYTES, SECONDS, lines, planned, variants

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "configs" / "recipes").glob("*.yaml"))
ALGORITHMS = ("gspo", "sapo")
QUICK = sorted({file.stem.rpartition("-")[0] for file in RECIPES} - {"deepseek-v3"})  # its 61 layers take half a minute

ALL = [pytest.param(file, over, id=f"{file.stem} {label}") for file in RECIPES for label, over in variants(file).items()]


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)  # their paths are relative to it


def test_every_model_has_each_algorithm():
    models = {file.stem.rpartition("-")[0] for file in RECIPES}
    assert {file.stem for file in RECIPES} == {f"{model}-{name}" for model in models for name in ALGORITHMS}
    assert len(models) == 6


@pytest.mark.parametrize("file, overrides", ALL)
def test_a_recipe_and_its_variants_load(file, overrides):
    config = load_config(file, overrides.split())
    spec = read_spec(config.model.path)
    p = config.parallel
    assert spec.is_moe and spec.family in FAMILIES and config.rl.routing_replay == "rollout"
    assert p.nproc % (p.tp * p.pp * p.cp) == 0 == p.nproc % (p.etp * p.ep * p.pp)
    assert p.nproc % (config.rollout.tensor_parallel * config.rollout.data_parallel) == 0
    platform.setup()
    assert algorithms.check(config.rl.algorithm) is None
    from megarl.rollout.fp8_weights import Fp8Weights

    Fp8Weights.of(spec, config.model, config.rollout)  # raises where vLLM has no such layers


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_the_head_says_what_the_file_is(file):
    text, config = file.read_text(), load_config(file)
    lines = text.splitlines()
    assert len(lines) <= 60 and max(map(len, lines)) <= 220
    model, _, algorithm = file.stem.rpartition("-")
    assert config.model.path == f"configs/models/{model}" and (ROOT / config.model.path / "config.json").is_file()
    assert config.rl.algorithm.preset == algorithm and config.run_dir == f"runs/{file.stem}"
    assert int(re.search(r"(\d+) GPUs", lines[0])[1]) == config.parallel.nproc
    labels = variants(file)
    assert {"FP8", "long context"} <= labels.keys()
    assert load_config(file, labels["FP8"].split()).model.fp8 != "none" == config.model.fp8
    longer = load_config(file, labels["long context"].split())
    assert longer.rollout.max_response_tokens >= 3 * config.rollout.max_response_tokens and longer.parallel.cp > 1
    for label, overrides in labels.items():
        gpus = re.search(r"(\d+) GPUs", label)
        if gpus:
            assert load_config(file, overrides.split()).parallel.nproc == int(gpus[1])


@pytest.mark.parametrize("model", sorted({file.stem.rpartition("-")[0] for file in RECIPES}))
def test_recipes_of_a_model_differ_in_the_algorithm_alone(model):
    trees = [yaml.safe_load((ROOT / f"configs/recipes/{model}-{name}.yaml").read_text()) for name in ALGORITHMS]
    for tree in trees:
        del tree["run_dir"], tree["rl"]["algorithm"]
    assert trees[0] == trees[1]


def numbers(line):
    return [float(number) for number in re.findall(r"\d+\.?\d*", line)]


def check_expected(file, overrides=""):
    """What the head says is what `megarl plan` says; variants say nothing, but fit."""
    plan = planned(file, overrides)
    assert plan.memory.problem is None
    if not overrides:
        head = [line for line in file.read_text().splitlines() if line.startswith((BYTES, SECONDS))]
        for said, found in zip(head, lines(plan), strict=True):
            assert numbers(said) == pytest.approx(numbers(found), rel=0.03, abs=0.11), (said, found)
        sapo = file.with_name(file.name.replace("gspo", "sapo")).read_text().splitlines()
        assert [line for line in sapo if line.startswith((BYTES, SECONDS))] == head


@pytest.mark.parametrize("model", QUICK)
def test_a_recipe_fits_and_says_what_it_costs(model):
    check_expected(Path(f"configs/recipes/{model}-gspo.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("file, overrides", [one for one in ALL if "gspo" in one.id])
def test_every_recipe_fits_and_says_what_it_costs(file, overrides):
    check_expected(file, overrides)


def test_a_layout_that_cannot_be_is_found():
    with pytest.raises(BadInput, match="parallel.ep = 3"):
        load_config(RECIPES[0], ["parallel.ep=3"])
