"""A remote judge over HTTP: one POST scores a batch of responses. Standard library only."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from typing import Any

# Hostnames that must never go through a proxy of the environment.
LONGEST_REPLY = 16 << 20  # bytes
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class JudgeError(Exception):
    """The judge gave no usable answer after all attempts."""


@dataclass
class HttpJudge:
    """POSTs `{"items": [{"prompt", "response", "answer", "metadata"}, ...]}` to `url`; the answer is
    `{"scores": [number or null, ...]}` in the same order, null for a response the judge could not score.

    A connection error, a time-out, a status of 429 or 5xx or an answer of another form is tried again after
    `backoff * 2**attempt` seconds, `retries` times; any other status fails at once.
    """

    url: str
    timeout: float = 10.0  # seconds for one attempt
    retries: int = 3
    backoff: float = 0.5  # seconds before the first retry
    batch_size: int = 32  # responses per POST
    headers: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url is {self.url!r}; set an http:// or https:// address")
        if self.batch_size < 1 or self.retries < 0 or self.timeout <= 0 or self.backoff < 0:
            raise ValueError("batch_size and timeout must be above 0, retries and backoff at least 0")
        proxies = [urllib.request.ProxyHandler({})] if parts.hostname in LOOPBACK else []
        self._opener = urllib.request.build_opener(*proxies)

    def time_limit(self) -> float:
        """Seconds after which a batch cannot be running any more: every attempt and every pause."""
        return (self.retries + 1) * self.timeout + self.backoff * (2**self.retries - 1)

    def score_batch(self, items: list[tuple[str, str, str | None, dict[str, Any]]]) -> list[float | None]:
        """Scores of `(prompt, response, answer, metadata)` items. Raises JudgeError when the judge gives none."""
        keys = ("prompt", "response", "answer", "metadata")
        body = json.dumps({"items": [dict(zip(keys, item)) for item in items]}, default=str).encode()
        for attempt in range(self.retries + 1):
            try:
                return self._post(body, len(items))
            except (OSError, ValueError, http.client.HTTPException) as error:
                status = getattr(error, "code", 500)
                if attempt == self.retries or (status < 500 and status != 429):
                    text = " ".join(str(error).split())
                    raise JudgeError(f"{self.url} failed {attempt + 1} times, last: {text}") from None
            time.sleep(self.backoff * 2**attempt)
        raise AssertionError("unreachable")

    def _post(self, body: bytes, count: int) -> list[float | None]:
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json", **self.headers})
        with self._opener.open(request, timeout=self.timeout) as reply:
            text = reply.read(LONGEST_REPLY + 1)
        if len(text) > LONGEST_REPLY:
            raise ValueError(f"answer is longer than {LONGEST_REPLY} bytes")
        answer = json.loads(text)
        scores = answer.get("scores") if isinstance(answer, dict) else None
        if not isinstance(scores, list) or len(scores) != count:
            raise ValueError(f'answer is not {{"scores": [{count} numbers]}}')
        if not all(score is None or isinstance(score, int | float) for score in scores):
            raise ValueError(f'answer is not {{"scores": [{count} numbers]}}')
        return scores


def make_http(**params: Any) -> HttpJudge:
    return HttpJudge(**params)
