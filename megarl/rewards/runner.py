"""Scores responses in worker processes: a verifier that hangs or crashes costs one response, not the run."""

from __future__ import annotations

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
from megarl.rewards.frames import take_frames, write_frame
from megarl.rewards.judge import HttpJudge
from megarl.rewards.registry import check_reward, required_field, verifiers

if TYPE_CHECKING:
    from megarl.config.schema import Reward
    from megarl.types import Prompt

CHUNK = 64  # items per message: large enough that pipes cost nothing, small enough to share between workers
START_SECONDS = 120  # importing a user's module may be slow, never this slow
JUDGE_GRACE = 5  # seconds a batched judge gets beyond its own attempts and pauses
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


@dataclass
class _Worker:
    process: subprocess.Popen
    deadline: float
    ready: bool = False
    chunk: _Chunk | None = None
    buffer: bytearray = field(default_factory=bytearray)


class RewardRunner:
    """Worker processes for one rank, for the verifiers among the rewards (none without any).

    Started before vLLM and gloo make threads, from a thread that lives as long as the runner (Linux ends the workers
    with the thread that started them). Workers are plain interpreters in sessions of their own: Ctrl-C does not reach
    them, and they end with the parent however it ends.

    Raises BadInput when the configuration names a reward that cannot be built.
    """

    def __init__(self, reward: Reward) -> None:
        check_reward(reward)
        self.reward = reward
        self._rewards = verifiers(reward)
        self._params = {name: _params(one) for name, one in self._rewards.items()}
        self._limits = {name: _time_limit(one, self._params[name]) for name, one in self._rewards.items()}
        self._batches = {name: one.type == "http" for name, one in self._rewards.items()}
        self._selector = selectors.DefaultSelector()
        self._workers: list[_Worker] = []
        try:
            self._workers += [self._start() for _ in range(reward.workers if self._rewards else 0)]
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

        A response whose verifier raises, returns no number or infinity, exceeds its `timeout_seconds` or ends its
        process gets `failed_score`; one whose verifier returns NaN keeps it, and has failed as well. Raises RunFailed
        at once when time-outs and crashes alone exceed `max_failed_fraction` of the items: waiting for each of them
        could take hours. Raises BadInput for a name that is no verifier's.
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
                for worker in self._workers:
                    if queue and worker.ready and worker.chunk is None:
                        self._send(worker, queue.popleft(), items)
                if len(slow) > max(SLOW_FAILURES, self.reward.max_failed_fraction * len(items)):
                    check_failures(self.reward, len(slow), len(items), slow)
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
            for start in range(0, len(indices), size):
                chunks.append(_Chunk(name, indices[start : start + size]))
        return chunks

    def _send(self, worker: _Worker, chunk: _Chunk, items: Sequence[tuple[Prompt, str]]) -> None:
        rows = [items[index] for index in chunk.indices]
        message = [(chunk.name, prompt.text, text, prompt.answer, prompt.metadata) for prompt, text in rows]
        worker.chunk = chunk
        worker.deadline = time.monotonic() + START_SECONDS
        try:
            write_frame(worker.process.stdin, message)
        except BrokenPipeError:
            pass  # a dead worker shows as end of file on its output

    def _wait(self) -> list[_Worker]:
        """The workers that have something to read or are past their deadline."""
        waiting = [worker for worker in self._workers if worker.chunk is not None or not worker.ready]
        nearest = min((worker.deadline for worker in waiting), default=0.0)
        ready = [key.data for key, _ in self._selector.select(max(0.0, nearest - time.monotonic()))]
        now = time.monotonic()
        return ready + [worker for worker in waiting if worker not in ready and now >= worker.deadline]

    def _read(self, worker: _Worker, results: list[ScoreResult | None]) -> str | None:
        """Stores what the worker has answered; why it has to be replaced, or None."""
        if not worker.ready:
            self._read_ready(worker)
            return None
        data = self._receive(worker)
        if data is None:
            return f"timed out after {self._limits[worker.chunk.name]:g} s" if worker.chunk else None
        for frame in take_frames(worker.buffer):
            chunk = worker.chunk
            worker.deadline = time.monotonic() + self._limits[chunk.name]
            if frame is None:
                continue
            score, reason, seconds = frame
            score = self._rewards[chunk.name].failed_score if reason and not math.isnan(score) else score
            results[chunk.indices[chunk.done]] = ScoreResult(score, bool(reason), reason, seconds)
            chunk.done += 1
            if chunk.done == len(chunk.indices):
                worker.chunk = None
        return None if data else f"the scoring process ended ({self._exit_code(worker)})"

    def _receive(self, worker: _Worker) -> bytes | None:
        """Bytes now in the worker's pipe: b"" at its end, None when there are none."""
        try:
            data = os.read(worker.process.stdout.fileno(), 1 << 16)
        except BlockingIOError:
            return None
        worker.buffer += data
        return data

    def _replace(
        self, worker: _Worker, reason: str, results: list[ScoreResult | None], queue: deque[_Chunk]
    ) -> list[str]:
        """Kills the worker, fails what it was working on, queues the rest of its chunk, starts another worker."""
        chunk = worker.chunk
        self._kill(worker)
        self._workers[self._workers.index(worker)] = self._start()
        if chunk is None:
            return []
        rest = chunk.indices[chunk.done :]
        lost = len(rest) if self._batches[chunk.name] else 1
        for index in rest[:lost]:
            results[index] = ScoreResult(self._rewards[chunk.name].failed_score, True, reason)
        if rest[lost:]:
            queue.appendleft(_Chunk(chunk.name, rest[lost:]))
        return [reason] * lost

    # Processes -------------------------------------------------------------------------------------------------

    def _start(self) -> _Worker:
        root = str(Path(megarl.__file__).resolve().parent.parent)
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        process = subprocess.Popen(
            [sys.executable, "-m", "megarl.rewards.worker", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )
        worker = _Worker(process, time.monotonic() + START_SECONDS)
        os.set_blocking(process.stdout.fileno(), False)
        self._selector.register(process.stdout, selectors.EVENT_READ, worker)
        rewards = {name: (one.type, self._params[name]) for name, one in self._rewards.items()}
        try:
            write_frame(process.stdin, {"sys_path": [p or os.getcwd() for p in sys.path], "rewards": rewards})
        except BrokenPipeError:
            pass  # shows as end of file in _read_ready
        return worker

    def _read_ready(self, worker: _Worker) -> None:
        """Takes the worker's first frame. Raises RunFailed when it could not be built."""
        data = self._receive(worker)
        if data is None:
            if time.monotonic() >= worker.deadline:
                raise RunFailed(f"reward.type: {self.reward.type} was not ready after {START_SECONDS} s")
            return
        for error in take_frames(worker.buffer):
            if error is not None:
                raise RunFailed(error)
            worker.ready = True
        if not data:
            raise RunFailed(f"reward.type: {self.reward.type}: its process ended at start ({self._exit_code(worker)})")

    def _exit_code(self, worker: _Worker) -> str:
        try:
            code = worker.process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            return "closed its output"
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def _kill(self, worker: _Worker) -> None:
        self._selector.unregister(worker.process.stdout)
        try:
            os.killpg(worker.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        worker.process.wait()
        worker.process.stdout.close()
        try:
            worker.process.stdin.close()
        except BrokenPipeError:
            pass  # a message it never read was still buffered

    def _abandon(self) -> None:
        """After an interrupted call: workers in the middle of a chunk would answer the next call with this one's."""
        for position, worker in enumerate(self._workers):
            if worker.chunk is not None:
                self._kill(worker)
                self._workers[position] = self._start()


def _params(reward: Reward) -> dict[str, Any]:
    """The params as given; a judge's attempts take the reward's own time limit unless they have one."""
    return {"timeout": reward.timeout_seconds, **reward.params} if reward.type == "http" else dict(reward.params)


def _time_limit(reward: Reward, params: dict[str, Any]) -> float:
    """Seconds after which a worker is killed: for one response, or for all attempts of one batch of a judge."""
    if reward.type != "http":
        return reward.timeout_seconds
    try:
        return HttpJudge(**params).time_limit() + JUDGE_GRACE
    except (TypeError, ValueError) as error:
        raise BadInput(f"reward.params: http: {error}") from None
