"""reasoning-gym's tasks by name, without importing all hundred of them.

`import reasoning_gym` pulls in matplotlib and sympy (2 s, 110 MiB in every process); a task needs its own category
only. Standard library only in here: reward workers import this module.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megarl.errors import BadInput


def create_dataset(task: str, **params: Any) -> Any:
    """reasoning-gym's data set `task` (indexable, with `score_answer`).

    Raises BadInput when reasoning-gym is missing, the task is unknown, or it refuses a parameter.
    """
    _import_task(task)
    from reasoning_gym import factory

    if task not in factory.DATASETS:
        known = ", ".join(sorted(name for name in factory.DATASETS if name[:3] == task[:3])) or "chain_sum, gcd, ..."
        raise BadInput(f"task: reasoning-gym has no data set {task!r}; set one of its names ({known})")
    try:
        return factory.create_dataset(task, **params)
    except (TypeError, AssertionError, ValueError) as error:
        raise BadInput(f"params of reasoning-gym task {task}: {error}; set parameters its config accepts") from None


@functools.cache
def score_function(task: str) -> Callable[[str | None, dict[str, Any]], float]:
    """The task's own `score_answer(answer, entry)`, under its default config as reasoning-gym itself does."""
    return create_dataset(task).score_answer


def _import_task(task: str) -> None:
    """Registers `task` by importing its module only; falls back to the whole package."""
    spec = importlib.util.find_spec("reasoning_gym")
    if spec is None:
        raise BadInput(
            "data type reasoning_gym needs the package reasoning-gym: install it (pip install reasoning-gym)"
        )
    root = Path(next(iter(spec.submodule_search_locations)))
    module = _module_of(root, task)
    if module is None:
        importlib.import_module("reasoning_gym").create_dataset  # noqa: B018  (the attribute loads the whole package)
        return
    _lazy_package(spec)
    importlib.import_module(module)


@functools.cache
def _module_of(root: Path, task: str) -> str | None:
    """The module below `root` that registers `task`: the one that names it in `DATASET_NAME = ...`."""
    wanted = re.compile(rf"""^(?:DATASET_NAME\s*=|register_dataset\()\s*["']{re.escape(task)}["']""", re.MULTILINE)
    for path in sorted(root.rglob("*.py")):
        if wanted.search(path.read_text(encoding="utf-8")):
            return ".".join(("reasoning_gym", *path.relative_to(root).with_suffix("").parts))
    return None


def _lazy_package(spec: Any) -> None:
    """Puts `reasoning_gym` into sys.modules unexecuted; its `__init__` runs when someone asks for one of its names."""
    if "reasoning_gym" in sys.modules:
        return
    package = importlib.util.module_from_spec(spec)

    def run_init(attribute: str) -> Any:
        if attribute.startswith("__"):  # the import system probes for these
            raise AttributeError(attribute)
        vars(package).pop("__getattr__", None)
        spec.loader.exec_module(package)
        return getattr(package, attribute)

    package.__getattr__ = run_init
    sys.modules["reasoning_gym"] = package
