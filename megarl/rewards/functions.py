"""The built-in verifiers, as functions of text. Imported by reward workers: standard library only at the top.

Each `make_*` takes the `params` of the config as keywords and returns
`(prompt: str, response: str, answer: str | None, **metadata) -> float | bool`. A function that raises is a failure of
that one response. An attribute `prepare(list of metadata)` imports what rows need, outside the time limit.
"""

from __future__ import annotations

import importlib
import logging
import re
import zlib
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from typing import Any

from megarl.rewards import tasks
from megarl.rewards.code import make_code
from megarl.rewards.judge import make_http

RewardFunction = Callable[..., Any]


def make_exact_match(ignore_case: bool = False, numeric: bool = False) -> RewardFunction:
    """1 when the stripped response equals the stripped answer; `numeric` compares decimals (`07.0` equals `7`)."""

    def exact_match(prompt: str, response: str, answer: str, **metadata: Any) -> bool:
        return same(response, answer, ignore_case, numeric)

    return exact_match


def make_regex(
    pattern: str, which: str = "last", ignore_case: bool = False, numeric: bool = False, flags: str = ""
) -> RewardFunction:
    """1 when what `pattern` finds equals the answer: its first group, or the whole match if it has none.

    `which` is `first` or `last` match; `flags` are letters of Python's inline flags, for example "is".
    """
    if which not in ("first", "last"):
        raise ValueError(f"which is {which!r}; set first or last")
    compiled = re.compile(f"(?{flags}){pattern}" if flags else pattern)

    def regex(prompt: str, response: str, answer: str, **metadata: Any) -> bool:
        found = list(compiled.finditer(response)) if which == "last" else [compiled.search(response)]
        match = found[-1] if found else None
        if match is None:
            return False
        extracted = match.group(1 if compiled.groups else 0)
        return extracted is not None and same(extracted, answer, ignore_case, numeric)

    return regex


def make_math_verify(precision: int = 6) -> RewardFunction:
    """1 when the math-verify library finds the response equal to the answer; `precision` in decimal digits.

    Its own time-outs are off (they need SIGALRM): the runner's hard limit holds.
    """
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)

    def math_verify(prompt: str, response: str, answer: str, **metadata: Any) -> bool:
        gold = parse(answer, parsing_timeout=None) or parse(f"${answer}$", parsing_timeout=None)
        if not gold:
            raise ValueError(f"math-verify cannot parse the answer {answer!r}")
        found = parse(response, parsing_timeout=None)
        return bool(found) and verify(gold, found, float_rounding=precision, timeout_seconds=None)

    return math_verify


def make_reasoning_gym(partial: bool = True) -> RewardFunction:
    """The score of the reasoning-gym data set the row came from, 0 .. 1.

    The answer is what stands in the last `<answer>` tag, or the whole stripped response. `partial=False` counts only
    full marks: several tasks give part of the score when the answer merely contains the right one as a substring.
    """
    tag = re.compile(r"<answer>\s?(.*?)\s?</answer>", re.DOTALL)

    def reasoning_gym(prompt: str, response: str, answer: str | None, *, entry: dict, **metadata: Any) -> float:
        tagged = tag.findall(response)
        score = tasks.score_function(entry["metadata"]["source_dataset"])((tagged or [response])[-1].strip(), entry)
        return float(score) if partial else float(score >= 1)

    def prepare(rows: list[dict[str, Any]]) -> None:
        for task in {row["entry"]["metadata"]["source_dataset"] for row in rows}:
            tasks.score_function(task)

    reasoning_gym.prepare = prepare
    return reasoning_gym


def make_custom(path: str, params: dict[str, Any]) -> RewardFunction:
    """The user's `module:function`; `params`, if any, are added to each call as keywords."""
    module, _, name = path.partition(":")
    function = getattr(importlib.import_module(module), name)

    def custom(prompt: str, response: str, answer: str | None, **metadata: Any) -> Any:
        return function(prompt, response, answer, **{**metadata, **params})

    return custom if params else function


def by_checksum(prompt: str, response: str, answer: str | None, **metadata: Any) -> float:
    """0, 0.25, ... or 1, by the bytes of the response: differs within a group however little a model has learned."""
    return zlib.crc32(response.encode(errors="replace")) % 5 / 4


def same(found: str, answer: str, ignore_case: bool, numeric: bool) -> bool:
    found, answer = found.strip(), answer.strip()
    if numeric:
        try:
            return Decimal(found.replace(",", "")) == Decimal(answer.replace(",", ""))
        except InvalidOperation:
            pass
    return found.casefold() == answer.casefold() if ignore_case else found == answer


BUILT_IN: dict[str, Callable[..., RewardFunction]] = {
    "exact_match": make_exact_match,
    "regex": make_regex,
    "math_verify": make_math_verify,
    "reasoning_gym": make_reasoning_gym,
    "code": make_code,
    "http": make_http,
}


def build(kind: str, params: dict[str, Any]) -> RewardFunction:
    """The reward `kind` (a built-in or `module:function`) with its params. Raises whatever its construction raises."""
    return make_custom(kind, params) if ":" in kind else BUILT_IN[kind](**params)
