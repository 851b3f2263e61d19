"""How one axis of an algorithm is chosen: a registered function together with its settings, as a value."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


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

    Raises ValueError for a name that is not registered, a setting it does not have and one it lacks.
    """
    known = keyword_settings(axis, registry, type)
    for name in settings:
        if name not in known:
            raise ValueError(f"{axis} {type} has no setting {name}; it has: {', '.join(known) or 'none'}")
    bound = {name: settings.get(name, default) for name, default in known.items()}
    for name, value in bound.items():
        if value is inspect.Parameter.empty:
            raise ValueError(f"{axis} {type} needs a value for {name}")
    return Choice(type, registry[type], tuple(bound.items()))


def keyword_settings(axis: str, registry: Mapping[str, Callable[..., Any]], type: str) -> dict[str, Any]:
    """The settings of a registered function and their defaults (`inspect.Parameter.empty` where there is none)."""
    if type not in registry:
        raise ValueError(f"{axis} {type} is unknown; choose one of: {', '.join(registry)}")
    parameters = inspect.signature(registry[type]).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
