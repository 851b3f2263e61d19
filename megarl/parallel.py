"""The mesh: degrees -> process groups, and the few collectives the rest needs.

The only caller of `megatron.core.parallel_state`. Rank order is Megatron's: tp fastest, then cp, ep, dp, pp.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megarl import platform
from megarl.config.schema import Parallel
from megarl.errors import BadInput


@dataclass(frozen=True)
class Mesh:
    """This rank's place in `world = dp x cp x tp x pp`; experts split the same ranks into `ep x etp x expert dp x pp`.

    Groups are torch process groups; a degree of 1 has a group of one rank.
    """

    rank: int
    world_size: int
    local_rank: int
    dp: int
    tp: int
    pp: int
    vpp: int | None
    cp: int
    ep: int
    etp: int
    dp_rank: int
    tp_rank: int
    pp_rank: int
    cp_rank: int
    ep_rank: int
    etp_rank: int
    dp_group: ProcessGroup
    tp_group: ProcessGroup
    pp_group: ProcessGroup
    cp_group: ProcessGroup
    ep_group: ProcessGroup
    etp_group: ProcessGroup
    world_group: ProcessGroup
    object_group: ProcessGroup  # gloo over the world, for Python objects

    @classmethod
    def build(cls, parallel: Parallel) -> Mesh:
        """Initialise torch.distributed (if needed) and Megatron's groups for this layout.

        Raises BadInput when the world does not divide by the layout.
        """
        platform.setup()
        rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
        platform.set_device(local_rank)
        platform.set_threads()
        timeout = timedelta(minutes=parallel.timeout_minutes)
        if not dist.is_initialized():
            world = int(os.environ.get("WORLD_SIZE", "1"))
            where: dict[str, Any] = {}
            if "MASTER_PORT" not in os.environ:
                if world > 1:
                    raise BadInput("MASTER_PORT is not set: start the ranks with torchrun or `megarl train --nproc N`")
                where["store"] = dist.HashStore()  # one process alone needs no port
            else:
                where["store"] = _store(rank, world, timeout)
            dist.init_process_group(platform.backend(), rank=rank, world_size=world, timeout=timeout, **where)
            # NCCL connects all ranks of a group at its first message, which a weight sync sends between some of them
            dist.all_reduce(torch.zeros(1, device=platform.device()))
        return cls._over(parallel, rank, local_rank, dist.new_group(backend="gloo", timeout=timeout))

    @classmethod
    @contextmanager
    def simulated(cls, parallel: Parallel, rank: int, world_size: int) -> Iterator[Mesh]:
        """The mesh of one rank of a world that is not there: groups know their ranks, collectives do nothing.

        Only in a process without groups of its own, which has none afterwards either. Raises BadInput as `build`, and
        RuntimeError when there is a world already.
        """
        platform.setup()
        from megatron.core import parallel_state as ps
        from torch.testing._internal.distributed.fake_pg import FakeStore

        if dist.is_initialized():
            raise RuntimeError("this process belongs to a world: a simulated one needs a process of its own")
        dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
        try:
            yield cls._over(parallel, rank, 0, dist.group.WORLD)
        finally:
            ps.destroy_model_parallel()
            dist.destroy_process_group()

    @classmethod
    def _over(cls, parallel: Parallel, rank: int, local_rank: int, object_group: ProcessGroup) -> Mesh:
        """Megatron's groups over the world that torch.distributed has."""
        from megatron.core import parallel_state as ps

        world = dist.get_world_size()
        dense, expert = parallel.tp * parallel.pp * parallel.cp, parallel.etp * parallel.ep * parallel.pp
        if world % dense or world % expert:
            raise BadInput(
                f"world size {world} does not divide by tp*pp*cp = {dense} and etp*ep*pp = {expert}: "
                "change the number of ranks or the `parallel` section"
            )
        ps.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tp,
            pipeline_model_parallel_size=parallel.pp,
            virtual_pipeline_model_parallel_size=parallel.vpp,
            context_parallel_size=parallel.cp,
            expert_model_parallel_size=parallel.ep,
            expert_tensor_parallel_size=parallel.etp,
            distributed_timeout_minutes=parallel.timeout_minutes,
        )
        return cls(
            rank=rank,
            world_size=world,
            local_rank=local_rank,
            dp=world // dense,
            tp=parallel.tp,
            pp=parallel.pp,
            vpp=parallel.vpp,
            cp=parallel.cp,
            ep=parallel.ep,
            etp=parallel.etp,
            dp_rank=ps.get_data_parallel_rank(),
            tp_rank=ps.get_tensor_model_parallel_rank(),
            pp_rank=ps.get_pipeline_model_parallel_rank(),
            cp_rank=ps.get_context_parallel_rank(),
            ep_rank=ps.get_expert_model_parallel_rank(),
            etp_rank=ps.get_expert_tensor_parallel_rank(),
            dp_group=ps.get_data_parallel_group(),
            tp_group=ps.get_tensor_model_parallel_group(),
            pp_group=ps.get_pipeline_model_parallel_group(),
            cp_group=ps.get_context_parallel_group(),
            ep_group=ps.get_expert_model_parallel_group(),
            etp_group=ps.get_expert_tensor_parallel_group(),
            world_group=dist.group.WORLD,
            object_group=object_group,
        )

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the end of the pipeline, where losses and log-probs are computed."""
        return self.pp_rank == self.pp - 1

    @property
    def reports(self) -> bool:
        """Whether this rank's numbers about its own tokens count: the other ranks would repeat them."""
        return self.is_last_stage and self.tp_rank == 0

    def describe(self) -> str:
        return (
            f"world {self.world_size} = dp {self.dp} x cp {self.cp} x tp {self.tp} x pp {self.pp}"
            f"; ep {self.ep}, etp {self.etp}"
        )

    def all_gather_object(self, item: Any) -> list[Any]:
        """Every rank's `item`, in rank order, on every rank."""
        out: list[Any] = [None] * self.world_size
        dist.all_gather_object(out, item, group=self.object_group)
        return out

    def broadcast_object(self, item: Any, src: int = 0) -> Any:
        """Rank `src`'s `item` on every rank."""
        box = [item]
        dist.broadcast_object_list(box, src=src, group=self.object_group)
        return box[0]

    def barrier(self) -> None:
        dist.barrier(group=self.object_group)

    def any(self, flag: bool) -> bool:
        """Whether any rank says true: how ranks agree to stop, at a step boundary."""
        return bool(self.largest(int(flag)))

    def largest(self, number: int) -> int:
        """The largest `number` of all ranks."""
        box = torch.tensor([number])
        dist.all_reduce(box, op=dist.ReduceOp.MAX, group=self.object_group)
        return int(box.item())

    def total(self, number: float) -> float:
        """The sum of all ranks' `number`, in float64."""
        box = torch.tensor([number], dtype=torch.float64)
        dist.all_reduce(box, group=self.object_group)
        return float(box.item())


class GroupSum:
    """Sums a tensor over the ranks of a group, in place, and counts the bytes that this rank contributed."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group, self.bytes = group, 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.group.size() > 1:
            dist.all_reduce(x, group=self.group)
            self.bytes += x.numel() * x.element_size()
        return x


def _store(rank: int, world: int, timeout: timedelta) -> dist.Store:
    """Where the ranks of one start find each other. torchrun keeps one store over all restarts, with the addresses of the
    ranks that are gone: who reads one of them waits for it until the time-out."""
    store, _, _ = next(dist.rendezvous("env://", rank, world, timeout=timeout))
    return dist.PrefixStore(f"start_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
