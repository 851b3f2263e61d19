"""How one axis of an algorithm is chosen: a registered function together with its settings, as a value."""

from __future__ import annotations

import inspect
import math
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Choice:
    """A registered function with its settings bound, comparable and printable: `clip(low=0.2, high=0.28)`."""

    type: str
    function: Callable[..., Any]
    settings: tuple[tuple[str, Any], ...]

    def __call__(self, *args: Any) -> Any:
        return self.function(*args, **dict(self.settings))

    def __repr__(self) -> str:
        return f"{self.type}({', '.join(f'{name}={value}' for name, value in self.settings)})"


def choose(axis: str, registry: Mapping[str, Callable[..., Any]], type: str, **settings: Any) -> Choice:
    """Binds `settings` to the function registered as `type`; its keyword-only parameters are the settings.

    Raises ValueError for a name that is not registered, a setting it does not have, one it lacks, and a value that is
    not of the annotated kind.
    """
    known = keyword_settings(axis, registry, type)
    for name in settings:
        if name not in known:
            raise ValueError(f"{axis} {type} has no setting {name}; it has: {', '.join(known) or 'none'}")
    bound = {name: settings.get(name, default) for name, default in known.items()}
    for name, value in bound.items():
        if value is inspect.Parameter.empty:
            raise ValueError(f"{axis} {type} needs a value for {name}")
        reason = _unfit(value, _hints(registry[type]).get(name, Any))
        if reason:
            raise ValueError(f"{axis} {type} {name} {value!r} {reason}")
    return Choice(type, registry[type], tuple(bound.items()))


def keyword_settings(axis: str, registry: Mapping[str, Callable[..., Any]], type: str) -> dict[str, Any]:
    """The settings of a registered function and their defaults (`inspect.Parameter.empty` where there is none)."""
    if type not in registry:
        raise ValueError(f"{axis} {type} is unknown; choose one of: {', '.join(registry)}")
    parameters = inspect.signature(registry[type]).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    except NameError:  # annotated with what only a type checker imports: nothing to check against
        return {}


def _unfit(value: Any, hint: Any) -> str | None:
    """Why `value` is no number, switch or name as annotated; None when it is, or when the annotation is something else."""
    if typing.get_origin(hint) is Literal:
        names = typing.get_args(hint)
        return None if value in names else f"is unknown; choose one of: {', '.join(names)}"
    kinds = typing.get_args(hint) or (hint,)
    if value is None and None.__class__ in kinds:
        return None
    if bool in kinds:
        return None if isinstance(value, bool) else "is neither true nor false"
    if float not in kinds and int not in kinds:
        return None
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)
    if float in kinds:
        return None if number else "is not a number"
    return None if number and float(value).is_integer() else "is not a whole number"
