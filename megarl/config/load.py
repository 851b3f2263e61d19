"""From a YAML file and `a.b=c` overrides to a checked `Config`, and back to text."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from megarl.bounds import TooMuch, bounded
from megarl.config.check import Command, check_config
from megarl.config.schema import Config, Section, may_be_unset
from megarl.errors import BadInput
from megarl.secrets import VARIABLE

LARGEST_FILE = 4 << 20  # bytes
MOST_NODES = 100_000
READ_SECONDS = 30.0


@dataclass(frozen=True)
class Resolved:
    """A configuration and where each of its leaves came from.

    `origins["rl.steps"]` is "file" or "override"; a leaf that is not in it has its default.
    """

    config: Config
    origins: dict[str, str]


def load_config(path: str | Path, overrides: Sequence[str] = (), require: Command | None = None) -> Config:
    """The checked configuration of the YAML file `path` with `a.b=c` overrides applied.

    `require` names the command it is for, so that the sections and files which that command reads are checked too.
    Raises `BadInput` for anything that can be known before a process starts.
    """
    return resolve(path, overrides, require).config


def resolve(path: str | Path, overrides: Sequence[str] = (), require: Command | None = None) -> Resolved:
    """`load_config` with the origin of every value."""
    tree = _read_yaml(Path(path))
    origins = {key: "file" for key, _ in _leaves(OmegaConf.to_container(tree))}
    for override in overrides:
        key = _apply_override(tree, override)
        for old in [k for k in origins if k.startswith(key + ".")]:
            del origins[old]
        origins |= {leaf: "override" for leaf, _ in _leaves(OmegaConf.to_container(tree), only=key)}
    _refuse_secrets(tree)
    try:
        with bounded(READ_SECONDS):
            data = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, ValueError, TypeError, RecursionError, TooMuch) as e:
        raise BadInput(f"{path}: {_first_line(e)}; define the value it refers to") from None
    try:
        config = Config.model_validate(data)
    except ValidationError as e:
        raise BadInput(_explain(e)) from None
    try:
        check_config(config, require)
    except OSError as e:  # a path that no file system has, as a name of thousands of letters
        name = str(e.filename)
        raise BadInput(f"{name if len(name) < 80 else f'{name[:80]}...'}: {e.strerror}; set another path") from None
    return Resolved(config, origins)


def dump_config(config: Config) -> str:
    """YAML that loads back to an equal configuration."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def describe(resolved: Resolved) -> Iterator[str]:
    """Lines of YAML with every resolved field, then in a comment where its value came from and what it means."""
    yield from _describe(resolved.config, resolved.origins, prefix="", indent=0)


def _describe(section: Section, origins: dict[str, str], prefix: str, indent: int) -> Iterator[str]:
    pad = "  " * indent
    for name, field in type(section).model_fields.items():
        value, key = getattr(section, name), f"{prefix}{name}"
        meaning = " ".join((field.description or "").split())
        if isinstance(value, Section):
            yield f"{pad}{name}:  # {meaning}"
            yield from _describe(value, origins, key + ".", indent + 1)
        elif isinstance(value, list) and value and isinstance(value[0], Section):
            yield f"{pad}{name}:  # {meaning}"
            for i, item in enumerate(value):
                yield f"{pad}  -"
                yield from _describe(item, origins, f"{key}.{i}.", indent + 2)
        else:
            plain = section.model_dump(mode="json")[name]
            origin = _origin(key, origins)
            yield f"{pad + name + ': ' + json.dumps(plain, ensure_ascii=False):<44}  # [{origin}] {meaning}"
    for name, value in (section.model_extra or {}).items():  # settings of a registered function
        origin = _origin(f"{prefix}{name}", origins)
        yield f"{pad + name + ': ' + json.dumps(value, ensure_ascii=False):<44}  # [{origin}]"


def _origin(key: str, origins: dict[str, str]) -> str:
    below = {origin for leaf, origin in origins.items() if leaf == key or leaf.startswith(key + ".")}
    return "override" if "override" in below else "file" if below else "default"


def _read_yaml(path: Path) -> Any:
    try:
        _check_size(path)
        with bounded(READ_SECONDS):
            tree = OmegaConf.load(path)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; give the path of a YAML configuration") from None
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise BadInput(
            f"{where}: not valid YAML ({getattr(e, 'problem', None) or _first_line(e)}); fix that line"
        ) from None
    except (OSError, ValueError, TypeError, RecursionError, AttributeError, TooMuch, OmegaConfBaseException) as e:
        raise BadInput(f"{path}: cannot be read ({_first_line(e)}); give a YAML configuration") from None
    if not OmegaConf.is_dict(tree):
        raise BadInput(f"{path}: holds no `key: value` pairs; start from a file in configs/")
    return tree


def _check_size(path: Path) -> None:
    """Raises BadInput for a file whose aliases make it larger than any configuration: YAML can double itself in a line."""
    if path.stat().st_size > LARGEST_FILE:
        raise BadInput(f"{path}: {path.stat().st_size} bytes are no configuration; start from a file in configs/")
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = MOST_NODES + 1  # inside itself it would have no end
            parts = node.value if isinstance(node, yaml.CollectionNode) else []
            pairs = (part for item in parts for part in (item if isinstance(item, tuple) else (item,)))
            sizes[id(node)] = 1 + sum(map(size, pairs))
        return sizes[id(node)]

    with path.open(encoding="utf-8") as stream:
        root = yaml.compose(stream, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    if root is not None and size(root) > MOST_NODES:
        raise BadInput(f"{path}: its aliases (*name) repeat more than {MOST_NODES} values; write them out")


def _refuse_secrets(tree: Any) -> None:
    """Raises BadInput for `${oc.env:NAME}` of a secret: its value would be in everything that is saved."""
    for key, value in _leaves(OmegaConf.to_container(tree)):
        for name in re.findall(r"oc\.env:\s*([^},\s]+)", str(value)):
            if VARIABLE.search(name):
                raise BadInput(f"{key} = {value!r}: would be saved with the run; write ${name} where a secret may be given")


def _apply_override(tree: Any, override: str) -> str:
    key, equals, text = override.partition("=")
    if not equals or not key or "" in key.split("."):
        raise BadInput(f"override {override!r}: not of the form a.b=c; write for example rl.steps=20")
    try:
        value = OmegaConf.from_dotlist([f"value={text}"])._get_node("value")
        OmegaConf.update(tree, key, value, merge=False)
    except (OmegaConfBaseException, yaml.YAMLError, LookupError, RecursionError, TypeError, ValueError, AttributeError) as e:
        raise BadInput(f"override {override!r}: {_first_line(e)}; give a key that exists and a YAML value") from None
    return key


def _leaves(node: Any, prefix: str = "", only: str | None = None) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf; with `only`, of those at or below that key."""
    if isinstance(node, (dict, list)) and node:
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for k, v in items:
            yield from _leaves(v, f"{prefix}.{k}" if prefix else str(k), only)
    elif only is None or prefix == only or prefix.startswith(only + "."):
        yield prefix, node


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _explain(error: ValidationError) -> str:
    """One line for the first of pydantic's complaints: the key, the value, what to set."""
    problems = error.errors()
    first = problems[0]
    key = ".".join(str(part) for part in first["loc"])
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if first["type"] == "extra_forbidden":
        return f"{key} = {_show(first['input'])}: unknown key; {_suggest(first['loc'])}{more}"
    if first["type"] == "missing":
        return f"{key}: missing; set {key} ({_meaning(first['loc'])}){more}"
    wanted = first["msg"].removeprefix("Input should be ")
    if first["type"] == "model_type":
        wanted = "`key: value` pairs"
    elif wanted.startswith(("greater", "less")):
        wanted = f"a value {wanted}"
    field = _field_at(first["loc"])
    wanted += ", or none" if may_be_unset(field) else ""
    off = " (YAML reads off and no as false)" if first["input"] is False else ""
    return f"{key} = {_show(first['input'])}: set {wanted}{off}{more}"


def _show(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _section_at(loc: Sequence[Any]) -> type[BaseModel] | None:
    """The section class that the path `loc` leads to."""
    current: Any = Config
    for part in loc:
        if isinstance(current, type) and issubclass(current, BaseModel):
            field = current.model_fields.get(str(part))
            current = field.annotation if field else None
        else:  # an index of a list or a key of a dict: the class in its annotation
            current = next((a for a in get_args(current) if isinstance(a, type) and issubclass(a, BaseModel)), None)
        optional = [a for a in get_args(current) if isinstance(a, type) and issubclass(a, BaseModel)]
        if type(None) in get_args(current) and optional:
            current = optional[0]
    return current if isinstance(current, type) and issubclass(current, BaseModel) else None


def _suggest(loc: Sequence[Any]) -> str:
    parent = _section_at(loc[:-1])
    if parent is None:
        return "remove it"
    prefix = "".join(f"{part}." for part in loc[:-1])
    near = difflib.get_close_matches(str(loc[-1]), parent.model_fields, n=1, cutoff=0.6)
    if near:
        return f"did you mean {prefix}{near[0]}?"
    elsewhere = [key for key in _all_keys(Config) if key.split(".")[-1] == loc[-1]]
    if elsewhere:
        return f"did you mean {elsewhere[0]}?"
    return f"set one of {', '.join(parent.model_fields)}"


def _all_keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel) and kind is not section:
                yield from _all_keys(kind, f"{prefix}{name}.")


def _field_at(loc: Sequence[Any]) -> FieldInfo | None:
    parent = _section_at(loc[:-1])
    return parent.model_fields.get(str(loc[-1])) if parent else None


def _meaning(loc: Sequence[Any]) -> str:
    field = _field_at(loc)
    return " ".join(((field.description if field else None) or "required").rstrip(".").split())
