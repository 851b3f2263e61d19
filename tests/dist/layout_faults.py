"""A rank of `verify layouts` with a deliberate error: `python -m tests.dist.layout_faults verify layout-rank FOLDER NAME`.

MEGARL_TEST_FAULTS names the error of each layout, as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
import torch.distributed as dist


def local_sequence_ratio() -> None:
    """The ratio of a sequence from the tokens of one context-parallel rank."""
    from megarl.types import SequenceShards

    plain = SequenceShards.__init__

    def without_reduction(self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        self.reduce = None

    SequenceShards.__init__ = without_reduction


def keys_without_gradient() -> None:
    """Keys and values of other context-parallel ranks as constants."""
    from megarl.models.layers import torch_layers

    def gather(x: torch.Tensor, *args: Any, group: Any, **kwargs: Any) -> torch.Tensor:
        pieces = [torch.empty_like(x) for _ in range(group.size())]
        dist.all_gather(pieces, x.detach().contiguous(), group=group)
        pieces[group.rank()] = x
        return torch.cat(pieces)

    torch_layers.gather_from_sequence_parallel_region = gather


def mean_of_micro_batches() -> None:
    """Every micro-batch divides by its own tokens, and the step by the micro-batches."""
    from megarl.verify.layouts import rank

    plain = rank.micro_batches

    def own_denominators(batch: Any, budget: int, layout: Any) -> Any:
        out = plain(batch, budget, layout)
        for micro in out:
            total = micro.batch.token_weights.sum().clamp(min=1e-9)
            micro.batch = micro.batch.replace(token_weights=micro.batch.token_weights / total / len(out) / layout.dp)
        return out

    rank.micro_batches = own_denominators


def experts_not_reduced() -> None:
    """Gradients of experts stay those of one rank."""
    from megatron.core.distributed import DistributedDataParallel

    plain = DistributedDataParallel.__init__

    def without_experts(self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        self.expert_parallel_bucket_groups = []

    DistributedDataParallel.__init__ = without_experts


def norms_not_reduced() -> None:
    """Gradients of norms stay those of one sequence-parallel rank's tokens."""
    from megarl.models.layers import torch_layers

    plain = torch_layers.RMSNorm.__init__

    def unmarked(self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        self.weight.sequence_parallel = False

    torch_layers.RMSNorm.__init__ = unmarked


def other_experts() -> None:
    """Routers are given other experts than those of the single process."""
    from megarl.models.moe.replay import RoutingReplay

    plain = RoutingReplay.local
    RoutingReplay.local = lambda self, *args: torch.where((rows := plain(self, *args)) < 0, rows, (rows + 1) % 8)


def quiet_gates() -> None:
    """The log-probs before the update are nearly those of the update."""
    from megarl.verify.layouts import step

    step.TOKEN_NOISE, step.SHIFTS = 0.01, tuple(shift / 20 for shift in step.SHIFTS)


def main() -> None:
    faults = json.loads(os.environ["MEGARL_TEST_FAULTS"])
    fault = faults.get(sys.argv[-1])
    if fault is not None:
        from megarl import platform

        platform.setup()
        globals()[fault]()
    from megarl.cli import main as megarl

    megarl()


if __name__ == "__main__":
    main()
