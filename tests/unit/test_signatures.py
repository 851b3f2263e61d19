"""The tables of `tests/signatures` against the sources they were extracted from, and against what Megatron imports.

That calls bind to them is tested by running the callers on a stand-in: `tests/dist/test_te_provider.py`.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from megarl.platform import features
from tests.signatures import load, signature
from tools import extract_signatures

TABLE = load("transformer-engine")


def test_tables_hold_what_the_tool_extracts():
    for package, wanted in extract_signatures.WANTED.items():
        stored = json.loads((extract_signatures.FOLDER / f"{package}.json").read_text())
        assert stored["version"] == wanted.version and stored["names"].keys() == wanted.names.keys()
        for name, methods in wanted.names.items():
            assert {method for method in methods} <= stored["names"][name].keys()


def test_signatures_are_read_as_python_reads_them():
    def written(self, a, b=1, *args, c, d="x", e=print, **rest): ...

    found = signature("self, a, b=1, *args, c, d='x', e=print, **rest").parameters.values()
    import inspect

    expected = inspect.signature(written).parameters.values()
    assert [(p.name, p.kind) for p in found] == [(p.name, p.kind) for p in expected]
    assert [p.default for p in found][:3] == [p.default for p in expected][:3]


def test_layouts_that_conversion_relies_on():
    """Weights are [outputs, inputs]; grouped linears have one for each expert, norms are called layer_norm_weight."""
    parameters = {name.rsplit(".", 1)[1]: entry["parameters"] for name, entry in TABLE.items() if "parameters" in entry}
    matrix, vector = "self.out_features, self.in_features", "self.out_features"
    assert parameters["Linear"] == {"weight": matrix, "bias": vector}
    assert parameters["GroupedLinear"] == {"weight{i}": matrix, "bias{i}": vector}
    assert parameters["LayerNormLinear"].items() >= {"layer_norm_weight": "self.in_features", "weight": matrix}.items()


def test_megatron_defines_the_wrappers():
    folder = Path(importlib.util.find_spec("megatron.core").submodule_search_locations[0])
    tree = ast.parse((folder / "extensions" / "transformer_engine.py").read_text())
    defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    assert set(features.TE_WRAPPERS) <= defined


def test_recipes_and_their_probes_are_in_the_release():
    for kind, probe in features.TE_RECIPES.values():
        assert f"transformer_engine.common.recipe.{kind}" in TABLE
        assert "return_reason" in signature(TABLE[f"transformer_engine.pytorch.{probe}"]["signature"]).parameters
    from megarl.platform.te_patches import BLOCK_OPERANDS

    assert set(BLOCK_OPERANDS) <= set(TABLE["transformer_engine.common.recipe.Float8BlockScaling"]["attributes"])
    assert "power_2_scale" in signature(TABLE["transformer_engine.common.recipe.QParams"]["__init__"]).parameters


@pytest.mark.slow
def test_table_equals_the_release(tmp_path):
    """The wheel is plain Python, 0.7 MB: the sources of all frameworks without a library."""
    release = f"transformer-engine=={extract_signatures.WANTED['transformer-engine'].version}"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(tmp_path), release]
    subprocess.run(pip, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "source")
    assert extract_signatures.table("transformer-engine", tmp_path / "source")["names"] == TABLE
