"""Secrets: named in a configuration, read from the environment when they are used, and in nothing that is written.

`$NAME` in the address or a header of an http reward stands for the environment variable NAME. The configuration, and so
the saved one, the tracker's, the report and the checkpoints, keep the reference.
"""

from __future__ import annotations

import os
import re
import urllib.parse
from collections.abc import Mapping
from typing import Any

from megarl.errors import BadInput

REFERENCE = re.compile(r"\$([A-Za-z_]\w*)")
VARIABLE = re.compile(r"(^|_)(API_?KEY|KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(_|$)", re.IGNORECASE)
HEADER = re.compile(r"auth|key|token|secret|passw|cookie|credential", re.IGNORECASE)
SHORTEST = 6  # characters: a shorter value would mask ordinary text
MASK = "***"

_read: set[str] = set()  # values that references have had in this process: what `masked` must hide beside the obvious


def from_environment(value: Any, key: str) -> Any:
    """A text, or a dict of texts, with every `$NAME` replaced. Raises BadInput for a variable that is not set."""
    if isinstance(value, Mapping):
        return {name: from_environment(text, f"{key}.{name}") for name, text in value.items()}
    if not isinstance(value, str):
        return value

    def read(match: re.Match[str]) -> str:
        name = match[1]
        if not os.environ.get(name):
            raise BadInput(f"{key}: ${name} is not in the environment; export {name}")
        _read.add(os.environ[name])
        return os.environ[name]

    return REFERENCE.sub(read, value)


def refuse_literals(params: Mapping[str, Any], key: str) -> None:
    """Raises BadInput when an http reward's address or headers hold a secret itself instead of a reference to it."""
    headers = params.get("headers")
    for name, value in headers.items() if isinstance(headers, Mapping) else ():
        if HEADER.search(str(name)) and not REFERENCE.search(str(value)):
            raise BadInput(
                f"{key}.headers.{name}: a secret would be saved with the run; set it to $NAME, and NAME in the environment"
            )
    try:
        url = urllib.parse.urlsplit(str(params.get("url", "")))
        fields = urllib.parse.parse_qsl(url.query)
    except ValueError:
        return
    given = [("password", url.password or "")] if url.password else []
    given += [(name, value) for name, value in fields if HEADER.search(name)]
    for name, value in given:
        if not REFERENCE.search(value):
            raise BadInput(
                f"{key}.url: its {name} would be saved with the run; write $NAME there, and set NAME in the environment"
            )


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without the variables that are secrets by their names."""
    return {name: value for name, value in environment.items() if not VARIABLE.search(name)}


def masked(text: str) -> str:
    """`text` without the value of any secret of this process's environment."""
    values = {value for name, value in os.environ.items() if VARIABLE.search(name)} | _read
    for value in sorted(values, key=len, reverse=True):
        if len(value) >= SHORTEST:
            text = text.replace(value, MASK)
    return text
