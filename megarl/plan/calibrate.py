"""The machine at hand in the terms of `Hardware`: products, memory and a small all-reduce, measured.

`megarl plan --calibrate FILE` calls `calibrate(ranks).save(FILE)`, and `megarl plan CONFIG --gpu FILE` plans with it. What it
writes are figures that were reached, so the shares in `efficiency` are 1, but for what it does not measure.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import multiprocessing

from megarl import platform
from megarl.plan.hardware import CHIPS, Efficiency, Hardware

SECONDS = 0.3  # of each measurement, at least
SIDE = {"cpu": 1024, "cuda": 8192}  # of the square matrices of a product
MOVED = {"cpu": 1 << 27, "cuda": 1 << 32}  # bytes of a copy: more than caches hold
REDUCED = {"cpu": 1 << 24, "cuda": 1 << 28}  # bytes of an all-reduce


def calibrate(ranks: int = 1) -> Hardware:
    """Measure this machine with `ranks` ranks at work at once, as many as a run will have on a node.

    One rank measures no link: its bandwidth is that of memory. On a CPU every rank has its share of the cores. Raises
    RuntimeError when a rank fails.
    """
    if ranks == 1:
        return _hardware(1, _measure(0, 1))
    port, context = _free_port(), multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    workers = [context.Process(target=_worker, args=(rank, ranks, port, results)) for rank in range(ranks)]
    for worker in workers:
        worker.start()
    found = None
    try:
        while found is None and all(worker.exitcode in (None, 0) for worker in workers):
            found = results.get() if not results.empty() else time.sleep(0.05)
        for worker in workers:
            worker.join(60 if found else 0)
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.terminate()
            worker.join()
    if found is None:
        raise RuntimeError(f"a rank of the calibration ended with exit code {[w.exitcode for w in workers]}")
    return _hardware(ranks, found)


def _hardware(ranks: int, found: dict[str, float]) -> Hardware:
    base = CHIPS["cpu"] if platform.name() == "cpu" else CHIPS["h100"]
    flops = {name.removeprefix("flops."): value for name, value in found.items() if name.startswith("flops.")}
    link = found.get("link", found["memory"])
    shares = Efficiency(
        products=1.0,
        experts=min(1.0, found["experts"] / flops["float32" if platform.name() == "cpu" else "bfloat16"]),
        attention=min(1.0, found["attention"] / flops["float32" if platform.name() == "cpu" else "bfloat16"]),
        memory=1.0,
        link=1.0,
        network=1.0,
    )
    return replace(
        base,
        name=f"{platform.name()}, {ranks} rank{'s' if ranks > 1 else ''}",
        flops=flops,
        memory_bytes=found["capacity"],
        memory_bandwidth=found["memory"],
        link_bandwidth=link,
        network_bandwidth=link if ranks > 1 else base.network_bandwidth,
        gpus_per_node=ranks,
        host_bandwidth=found["memory"] if platform.name() == "cpu" else base.host_bandwidth,
        link_latency=found.get("latency", base.link_latency),
        efficiency=shares,
    )


def _worker(rank: int, ranks: int, port: int, results) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
    platform.setup()
    platform.set_device(rank)
    dist.init_process_group(platform.backend(), rank=rank, world_size=ranks)
    found = _measure(rank, ranks)
    if rank == 0:
        results.put(found)
    dist.barrier()
    dist.destroy_process_group()


@torch.no_grad()
def _measure(rank: int, ranks: int) -> dict[str, float]:
    """The figures of this rank while all others measure the same."""
    device, kind = platform.device(), "cpu" if platform.name() == "cpu" else "cuda"
    found = {"capacity": _capacity(kind, ranks)}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        found[f"flops.{name}"] = _products(SIDE[kind] // (4 if kind == "cpu" and name == "bfloat16" else 1), dtype, device)
    working = torch.float32 if kind == "cpu" else torch.bfloat16
    found["experts"] = _experts(working, device)
    found["attention"] = _attention(working, device)
    source = torch.ones(MOVED[kind] // 4, device=device)
    target = torch.empty_like(source)
    found["memory"] = 2 * MOVED[kind] / _seconds(lambda: target.copy_(source))
    if ranks > 1:
        small, large = torch.ones(8, device=device), source[: REDUCED[kind] // 4]
        found["latency"] = _seconds(lambda: dist.all_reduce(small), ranks)
        seconds = max(1e-9, _seconds(lambda: dist.all_reduce(large), ranks) - found["latency"])
        found["link"] = 2 * REDUCED[kind] * (ranks - 1) / ranks / seconds
    return found


def _products(side: int, dtype: torch.dtype, device: torch.device) -> float:
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / _seconds(lambda: a @ b)


def _experts(dtype: torch.dtype, device: torch.device) -> float:
    """Grouped products of 16 experts with unequal shares of the tokens."""
    experts, hidden, width = 16, 512, 256
    counts = torch.tensor([32 + 16 * (e % 5) for e in range(experts)], device=device)
    weights = torch.randn(experts, hidden, width, device=device).to(dtype)
    tokens = torch.randn(int(counts.sum()), hidden, device=device).to(dtype)
    ends = counts.cumsum(0).to(torch.int32)
    return 2 * len(tokens) * hidden * width / _seconds(lambda: F.grouped_mm(tokens, weights, offs=ends))


def _attention(dtype: torch.dtype, device: torch.device) -> float:
    heads, tokens, width = 8, 1024, 64
    q, k, v = (torch.randn(1, heads, tokens, width, device=device).to(dtype) for _ in range(3))
    flops = 4 * heads * tokens * (tokens + 1) / 2 * width
    return flops / _seconds(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True))


def _seconds(work: Callable[[], object], ranks: int = 1) -> float:
    """The median of a call; with several ranks each makes as many calls as the first."""
    work()
    platform.synchronize()
    start = time.perf_counter()
    work()
    platform.synchronize()
    count = torch.tensor([max(3, min(1000, int(SECONDS / max(1e-7, time.perf_counter() - start))))])
    if ranks > 1:
        count = count.to(platform.device())
        dist.broadcast(count, 0)
    times = []
    for _ in range(int(count)):
        start = time.perf_counter()
        work()
        platform.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def _capacity(kind: str, ranks: int) -> float:
    if kind == "cuda":
        return float(torch.cuda.get_device_properties(platform.device()).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / ranks


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
