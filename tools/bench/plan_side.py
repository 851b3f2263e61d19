"""One rank of tools/bench/plan.py: a real optimizer step whose bytes are counted, by owner and by group.

    measure(config, lengths, prompts)

Weights, gradients and optimizer: live storages, as the memory ledger counts them. Activations: storages that autograd
keeps and nobody of the above has, at every turn from forward to backward. Communication: bytes of every collective, in
the terms of `megarl.plan.volume`: what leaves a rank in a ring, or directly in an all-to-all or a send.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist

SENT: dict[str, dict[str, float]] = {}  # group -> operation -> bytes
NAMES: dict[int, str] = {}  # id of a process group -> its name here


def count_collectives() -> None:
    """Wrap what Megatron and megarl call. Megatron binds most of them when it is imported, so first of all."""
    from torch.distributed import distributed_c10d

    wrapped = {
        "all_gather_into_tensor": lambda out, part, **_: ("all-gather", out.nbytes),
        "reduce_scatter_tensor": lambda out, whole, **_: ("reduce-scatter", whole.nbytes),
        "all_to_all_single": lambda out, own, **_: ("all-to-all", own.nbytes),
    }
    for name, size in wrapped.items():
        setattr(dist, name, _counted(getattr(dist, name), size))
    sent = _counted(dist.isend, lambda tensor, *_, **__: ("send", tensor.nbytes))
    dist.isend = distributed_c10d.isend = sent
    from megarl import platform

    platform.setup()  # which has an all-reduce of its own
    dist.all_reduce = _counted(dist.all_reduce, lambda tensor, **_: ("all-reduce", tensor.nbytes))


def _counted(function: Any, size: Any) -> Any:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        group = kwargs.get("group") or next((a for a in args if isinstance(a, dist.ProcessGroup)), None)
        plain = {key: value for key, value in kwargs.items() if isinstance(value, torch.Tensor)}
        tensors = [*(a for a in args if isinstance(a, torch.Tensor)), *plain.values()]
        name, ranks = NAMES.get(id(group)), group.size() if group is not None else 1
        if function.__name__ == "isend":  # two stages use the world's group for one direction
            name, ranks = "pp", 2
        if name is not None and ranks > 1:
            operation, payload = size(*tensors)
            if (name, operation) == ("etp", "all-reduce"):  # gloo's stand-in for a reduce-scatter of unequal parts
                operation = "reduce-scatter"
            factor = {"send": 1.0, "all-reduce": 2 * (ranks - 1) / ranks}.get(operation, (ranks - 1) / ranks)
            found = SENT.setdefault(name, {})
            found[operation] = found.get(operation, 0.0) + payload * factor
        return function(*args, **kwargs)

    return call


def name_groups() -> None:
    from megatron.core import parallel_state as ps

    NAMES.clear()
    groups = {
        "tp": ps.get_tensor_model_parallel_group(),
        "pp": ps.get_pipeline_model_parallel_group(),
        "cp": ps.get_context_parallel_group(),
        "ep": ps.get_expert_model_parallel_group(),
        "etp": ps.get_expert_tensor_parallel_group(),
        "dp": ps.get_data_parallel_group(with_context_parallel=True),
        "edp": ps.get_expert_data_parallel_group(),
    }
    both = ps.get_expert_tensor_and_model_parallel_group()
    NAMES.update({id(both): "ep"} | {id(group): name for name, group in groups.items()})


class Kept:
    """Storages that autograd keeps, and the most bytes of them at a turn from forward to backward."""

    def __init__(self, own: set[int]) -> None:
        self.own, self.live, self.most, self.forward = own, {}, 0, False

    def pack(self, tensor: torch.Tensor) -> Any:
        self.forward = True
        return _Saved(self, tensor)

    def unpack(self, saved: Any) -> torch.Tensor:
        if self.forward:  # the first one after a forward
            self.most = max(self.most, sum(storage.nbytes() for _, storage in self.live.values()))
            self.forward = False
        return saved.tensor


class _Saved:
    __slots__ = ("key", "kept", "tensor")

    def __init__(self, kept: Kept, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self.kept, self.tensor, self.key = kept, tensor, storage._cdata
        if self.key in kept.own:
            self.key = None
        else:
            count, _ = kept.live.get(self.key, (0, None))
            kept.live[self.key] = count + 1, storage

    def __del__(self) -> None:
        if self.key is not None:
            count, storage = self.kept.live[self.key]
            if count == 1:
                del self.kept.live[self.key]
            else:
                self.kept.live[self.key] = count - 1, storage


def measure(config: dict[str, Any], lengths: list[int], prompts: list[int]) -> dict[str, Any]:
    """Bytes of one rank in one optimizer step on random weights and these sequences, and what its rows were."""
    count_collectives()
    from megarl.algorithms import PRESETS, LossInputs, policy_loss
    from megarl.config.schema import Config
    from megarl.data import micro_batches
    from megarl.learner.policy import Policy
    from megarl.parallel import Mesh
    from megarl.plan.memory import spec_of_config
    from megarl.types import Batch

    cfg = Config(**config)
    mesh = Mesh.build(cfg.parallel)
    name_groups()
    policy = Policy(spec_of_config(cfg), cfg, mesh, optimizer=cfg.rl.optimizer)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in (p for module in policy.modules for p in module.parameters()):
            torch.nn.init.normal_(parameter, std=0.02) if parameter.dim() > 1 else parameter.fill_(1.0)
    policy.optimizer.reload_model_params()
    tokens, generator = sum(lengths), torch.Generator().manual_seed(0)
    mask = torch.ones(tokens)
    start = 0
    for length, prompt in zip(lengths, prompts, strict=True):
        mask[start : start + prompt] = 0
        start += length
    batch = Batch(
        tokens=torch.randint(2, 250, (tokens,), generator=generator),
        lengths=torch.tensor(lengths),
        response_mask=mask,
        token_weights=mask / mask.sum(),
        advantages=torch.randn(tokens, generator=generator),
        old_log_probs=torch.full((tokens,), -5.5),
    )
    packed = micro_batches(batch, cfg.rl.micro_batch_tokens, policy.layout)

    def loss(own: Any, log_probs: Any, entropy: Any, shards: Any) -> Any:
        inputs = LossInputs(log_probs, own.advantages, own.token_weights, own.response_mask, own.old_log_probs)
        return policy_loss(PRESETS["gspo"], inputs, shards)

    assert policy.train_step(packed, loss).applied  # moments exist, and what is made once
    kept = Kept({storage._cdata for parked in policy.parked.values() for storage in parked.storages})
    SENT.clear()
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, kept.unpack):
        assert policy.train_step(packed, loss).applied
    rows = [
        {"lengths": micro.batch.lengths.tolist(), "scored": int((micro.targets >= 0).sum()),
         "masked": int(micro.batch.response_mask.sum()), "tokens": micro.tokens.numel()}
        for micro in packed
    ]  # fmt: skip
    sizes = {name: sum(s.nbytes() for s in parked.storages) for name, parked in policy.parked.items()}
    return sizes | {"activations": kept.most, "sent": SENT, "rows": rows, "stage": mesh.pp_rank, "rank": mesh.rank}
