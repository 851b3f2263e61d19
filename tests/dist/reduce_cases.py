"""Run by the ranks of `test_reduce.py`."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megarl.platform import cpu_reduce


def sums(size: int, unreadable: int = -1) -> dict[str, object]:
    """An all_reduce of `size` numbers with and without the shorter way, which rank `unreadable` cannot go."""
    dist.init_process_group("gloo")
    rank, taken = dist.get_rank(), []
    plain_read, plain_sum = cpu_reduce._Peers._read, cpu_reduce._Peers.sum_

    def read(peers, *arguments):
        if rank == unreadable:
            raise OSError
        plain_read(peers, *arguments)

    def sum_(peers, *arguments):
        taken.append(True)
        plain_sum(peers, *arguments)

    cpu_reduce._Peers._read, cpu_reduce._Peers.sum_ = read, sum_
    mine = torch.randint(-99, 99, (size,), generator=torch.Generator().manual_seed(rank)).float()  # sums are exact
    expected, found = mine.clone(), mine.clone()
    dist.all_reduce(expected)
    all_reduce = cpu_reduce.by_memory(dist.all_reduce)
    with dist._coalescing_manager(dist.group.WORLD):  # as Megatron reduces its gradients
        all_reduce(found, group=dist.group.WORLD)
    equal = torch.equal(found, expected)
    dist.destroy_process_group()
    return {"equal": equal, "short way": bool(taken)}
