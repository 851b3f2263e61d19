"""The reward runner with real processes: verifiers that hang, crash, raise, and a judge over HTTP."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from megarl.config.schema import Reward
from megarl.errors import BadInput, RunFailed
from megarl.rewards import RewardRunner, check_failures
from megarl.rewards.sandbox import descendants
from megarl.rewards.tasks import create_dataset
from megarl.types import Prompt

VERIFIER = """
import math, os, subprocess, time

def score(prompt, response, answer, **metadata):
    if response == "hang":
        while True:
            pass
    if response == "sleep":
        time.sleep(1000)
    if response == "child":
        subprocess.Popen(["sleep", "1000"])
        while True:
            pass
    if response == "exit":
        os._exit(7)
    if response == "abort":
        os.abort()
    if response == "raise":
        raise ValueError("no\\nanswer")
    print("a verifier that prints")
    special = {"nan": math.nan, "inf": -math.inf, "none": None, "text": "good", "true": True}
    return special[response] if response in special else len(response) + len(metadata.get("pair", ()))

def kind(prompt, response, answer, **metadata):
    return isinstance(metadata["pair"], tuple)
"""


def prompt(**fields) -> Prompt:
    return Prompt(**{"prompt_id": "p", "token_ids": (1,), "answer": "4", **fields})


@pytest.fixture
def verifier(tmp_path, monkeypatch) -> str:
    (tmp_path / "sample_verifier.py").write_text(VERIFIER)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "sample_verifier"


@pytest.mark.parametrize("workers", [1, 3])
def test_each_bad_response_fails_alone_and_results_stay_in_order(verifier, workers):
    bad = {
        "hang": "timed out after 0.4 s",
        "sleep": "timed out after 0.4 s",
        "exit": "exit code 7",
        "abort": "SIGABRT",
        "raise": "ValueError: no answer",
        "nan": "returned nan",
        "inf": "returned -inf",
        "none": "returned None",
        "text": "returned 'good'",
    }
    texts = [text for name in bad for text in ("a" * len(name), name, "true")] + ["", "last" * 9]
    reward = Reward(type=f"{verifier}:score", timeout_seconds=0.4, failed_score=-1, workers=workers)
    with RewardRunner(reward) as runner:
        results = runner.score([(prompt(), text) for text in texts])
    for text, result in zip(texts, results, strict=True):
        if text in bad:
            assert (str(result.score), result.failed) == ("nan" if text == "nan" else "-1.0", True), text
            assert bad[text] in result.reason
        else:
            assert (result.score, result.failed, result.reason) == (1 if text == "true" else len(text), False, "")


def test_time_limit_is_per_response_not_per_message(verifier):
    """Forty responses of one message may take longer together than one of them is allowed."""
    reward = Reward(type=f"{verifier}:score", timeout_seconds=0.5)
    with RewardRunner(reward) as runner:
        started = time.monotonic()
        results = runner.score([(prompt(), "x")] * 40 + [(prompt(), "hang")] + [(prompt(), "y")] * 20)
        assert time.monotonic() - started < 5
    assert [result.failed for result in results] == [False] * 40 + [True] + [False] * 20


def test_rows_choose_their_reward_and_metadata_arrive_unchanged(verifier):
    reward = Reward(
        type="exact_match",
        named={
            "own": Reward(type=f"{verifier}:score", failed_score=-2),
            "kind": Reward(type=f"{verifier}:kind"),
        },
    )
    rows = [
        (prompt(), "4"),
        (prompt(reward="own", metadata={"pair": (1, 2)}), "abc"),
        (prompt(reward="own"), "raise"),
        (prompt(reward="kind", metadata={"pair": (1, 2)}), ""),
        (prompt(), "5"),
    ]
    with RewardRunner(reward) as runner:
        assert [result.score for result in runner.score(rows)] == [1, 5, -2, 1, 0]
        assert runner.score([]) == []
        with pytest.raises(BadInput, match="'missing' is not in reward.named"):
            runner.score([(prompt(reward="missing"), "x")])


def test_reasoning_gym_scores_of_a_thousand_responses_are_its_own_and_fast():
    data = create_dataset("chain_sum", size=1024, seed=3)
    rows = [
        (prompt(answer=e["answer"], metadata={"entry": e}), e["answer"] if i % 3 else "17") for i, e in enumerate(data)
    ]
    own = [data.score_answer(text, row.metadata["entry"]) for row, text in rows]
    with RewardRunner(Reward(type="reasoning_gym")) as runner:
        runner.score(rows[:1])
        times = []
        for _ in range(5):
            started = time.perf_counter()
            results = runner.score(rows)
            times.append(time.perf_counter() - started)
    assert [result.score for result in results] == own
    assert min(times) < 0.15


def test_a_worker_that_died_idle_costs_nothing(verifier):
    with RewardRunner(Reward(type=f"{verifier}:score")) as runner:
        os.kill(worker_pid(runner), signal.SIGKILL)
        time.sleep(0.1)
        result = runner.score([(prompt(), "ab")])[0]
        assert (result.score, result.failed) == (2, False)


@pytest.fixture
def ctrl_c_raises():
    """A shell starts its background jobs with SIGINT ignored, and Python then leaves it so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c_raises")
def test_interrupted_call_leaves_no_answer_for_the_next(verifier):
    with RewardRunner(Reward(type=f"{verifier}:score", timeout_seconds=20)) as runner:
        main = threading.main_thread().ident
        threading.Timer(0.5, signal.pthread_kill, [main, signal.SIGINT]).start()
        with pytest.raises(KeyboardInterrupt):
            runner.score([(prompt(), "one"), (prompt(), "hang"), (prompt(), "four")])
        assert [result.score for result in runner.score([(prompt(), "ab"), (prompt(), "abcde")])] == [2, 5]


def test_workers_ignore_ctrl_c_and_run_in_their_own_session(verifier):
    with RewardRunner(Reward(type=f"{verifier}:score")) as runner:
        pid = worker_pid(runner)
        assert os.getsid(pid) == runner._workers[0].process.pid
        os.kill(pid, signal.SIGINT)
        time.sleep(0.1)
        assert runner.score([(prompt(), "ab")])[0].score == 2 and worker_pid(runner) == pid


def gone(pids: list[int], seconds: float = 5) -> bool:
    """Whether every process ends in time; a zombie (nobody reaps the parent's orphans here) has ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        states = []
        for pid in pids:
            try:
                with open(f"/proc/{pid}/stat") as stat:
                    states.append(stat.read().rpartition(")")[2].split()[0])
            except FileNotFoundError:
                continue
        if set(states) <= {"Z"}:
            return True
        time.sleep(0.02)
    return False


def worker_pid(runner: RewardRunner) -> int:
    """The process of the only worker that scores: below the first one of its namespaces, below its warden."""
    warden = runner._workers[0].process.pid
    return next(pid for child in descendants(warden) for pid in descendants(child))


def test_close_and_time_out_end_what_a_verifier_started(verifier):
    runner = RewardRunner(Reward(type=f"{verifier}:score", timeout_seconds=0.5))
    first = [runner._workers[0].process.pid, *descendants(runner._workers[0].process.pid)]
    assert runner.score([(prompt(), "child")])[0].failed
    assert gone(first)
    assert runner.score([(prompt(), "x")])[0].score == 1
    second = worker_pid(runner)
    assert second not in first
    runner.close()
    runner.close()
    assert gone([second])


def test_workers_die_with_a_killed_parent_even_in_an_endless_loop(verifier, tmp_path):
    code = (
        "from megarl.config.schema import Reward; from megarl.rewards import RewardRunner;"
        "from megarl.types import Prompt; p = Prompt('p', (1,), '4');"
        f"r = RewardRunner(Reward(type='{verifier}:score', timeout_seconds=600, workers=2));"
        "print([x.score for x in r.score([(p, 'x')] * 200)] == [1] * 200, flush=True);"
        "r.score([(p, 'hang'), (p, 'hang')])"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env)
    assert parent.stdout.readline() == b"True\n"
    pids = [*descendants(parent.pid)]
    assert len(pids) == 6  # two workers, each with its warden and the first process of its namespaces
    time.sleep(0.3)
    parent.kill()
    parent.wait()
    assert gone(pids)


def test_a_verifier_that_always_hangs_stops_the_call_early(verifier):
    reward = Reward(type=f"{verifier}:score", timeout_seconds=0.1, max_failed_fraction=0.05, workers=2)
    with (
        RewardRunner(reward) as runner,
        pytest.raises(RunFailed, match="(9|10) of 100 .*most frequent: timed out after 0.1"),
    ):
        runner.score([(prompt(), "hang")] * 100)


def test_check_failures_counts_against_the_limit():
    reward = Reward(max_failed_fraction=0.25)
    check_failures(reward, 2, 8)
    check_failures(reward, 0, 0)
    with pytest.raises(RunFailed, match="3 of 8 responses .*max_failed_fraction=0.25 allows; most frequent: b"):
        check_failures(reward, 3, 8, ["a", "b", "b"])


class Judge(ThreadingHTTPServer):
    """Scores a response by its length; the first `failures` requests get what `broken` does."""

    def __init__(self, broken=None, failures=0):
        super().__init__(("127.0.0.1", 0), JudgeHandler)
        self.broken, self.failures, self.requests = broken, failures, []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/score"


class JudgeHandler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((body, self.headers.get("X-Key")))
        status, reply = (
            200,
            {"scores": [len(i["response"]) if i["response"] != "skip" else None for i in body["items"]]},
        )
        if len(self.server.requests) <= self.server.failures:
            status, reply = self.server.broken(reply)
        data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


def judge_reward(judge: Judge, **params) -> Reward:
    return Reward(type="http", params={"url": judge.url, "backoff": 0.01, **params}, timeout_seconds=0.5)


def test_judge_gets_batches_and_its_scores_come_back_in_order(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "k")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # loopback never goes through a proxy
    judge = Judge()
    with judge, RewardRunner(judge_reward(judge, batch_size=3, headers={"X-Key": "$JUDGE_KEY"})) as runner:
        texts = ["a", "bb", "skip", "dddd", ""]
        results = runner.score([(prompt(text="Q", metadata={"pair": (1, 2)}), text) for text in texts])
        judge.shutdown()
    assert [result.score for result in results] == [1, 2, 0, 4, 0]
    assert [result.failed for result in results] == [False, False, True, False, False]
    assert [len(body["items"]) for body, _ in judge.requests] == [3, 2]
    body, key = judge.requests[0]
    assert key == "k"
    assert body["items"][0] == {"prompt": "Q", "response": "a", "answer": "4", "metadata": {"pair": [1, 2]}}


def slow(reply):
    time.sleep(1)
    return 200, reply


@pytest.mark.parametrize(
    "broken",
    [
        lambda reply: (503, b"busy"),
        lambda reply: (429, b"slow down"),
        lambda reply: (200, b"not json"),
        lambda reply: (200, {"scores": [1]}),
        slow,
    ],
    ids=["503", "429", "not-json", "wrong-count", "time-out"],
)
def test_judge_that_fails_and_recovers_is_asked_again(broken):
    judge = Judge(broken, failures=2)
    with judge, RewardRunner(judge_reward(judge)) as runner:
        results = runner.score([(prompt(), "abc"), (prompt(), "de")])
        judge.shutdown()
    assert [(result.score, result.failed) for result in results] == [(3, False), (2, False)]
    assert len(judge.requests) == 3


@pytest.mark.parametrize(("status", "asked"), [(500, 3), (400, 1)])
def test_judge_that_stays_broken_is_a_counted_failure(status, asked):
    judge = Judge(lambda reply: (status, b""), failures=99)
    with judge, RewardRunner(judge_reward(judge, retries=2)) as runner:
        results = runner.score([(prompt(), "abc"), (prompt(), "de")])
        judge.shutdown()
    assert all(result.failed and str(status) in result.reason for result in results)
    assert len(judge.requests) == asked
