"""Scripts that no other test runs still name what the package has."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

from megarl import platform

platform.setup()

TOOLS = Path(__file__).parents[2] / "tools"
SCRIPTS = sorted(TOOLS.rglob("*.py"))


def missing(source: str) -> list[str]:
    """What `from megarl.. import ..` asks for, anywhere in the source, and does not get."""
    out = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "megarl":
            module = importlib.import_module(node.module)
            for name in (alias.name for alias in node.names):
                path = f"{node.module}.{name}"
                if not hasattr(module, name) and not (hasattr(module, "__path__") and importlib.util.find_spec(path)):
                    out.append(path)
    return out


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: str(script.relative_to(TOOLS)))
def test_imports_of_the_package_exist(script):
    assert missing(script.read_text()) == []


def test_a_name_that_is_gone_is_found():
    assert missing("def main():\n    from megarl.convert.save import save_hf, _gone") == ["megarl.convert.save._gone"]
