"""What both sides of vs_trl.py share: the turn protocol, and the reward."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from typing import Any

ANSWER_FD = "VS_TRL_ANSWER_FD"
PR_SET_PDEATHSIG = 1


class Turns:
    """One rank's end of the protocol: a line of stdin starts a step, a line of JSON on a pipe of its own answers it."""

    def __init__(self) -> None:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a stopped process would never see the end of file
        self._answers = os.fdopen(int(os.environ[ANSWER_FD]), "w", buffering=1)

    def say(self, **message: Any) -> None:
        self._answers.write(json.dumps(message) + "\n")

    def wait(self) -> bool:
        """True when it is this side's turn, False when the run is over."""
        return sys.stdin.readline().strip() == "go"


def distinct_characters(prompt: str, response: str, answer: str | None = None, **_: Any) -> float:
    """A reward that costs nothing and varies within a group, so that no group is without signal."""
    return float(len(set(response)) % 5)
