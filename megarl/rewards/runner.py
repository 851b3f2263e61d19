"""Scores responses in worker processes: a verifier that hangs or crashes costs one response, not the run."""

from __future__ import annotations

import contextlib
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import megarl
from megarl.errors import BadInput, RunFailed
from megarl.rewards import sandbox
from megarl.rewards.frames import pack_work, take_answers
from megarl.rewards.judge import HttpJudge
from megarl.rewards.registry import check_reward, required_field, verifiers
from megarl.secrets import from_environment, masked, without_secrets

if TYPE_CHECKING:
    from megarl.config.schema import Reward
    from megarl.types import Prompt

CHUNK = 64  # items per message: large enough that pipes cost nothing, small enough to share between workers
START_SECONDS = 120  # importing a user's module may be slow, never this slow
JUDGE_GRACE = 5  # seconds a batched judge gets beyond its own attempts and pauses
SEND_GRACE = 5  # seconds for a chunk's way to a worker
SPARE_AFTER = 1.0  # seconds on one response, or a quarter of its limit: others no longer wait for it
SPARES = 4  # workers more than `reward.workers` while some are held up
END_SECONDS = 3  # for a warden to end what is below it
SLOW_FAILURES = 8  # time-outs and crashes a call always survives, however small it is


@dataclass(frozen=True)
class ScoreResult:
    """`score` is `failed_score` when `failed`; `reason` then says why. `seconds` is the verifier's own time."""

    score: float
    failed: bool = False
    reason: str = ""
    seconds: float = 0.0


def check_failures(reward: Reward, failed: int, total: int, reasons: Iterable[str] = ()) -> None:
    """Raises RunFailed when `failed` of a step's `total` responses exceed `reward.max_failed_fraction`."""
    if total and failed > reward.max_failed_fraction * total:
        common = Counter(reasons).most_common(1)
        why = f"; most frequent: {common[0][0]}" if common else ""
        raise RunFailed(
            f"reward: {failed} of {total} responses could not be scored, more than "
            f"reward.max_failed_fraction={reward.max_failed_fraction:g} allows{why}"
        )


@dataclass
class _Chunk:
    """Items of one reward that one worker scores in order; `done` of them have an answer."""

    name: str | None
    indices: list[int]
    done: int = 0
    cut: bool = False  # the worker has more of it than is still wanted


@dataclass
class _Worker:
    process: subprocess.Popen  # its warden
    verdict: int  # why it ended; end of file once it has
    deadline: float
    ready: bool = False
    chunk: _Chunk | None = None
    since: float = 0.0  # when it began with the response it is at
    buffer: bytearray = field(default_factory=bytearray)
    ended: bool = False  # there is a verdict
    outgoing: memoryview = field(default_factory=lambda: memoryview(b""))


class RewardRunner:
    """Worker processes for one rank, for the verifiers among the rewards (none without any).

    Started before vLLM and gloo make threads, from a thread that lives as long as the runner (Linux ends the workers
    with the thread that started them). Workers are plain interpreters in sessions of their own: Ctrl-C does not reach
    them, and they end with the parent however it ends, with all they have started. `missing` says what of a worker's
    isolation this system does not allow.

    Raises BadInput when the configuration names a reward that cannot be built.
    """

    def __init__(self, reward: Reward) -> None:
        check_reward(reward)
        self.reward = reward
        self.missing: list[str] = []
        self._rewards = verifiers(reward)
        self._params = {name: _params(name, one) for name, one in self._rewards.items()}
        self._limits = {name: _time_limit(one, self._params[name]) for name, one in self._rewards.items()}
        self._batches = {name: one.type == "http" for name, one in self._rewards.items()}
        self._prepares: set[str | None] = set(self._rewards)
        self._slow: set[str | None] = set()  # of which responses have held up others
        self._selector = selectors.DefaultSelector()
        self._workers: list[_Worker] = []
        try:
            for _ in range(reward.workers if self._rewards else 0):
                self._start()
            while not all(worker.ready for worker in self._workers):
                for worker in self._wait():
                    self._read_ready(worker)
        except RunFailed as error:
            self.close()
            raise BadInput(str(error)) from None
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def score(self, items: Sequence[tuple[Prompt, str]]) -> list[ScoreResult]:
        """One result per `(prompt, response text)`, in order.

        A response whose verifier raises, returns no number or infinity, exceeds its `timeout_seconds` or other limits or
        ends its process gets `failed_score`; one whose verifier returns NaN keeps it, and has failed as well. Raises
        RunFailed at once when time-outs and crashes alone exceed `max_failed_fraction` of the items: waiting for each of
        them could take hours. Raises BadInput for a name that is no verifier's.
        """
        for name in {prompt.reward for prompt, _ in items} - set(self._rewards):
            required_field(self.reward, name)
            known = ", ".join(sorted(filter(None, self._rewards))) or "none is named"
            raise BadInput(f"reward {name or 'of the config'} is no verifier; name one that is ({known})")
        results: list[ScoreResult | None] = [None] * len(items)
        queue = deque(self._split(items))
        slow: list[str] = []
        try:
            while queue or any(worker.chunk for worker in self._workers):
                # Reading first: a worker that died idle is replaced before it is given work.
                for worker in self._wait():
                    reason = self._read(worker, results)
                    if reason is not None:
                        slow += self._replace(worker, reason, results, queue)
                self._relieve(queue)
                for worker in self._workers:
                    if queue and worker.ready and worker.chunk is None:
                        self._send(worker, queue.popleft(), items)
                if len(slow) > max(SLOW_FAILURES, self.reward.max_failed_fraction * len(items)):
                    check_failures(self.reward, len(slow), len(items), slow)
            self._retire()
        except BaseException:
            self._abandon()
            raise
        return results

    def close(self) -> None:
        """Ends every worker and whatever it started. Safe to call twice."""
        for worker in self._workers:
            self._kill(worker)
        self._workers.clear()

    # Work ------------------------------------------------------------------------------------------------------

    def _split(self, items: Sequence[tuple[Prompt, str]]) -> list[_Chunk]:
        """Chunks of one reward each: of a judge's batch size, or small enough that every worker gets some."""
        by_name: dict[str | None, list[int]] = {}
        for index, (prompt, _) in enumerate(items):
            by_name.setdefault(prompt.reward, []).append(index)
        chunks = []
        for name, indices in by_name.items():
            shared = min(CHUNK, -(-len(indices) // (2 * len(self._workers)))) if len(self._workers) > 1 else CHUNK
            size = HttpJudge(**self._params[name]).batch_size if self._batches[name] else shared
            size = 1 if name in self._slow else size
            for start in range(0, len(indices), size):
                chunks.append(_Chunk(name, indices[start : start + size]))
        return chunks

    def _relieve(self, queue: deque[_Chunk]) -> None:
        """Takes from workers that a response holds up what waits behind it, and starts a worker for it."""
        now, held_up = time.monotonic(), 0
        for worker in self._workers:
            chunk = worker.chunk
            if chunk is None or self._batches[chunk.name] or not worker.since:
                continue
            if now - worker.since < self._patience(chunk.name):
                continue
            held_up += 1
            rest = chunk.indices[chunk.done + 1 :]
            if rest:
                self._slow.add(chunk.name)
                chunk.cut = True
                chunk.indices = chunk.indices[: chunk.done + 1]
                queue.extendleft(_Chunk(chunk.name, [index]) for index in reversed(rest))
        free = any(worker.chunk is None for worker in self._workers)
        if queue and held_up and not free and len(self._workers) < self.reward.workers + min(held_up, SPARES):
            self._start()

    def _patience(self, name: str | None) -> float:
        return min(SPARE_AFTER, self._limits[name] / 4)

    def _retire(self) -> None:
        """Ends the workers beyond `reward.workers`, those that are not ready yet first."""
        for worker in sorted(self._workers, key=lambda worker: not worker.ready)[self.reward.workers :]:
            self._kill(worker)
            self._workers.remove(worker)

    def _send(self, worker: _Worker, chunk: _Chunk, items: Sequence[tuple[Prompt, str]]) -> None:
        rows = [items[index] for index in chunk.indices]
        message = [(chunk.name, prompt.text, text, prompt.answer, prompt.metadata) for prompt, text in rows]
        worker.chunk, worker.since = chunk, 0.0
        preparing = START_SECONDS if chunk.name in self._prepares else self._limits[chunk.name] + SEND_GRACE
        worker.deadline = time.monotonic() + preparing
        self._write(worker, pack_work(message))

    def _write(self, worker: _Worker, message: bytes) -> None:
        """As much as its pipe takes; the rest when it takes more: one that does not read must not hold up the run."""
        worker.outgoing = memoryview(message)
        self._flush(worker)
        if worker.outgoing:
            self._selector.register(worker.process.stdin, selectors.EVENT_WRITE, worker)

    def _flush(self, worker: _Worker) -> None:
        try:
            while worker.outgoing:
                worker.outgoing = worker.outgoing[os.write(worker.process.stdin.fileno(), worker.outgoing) :]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            worker.outgoing = memoryview(b"")  # a dead worker shows in its verdict

    def _wait(self) -> list[_Worker]:
        """The workers that have something to read or are past a deadline."""
        waiting = [worker for worker in self._workers if worker.chunk is not None or not worker.ready]
        now = time.monotonic()
        times = [worker.deadline for worker in waiting]
        times += [
            worker.since + self._patience(worker.chunk.name) for worker in waiting if worker.since and worker.chunk
        ]
        nearest = min((moment for moment in times if moment > now), default=now)
        nearest = now if any(worker.deadline <= now for worker in waiting) else nearest
        ready: list[_Worker] = []
        for key, _ in self._selector.select(max(0.0, nearest - now)):
            worker = key.data
            if key.fileobj is worker.process.stdin:
                self._flush(worker)
                if not worker.outgoing:
                    self._selector.unregister(worker.process.stdin)
                continue
            worker.ended |= key.fileobj == worker.verdict
            if worker not in ready:
                ready.append(worker)
        now = time.monotonic()
        return ready + [worker for worker in waiting if worker not in ready and now >= worker.deadline]

    def _read(self, worker: _Worker, results: list[ScoreResult | None]) -> str | None:
        """Stores what the worker has answered; why it has to be replaced, or None."""
        if not worker.ready:
            self._read_ready(worker)
            return None
        self._receive(worker)
        try:
            for answer in take_answers(worker.buffer):
                chunk = worker.chunk
                now = time.monotonic()
                worker.deadline, worker.since = now + self._limits[chunk.name], now
                if answer is None:
                    continue
                result = self._result(chunk, answer)
                results[chunk.indices[chunk.done]] = result
                chunk.done += 1
                if chunk.done == len(chunk.indices):
                    if chunk.cut:
                        return "cut"
                    worker.chunk, worker.since = None, 0.0
        except (ValueError, TypeError, AttributeError):
            return "the scoring process wrote what is no answer"
        if ended := self._verdict(worker):
            return ended
        if worker.chunk is not None and time.monotonic() >= worker.deadline:
            return f"timed out after {self._limits[worker.chunk.name]:g} s"
        return None

    def _result(self, chunk: _Chunk, answer: Any) -> ScoreResult:
        """Raises ValueError or TypeError for anything but the answer that is due."""
        position, score, reason, seconds = answer
        if position != chunk.done or not isinstance(reason, str):
            raise ValueError(answer)
        score, seconds = float(score), float(seconds)
        if not reason and not math.isfinite(score):
            raise ValueError(answer)
        score = self._rewards[chunk.name].failed_score if reason and not math.isnan(score) else score
        return ScoreResult(score, bool(reason), masked(reason) if reason else "", seconds)

    def _receive(self, worker: _Worker) -> None:
        """Adds what is now in the worker's pipe to its buffer."""
        with contextlib.suppress(BlockingIOError):
            while data := os.read(worker.process.stdout.fileno(), 1 << 16):
                worker.buffer += data
                if len(data) < 1 << 16:
                    return

    def _verdict(self, worker: _Worker) -> str | None:
        """Why the worker ended, or None while it has not."""
        if not worker.ended:
            return None
        text = b""
        try:
            while data := os.read(worker.verdict, 4096):
                text += data
        except BlockingIOError:
            if not text:
                return None
        return " ".join(text.decode(errors="replace").split("\n")[0].split()) or "the scoring process ended"

    def _replace(
        self, worker: _Worker, reason: str, results: list[ScoreResult | None], queue: deque[_Chunk]
    ) -> list[str]:
        """Kills the worker, fails what it was working on, queues the rest of its chunk, starts another worker."""
        chunk = worker.chunk
        self._kill(worker)
        self._workers.remove(worker)
        if len(self._workers) < self.reward.workers:
            self._start()
        if chunk is None:
            return []
        rest = chunk.indices[chunk.done :]
        lost = len(rest) if self._batches[chunk.name] else min(1, len(rest))
        for index in rest[:lost]:
            results[index] = ScoreResult(self._rewards[chunk.name].failed_score, True, reason)
        if rest[lost:]:
            queue.appendleft(_Chunk(chunk.name, rest[lost:]))
        return [reason] * lost

    # Processes -------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        reward = self.reward
        root = str(Path(megarl.__file__).resolve().parent.parent)
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        network = any(one.network or one.type == "http" for one in self._rewards.values())
        limits = {
            "network": network,
            "memory": int(reward.memory_gib * 2**30),
            "tasks": reward.max_processes,
            "cpu": reward.cpu_seconds,
        }
        environment = dict(os.environ) if network else without_secrets(os.environ)
        verdict, told = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        process = subprocess.Popen(
            [sys.executable, "-m", "megarl.rewards.worker", str(os.getpid()), str(told), json.dumps(limits)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            pass_fds=(told,),
            env={**environment, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            bufsize=0,
        )
        os.close(told)
        worker = _Worker(process, verdict, time.monotonic() + START_SECONDS)
        self._workers.append(worker)
        for pipe in (process.stdin, process.stdout):
            os.set_blocking(pipe.fileno(), False)
        for readable in (process.stdout, verdict):
            self._selector.register(readable, selectors.EVENT_READ, worker)
        rewards = {name: (one.type, self._params[name]) for name, one in self._rewards.items()}
        self._write(worker, pack_work({"sys_path": [p or os.getcwd() for p in sys.path], "rewards": rewards}))

    def _read_ready(self, worker: _Worker) -> None:
        """Takes the worker's first frame. Raises RunFailed when it could not be built."""
        self._receive(worker)
        try:
            for answer in take_answers(worker.buffer):
                if "error" in answer:
                    raise RunFailed(masked(answer["error"]))
                self._prepares, self.missing = {*answer["prepare"]}, list(answer["missing"])
                worker.ready = True
                return
        except (ValueError, TypeError, KeyError):
            raise RunFailed(f"reward.type: {self.reward.type}: its process wrote what is no answer") from None
        if ended := self._verdict(worker):
            raise RunFailed(f"reward.type: {self.reward.type}: at its start {ended}")
        if time.monotonic() >= worker.deadline:
            raise RunFailed(f"reward.type: {self.reward.type} was not ready after {START_SECONDS} s")

    def _kill(self, worker: _Worker) -> None:
        process = worker.process
        for pipe in (process.stdin, process.stdout, worker.verdict):
            with contextlib.suppress(KeyError):
                self._selector.unregister(pipe)
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(sandbox.END)  # the warden ends everything below it
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(worker.verdict)
        for pipe in (process.stdout, process.stdin):
            pipe.close()

    def _abandon(self) -> None:
        """After an interrupted call: workers in the middle of a chunk would answer the next call with this one's."""
        for worker in [worker for worker in self._workers if worker.chunk is not None]:
            self._kill(worker)
            self._workers.remove(worker)
        self._retire()
        while len(self._workers) < self.reward.workers:
            self._start()


def _params(name: str | None, reward: Reward) -> dict[str, Any]:
    """The params as given; a judge's attempts take the reward's own time limit unless they have one.

    References to the environment in a judge's address and headers become their values here, and nowhere else.
    """
    if reward.type != "http":
        return dict(reward.params)
    key = "reward.params" if name is None else f"reward.named.{name}.params"
    params = {"timeout": reward.timeout_seconds, **reward.params}
    for setting in ("url", "headers"):
        if setting in params:
            params[setting] = from_environment(params[setting], f"{key}.{setting}")
    return params


def _time_limit(reward: Reward, params: dict[str, Any]) -> float:
    """Seconds after which a worker is killed: for one response, or for all attempts of one batch of a judge."""
    if reward.type != "http":
        return reward.timeout_seconds
    try:
        return HttpJudge(**params).time_limit() + JUDGE_GRACE
    except (TypeError, ValueError) as error:
        raise BadInput(f"reward.params: http: {error}") from None
