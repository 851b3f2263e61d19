"""`python -m megarl.cluster.node_check` as every rank, before a run: exit code 1 with one line for each bad node.

Each rank looks at its device (is it there, how much of its memory is free), its clock, and the bandwidth of a small
all-reduce with one other rank at a time. Local rank 0 of each node keeps the nodes' addresses in $MEGARL_JOB_DIR/nodes.json
for `megarl.cluster.peers`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost connection is said here, in one line

import torch
import torch.distributed as dist

from megarl import platform
from megarl.cluster.health import Limits, Report, faults, rounds, summary
from megarl.errors import BadInput

ELEMENTS = 4 << 20  # of the all-reduce: 16 MiB in float32
TRIES = 3  # of which the best counts


def main() -> int:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    own = (os.environ.get("MEGARL_NODE") or os.uname().nodename, os.environ.get("MEGARL_ADDRESS", ""))
    limits = Limits.from_environment(**({} if platform.name() == "cuda" else {"free": 0.05}))
    store = _store(rank, world, own[0], limits)
    if store is None:
        return 1
    absent = _absent(store, rank, world, own[0], limits)
    if absent:
        if rank == 0:
            print(f"error: {_told(absent, limits)}", file=sys.stderr, flush=True)
        _leave(store, rank, world - len(absent))
        return 1
    report = _examine(store, rank, world, own, limits)
    store.set(f"report/{rank}", json.dumps(dataclasses.asdict(report)))
    if rank == 0:
        _judge(store, world, limits)
    verdict = json.loads(store.get("verdict"))
    if int(os.environ["LOCAL_RANK"]) == 0:
        _keep(verdict["nodes"])
    _leave(store, rank, world)
    return verdict["code"]


def _leave(store: dist.Store, rank: int, count: int) -> None:
    """Once all have read what there is to read: the main rank may be the one that serves it."""
    store.add("read", 1)
    deadline = time.monotonic() + 10
    while rank == 0 and store.add("read", 0) < count and time.monotonic() < deadline:
        time.sleep(0.01)


def _store(rank: int, world: int, node: str, limits: Limits) -> dist.Store | None:
    """The first node's, which it or torchrun's agent there serves; None, with a line, when it does not answer."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    timeout = timedelta(seconds=limits.seconds)
    try:
        store = dist.TCPStore(address, port, world, is_master=serves, timeout=timeout, wait_for_workers=False)
    except RuntimeError as e:
        if int(os.environ["LOCAL_RANK"]) == 0:
            why = str(e).splitlines()[0]
            print(f"error: node {node}: the first node, {address}:{port}, does not answer ({why})", file=sys.stderr, flush=True)
        return None
    return dist.PrefixStore(f"check/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _absent(store: dist.Store, rank: int, world: int, node: str, limits: Limits) -> list[int]:
    """The ranks that do not arrive in time, the same on every rank that does."""
    store.set(f"here/{rank}", node)
    if rank == 0:
        deadline, absent = time.monotonic() + limits.seconds, list(range(world))
        while absent and time.monotonic() < deadline:
            absent = [one for one in absent if not store.check([f"here/{one}"])]
            time.sleep(0.01)
        store.set("absent", json.dumps(absent))
    store.wait(["absent"], timedelta(seconds=limits.seconds + 30))
    return json.loads(store.get("absent"))


def _told(absent: list[int], limits: Limits) -> str:
    names, per_node = os.environ.get("MEGARL_NODES", "").split(), int(os.environ["LOCAL_WORLD_SIZE"])
    where = sorted({one // per_node for one in absent})
    told = ", ".join(f"node {names[i] if i < len(names) else f'number {i}'}" for i in where)
    return f"{told}: ranks {', '.join(map(str, absent))} did not arrive within {limits.seconds:g} s"


def _examine(store: dist.Store, rank: int, world: int, own: tuple[str, str], limits: Limits) -> Report:
    per_node = int(os.environ["LOCAL_WORLD_SIZE"])
    try:
        platform.set_device(int(os.environ["LOCAL_RANK"]))
        devices, free, total = platform.capacity()
    except BadInput:  # there is no such device: nobody can talk to this rank
        devices, free, total = torch.cuda.device_count(), 0, 0
        store.add("without a device", 1)
    store.add("ready", 1)
    while store.add("ready", 0) < world:
        time.sleep(0.001)
    clock = time.time()
    if rank == 0:
        store.set("clock", repr(clock))
    clock -= float(store.get("clock"))
    alone = world == 1 or store.add("without a device", 0)
    bandwidth = {} if alone else _bandwidths(store, rank, world, per_node, limits)
    return Report(rank, *own, devices, per_node, free, total, clock, bandwidth)


def _bandwidths(store: dist.Store, rank: int, world: int, per_node: int, limits: Limits) -> dict[int, float]:
    """Other rank -> GB/s of an all-reduce with it alone, 0 where it did not end."""
    found = {}
    for pairs in rounds(world, per_node):
        for pair in pairs:
            if rank in pair:
                other = sum(pair) - rank
                try:
                    found[other] = _bandwidth(dist.PrefixStore(f"pair/{pair}", store), pair.index(rank), limits)
                except RuntimeError as e:
                    print(f"rank {rank}: no all-reduce with rank {other}: {e}", file=sys.stderr, flush=True)
                    found[other] = 0.0
    return found


def _bandwidth(store: dist.Store, place: int, limits: Limits) -> float:
    """GB/s of an all-reduce of two ranks, which are the whole world for its time."""
    timeout = timedelta(seconds=limits.seconds)
    dist.init_process_group(platform.backend(), store=store, rank=place, world_size=2, timeout=timeout)
    try:
        data = torch.zeros(ELEMENTS, device=platform.device())
        return data.nbytes / min(_timed(data) for _ in range(TRIES + 1)) / 1e9
    finally:
        dist.destroy_process_group()


def _timed(data: torch.Tensor) -> float:
    platform.synchronize()
    start = time.perf_counter()
    dist.all_reduce(data)
    platform.synchronize()
    return time.perf_counter() - start


def _judge(store: dist.Store, world: int, limits: Limits) -> None:
    """The main rank's: read all reports, say what is wrong, tell the others."""
    reports = []
    for rank in range(world):
        fields = json.loads(store.get(f"report/{rank}"))
        fields["bandwidth"] = {int(other): speed for other, speed in fields["bandwidth"].items()}
        reports.append(Report(**fields))
    wrong = faults(reports, limits)
    for line in wrong:
        print(f"error: {line}", file=sys.stderr, flush=True)
    if not wrong:
        print(summary(reports), flush=True)
    nodes = {one.node: {"address": one.address, "ranks": []} for one in reports}
    for one in reports:
        nodes[one.node]["ranks"].append(one.rank)
    store.set("verdict", json.dumps({"code": 1 if wrong else 0, "nodes": nodes}))


def _keep(nodes: dict[str, dict]) -> None:
    folder = os.environ.get("MEGARL_JOB_DIR")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder)
        with os.fdopen(handle, "w") as out:
            json.dump(nodes, out)
        os.replace(name, Path(folder) / "nodes.json")


if __name__ == "__main__":
    try:
        code = main()
    except BadInput as e:
        print(f"error: {e}", file=sys.stderr, flush=True)
        code = 2
    except RuntimeError as e:  # the first node is gone, or a key never came
        node = os.environ.get("MEGARL_NODE") or os.uname().nodename
        print(f"error: node {node}: rank {os.environ['RANK']} lost the others ({str(e).splitlines()[0]})", file=sys.stderr)
        code = 1
    sys.stdout.flush()
    os._exit(code)  # no destructor of a process group waits for a node that is bad
