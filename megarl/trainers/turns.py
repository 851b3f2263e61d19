"""Learner and engine take turns on one device: who leaves it when, and the ledger of what was where."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import UntypedStorage

from megarl import platform
from megarl.config.schema import Memory
from megarl.learner.policy import Policy
from megarl.metrics import Metric, Sum
from megarl.platform.host import GIB
from megarl.rollout.engine import Engine

Bytes = tuple[int, int]  # on the device, on the host
WEIGHTS, UPDATE = ("weights",), ("gradients", "optimizer")  # what an RL step needs all along, and in the update


class Turns:
    """Moves the trained models and the engine on and off the device.

    While the engine samples nothing of `policies` is there that `settings` offload; while the learner works the engine
    sleeps. Every method is idempotent, and called by every rank.
    """

    def __init__(self, settings: Memory, policies: Iterable[Policy]) -> None:
        wanted = {
            "weights": settings.param_offload,
            "gradients": platform.name() != "cpu" if settings.grad_offload is None else settings.grad_offload,
            "optimizer": settings.optimizer_offload,
        }
        self.sleep_level = settings.sleep_level
        self._parked = {
            owner: [policy.parked[owner] for policy in policies] if wanted[owner] else [] for owner in (*WEIGHTS, *UPDATE)
        }
        self._engine: Engine | None = None
        self._awaited: list[str] = []  # what of the engine sleeps

    def start(self, engine: Engine) -> None:
        """The engine has started, beside a learner that made room; give the device to the learner."""
        self._engine = engine
        self.learn()
        self._bring(UPDATE)

    def learn(self) -> None:
        """The engine sleeps and the models' weights are there."""
        self._sleep(self.sleep_level)
        self._bring(WEIGHTS)

    def update(self) -> None:
        """Gradients and optimizers too."""
        self._bring(UPDATE)

    def updated(self) -> None:
        """They may go."""
        self._park(UPDATE)

    def sync(self) -> None:
        """The learner leaves and the engine has room for weights, not yet for its cache."""
        self._park((*UPDATE, *WEIGHTS))
        self._wake(["weights"])

    def sample(self) -> None:
        """The engine is wholly awake."""
        self._wake(["kv_cache"])

    def make_room(self) -> None:
        """Before an engine starts: all that may leave the device does."""
        self._park((*UPDATE, *WEIGHTS))

    @contextmanager
    def learner_alone(self) -> Iterator[None]:
        """In between, for what reads all of the learner; the engine keeps its weights on the host."""
        self._sleep(min(self.sleep_level, 1))
        self._bring((*WEIGHTS, *UPDATE))
        yield
        self._park((*UPDATE, *WEIGHTS))
        self._wake(["weights"])
        self._wake(["kv_cache"])

    def _sleep(self, level: int) -> None:
        if level and not self._awaited:
            self._engine.sleep(level)
            self._awaited = ["weights", "kv_cache"]

    def _wake(self, tags: list[str]) -> None:
        tags = [tag for tag in tags if tag in self._awaited]
        if tags:
            self._engine.wake(tags)
            self._awaited = [tag for tag in self._awaited if tag not in tags]

    def _bring(self, owners: Iterable[str]) -> None:
        for parked in (parked for owner in owners for parked in self._parked[owner]):
            parked.unpark()

    def _park(self, owners: Iterable[str]) -> None:
        for parked in (parked for owner in owners for parked in self._parked[owner]):
            parked.park()


class MemoryLedger:
    """Bytes on device and host by owner, at the end of each phase of a step.

    Bytes are those of live storages, each counted once, for the first owner that has it. `rest` is what else the process
    has on the host (resident memory less what is owned), and on CUDA what else is in use on the device.
    """

    def __init__(self) -> None:
        self._owners: dict[str, Callable[[], Iterable[UntypedStorage] | Bytes]] = {}
        self._phases: dict[str, dict[str, Bytes]] = {}

    def own(self, name: str, find: Callable[[], Iterable[UntypedStorage] | Bytes]) -> None:
        """`find` gives an owner's storages or, where there are none to look at, its (device, host) bytes."""
        self._owners[name] = find

    def record(self, phase: str, **other: Bytes) -> None:
        """The end of a phase; the largest, owner by owner, where a step has it twice.

        `other`: owners whose bytes were there during the phase and are gone by now.
        """
        seen: set[int] = set()
        before, now = self._phases.get(phase, {}), {}
        for name, find in self._owners.items():
            found = find()
            now[name] = found if isinstance(found, tuple) else _bytes(found, seen)
        now |= other
        device, host = (sum(column) for column in zip(*now.values(), strict=True))
        used, resident = platform.used_bytes()
        now["rest"] = max(0, used - device), max(0, resident - host)
        now["rss"] = 0, resident
        self._phases[phase] = {name: tuple(map(max, now[name], before.get(name, (0, 0)))) for name in now}

    def metrics(self) -> dict[str, Metric]:
        """`memory/<device or host>/<phase>/<owner>` in GiB, all ranks together, where it is not 0; then starts over."""
        out: dict[str, Metric] = {}
        for phase, owners in self._phases.items():
            for owner, amounts in owners.items():
                for place, amount in zip(("device", "host"), amounts, strict=True):
                    if amount:
                        out[f"memory/{place}/{phase}/{owner}"] = Sum(amount / GIB)
        self._phases = {}
        return out


def _bytes(storages: Iterable[UntypedStorage], seen: set[int]) -> Bytes:
    out = [0, 0]
    for storage in storages:
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            out[storage.device.type == "cpu"] += storage.nbytes()
    return out[0], out[1]

