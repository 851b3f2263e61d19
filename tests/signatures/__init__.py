"""What megarl and Megatron-core rely on of packages that cannot be imported here, by tools/extract_signatures.py."""

from __future__ import annotations

import ast
import inspect
import json
from pathlib import Path
from typing import Any


def load(package: str) -> dict[str, dict[str, Any]]:
    """Public name -> what the pinned release's source says of it."""
    return json.loads((Path(__file__).parent / f"{package}.json").read_text())["names"]


def signature(text: str) -> inspect.Signature:
    """`"self, a, *, b=1, **c"`. A default that is no literal is its own text."""
    arguments = ast.parse(f"def f({text}): ...").body[0].args  # type: ignore[attr-defined]
    plain, keyword = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    defaults = [None] * (len(arguments.args) - len(arguments.defaults)) + list(arguments.defaults)
    out = [inspect.Parameter(a.arg, plain, default=_default(d)) for a, d in zip(arguments.args, defaults, strict=True)]
    if arguments.vararg:
        out.append(inspect.Parameter(arguments.vararg.arg, inspect.Parameter.VAR_POSITIONAL))
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        out.append(inspect.Parameter(argument.arg, keyword, default=_default(default)))
    if arguments.kwarg:
        out.append(inspect.Parameter(arguments.kwarg.arg, inspect.Parameter.VAR_KEYWORD))
    return inspect.Signature(out)


def _default(node: ast.expr | None) -> Any:
    if node is None:
        return inspect.Parameter.empty
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)
