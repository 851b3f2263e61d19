"""Programs that a model writes, run against a row's tests where they can do no harm (`sandbox.run_program`)."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from megarl.rewards.sandbox import Bounds, run_program

BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)


def make_code(seconds: float = 2.0, memory_gib: float = 1.0, partial: bool = False) -> Callable[..., float]:
    """1 when the Python program in the response prints what every test of the row expects; `partial`: the share of them.

    The program is what stands in the last ``` block, or the whole response. `tests` of a row: a list of `{"input",
    "output"}`, of which it gets `input` on standard input; white space at the ends of lines and of the output does not
    count. What a test expects never enters the program's reach. A program that runs longer than `seconds`, or holds more
    than `memory_gib`, fails that test.
    """
    bounds = Bounds(seconds, int(memory_gib * 2**30))

    def code(prompt: str, response: str, answer: str | None, *, tests: list, **metadata: Any) -> float:
        if not isinstance(tests, list) or not tests or not all(_is_test(test) for test in tests):
            raise ValueError('tests is not a list of {"input": text, "output": text}')
        program = ([response] + BLOCK.findall(response))[-1]
        passed = 0
        for test in tests:
            outcome = run_program(program, test["input"].encode(errors="replace"), bounds)
            printed = outcome.output.decode(errors="replace")
            good = outcome.code == 0 and not outcome.ended and _lines(printed) == _lines(test["output"])
            if not good and not partial:
                return 0.0
            passed += good
        return passed / len(tests)

    return code


def _is_test(test: Any) -> bool:
    return isinstance(test, dict) and isinstance(test.get("input"), str) and isinstance(test.get("output"), str)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]
