"""Run by the ranks of `test_learner.py`: three optimizer steps on a fixed batch, whatever the layout."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from megarl.config.schema import Config, Model, Optimizer, Parallel
from megarl.data.packing import micro_batches
from megarl.learner.policy import Policy
from megarl.metrics import Mean, Sum, reduce_metrics
from megarl.parallel import Mesh
from megarl.types import Batch

SEQUENCES = 8


def fixed_batch(vocab: int = 120) -> Batch:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 40, (SEQUENCES,), generator=generator)
    count = int(lengths.sum())
    batch = Batch(
        tokens=torch.randint(4, vocab, (count,), generator=generator),
        lengths=lengths,
        response_mask=torch.ones(count),
        token_weights=torch.rand(count, generator=generator) / count,
    )
    first = batch.offsets()[:-1]
    batch.response_mask[first] = 0
    batch.token_weights[first] = 0
    return batch


def negative_log_likelihood(batch: Batch, log_probs: Any, entropy: Any, shards: Any) -> Any:
    loss = -(batch.token_weights * log_probs).sum()
    return loss, {"loss": Sum(loss.detach()), "entropy": Mean.of(entropy, batch.response_mask)}


def train(
    path: str, parallel: dict[str, Any], budget: int, dtype: str = "float32", steps: int = 3, **router: Any
) -> list[list[float]]:
    """[loss, entropy, gradient norm] of each step, then the sum of log-probs after the last one."""
    cfg = Config(model=Model(path=path, dtype=dtype), parallel=Parallel(**parallel))
    mesh = Mesh.build(cfg.parallel)
    settings = Optimizer(lr=1e-3, clip_grad=1.0, weight_decay=0.01)
    policy = Policy.from_hf(path, cfg, mesh, optimizer=settings, total_steps=10, **router)
    batch = fixed_batch()
    packed = micro_batches(batch, budget, policy.layout)
    out = []
    for _ in range(steps):
        result = policy.train_step(packed, negative_log_likelihood)
        assert result.applied
        metrics = reduce_metrics(result.metrics, mesh.all_gather_object)
        out.append([metrics["loss"], metrics["entropy"], result.grad_norm])
    log_probs, _ = policy.log_probs(packed)
    own = sum(float((lp * m.batch.response_mask).sum()) for lp, m in zip(log_probs, packed))
    own = own if mesh.tp_rank == 0 else 0.0
    out.append([sum(mesh.all_gather_object(own))])
    return out


def masked(path: str, parallel: dict[str, Any], budget: int) -> dict[str, bool]:
    """A mask changes no log-prob that it lets through, and a rank whose micro-batches are masked trains like any."""
    cfg = Config(model=Model(path=path), parallel=Parallel(**parallel))
    mesh = Mesh.build(cfg.parallel)
    policy = Policy.from_hf(path, cfg, mesh, optimizer=Optimizer(lr=1e-3), total_steps=10)
    batch = fixed_batch()
    ids = batch.sequence_ids()
    some = batch.response_mask * (torch.arange(len(ids)) % 3 > 0) * (ids % 2)
    everything, wanted = (
        micro_batches(batch.replace(response_mask=mask), budget, policy.layout)
        for mask in (torch.ones(len(ids)), some)
    )
    found = {}
    for place, name in enumerate(("log-probs", "entropy")):
        full, part = (policy.log_probs(packed)[place] for packed in (everything, wanted))
        kept = [micro.batch.response_mask > 0 for micro in wanted]
        found[f"{name} where wanted"] = all(
            torch.allclose(a[m], b[m], atol=2e-6, rtol=0) for a, b, m in zip(full, part, kept)
        )
        found[f"no {name} elsewhere"] = not any(b[~m].any() for b, m in zip(part, kept))
        starts = [micro.position_ids[: len(a)] == 0 for micro, a in zip(everything, full)]
        found[f"no {name} at a start"] = not any(a[s].any() for a, s in zip(full, starts))
        found[f"{name} everywhere else"] = all((a[~s] != 0).all() for a, s in zip(full, starts))
    nothing = batch.replace(response_mask=torch.zeros(len(ids)))
    packed = micro_batches(nothing, budget, policy.layout)
    for name, loss in (("a loss", negative_log_likelihood), ("a constant", lambda *_: (torch.zeros(()), {}))):
        result = policy.train_step(packed, loss)
        found[f"{name} without a trained token"] = result.applied and result.grad_norm == 0.0
    return found


def sharded_log_probs(vocab: int, columns: int) -> dict[str, float]:
    """How far log-probs, entropy and gradients over two halves of 32 float64 columns are from torch's of all."""
    import torch.distributed as dist

    from megarl import platform
    from megarl.models.log_probs import linear_log_probs

    Mesh.build(Parallel(tp=2))
    rows, width, temperature = 9, 16, 0.7
    plain, platform.block_bytes = platform.block_bytes, lambda: 8 * rows * columns
    torch.manual_seed(0)  # the same on both ranks
    hidden, weight = torch.randn(rows, 7, dtype=torch.float64), torch.randn(2 * width, 7, dtype=torch.float64)
    targets, upstream = torch.randint(vocab, (rows,)), torch.randn(rows, dtype=torch.float64)
    own = slice(dist.get_rank() * width, (dist.get_rank() + 1) * width)
    part = weight[own].clone().requires_grad_()
    hidden.requires_grad_()
    log_probs, entropy = linear_log_probs(hidden, part, targets, vocab, dist.group.WORLD, temperature)
    grad_hidden, grad_weight = torch.autograd.grad(log_probs, (hidden, part), upstream)
    platform.block_bytes = plain
    dist.all_reduce(grad_hidden)
    every = ((hidden @ weight.requires_grad_().t())[:, :vocab] / temperature).log_softmax(-1)
    expected = every.gather(1, targets[:, None])[:, 0]
    true_hidden, true_weight = torch.autograd.grad(expected, (hidden, weight), upstream, retain_graph=True)
    pairs = {
        "log-probs": (log_probs, expected),
        "entropy": (entropy, -(every.exp() * every).sum(-1)),
        "gradient of hidden": (grad_hidden, true_hidden),
        "gradient of weight": (grad_weight, true_weight[own]),
    }
    return {name: float((a - b).abs().max().detach()) for name, (a, b) in pairs.items()}


class KeptForBackward:
    """Hooks that count the bytes autograd keeps, each storage once, and remember the most at any time."""

    def __init__(self) -> None:
        self.holders: dict[int, int] = {}  # storage -> saved tensors that live in it
        self.now = self.most = 0

    def pack(self, tensor: torch.Tensor) -> Any:
        storage = tensor.untyped_storage()
        pointer, size = storage.data_ptr(), storage.nbytes()
        self.holders[pointer] = self.holders.get(pointer, 0) + 1
        self.now += size * (self.holders[pointer] == 1)
        self.most = max(self.most, self.now)
        holder = _Holder(tensor)
        weakref.finalize(holder, self._release, pointer, size)
        return holder

    def _release(self, pointer: int, size: int) -> None:
        self.holders[pointer] -= 1
        self.now -= size * (self.holders[pointer] == 0)


class _Holder:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def recomputed(path: str, parallel: dict[str, Any]) -> dict[str, list[float]]:
    """By `parallel.recompute`: [largest gradient difference to `none`, over the largest gradient; MiB kept at most]."""
    mesh = Mesh.build(Parallel(**parallel))
    out: dict[str, list[float]] = {}
    reference: list[torch.Tensor] = []
    for mode in ("none", "selective", "full"):
        cfg = Config(model=Model(path=path), parallel=Parallel(**parallel, recompute=mode))
        policy = Policy.from_hf(path, cfg, mesh, optimizer=Optimizer(lr=1e-3), total_steps=10)
        packed, kept = micro_batches(fixed_batch(), 400, policy.layout), KeptForBackward()
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda holder: holder.tensor):
            assert policy.train_step(packed, negative_log_likelihood).applied
        gradients = [p.main_grad.clone() for chunk in policy.chunks for p in chunk.parameters()]
        reference = reference or gradients
        gap = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(gradients, reference, strict=True))
        out[mode] = [gap, kept.most / 2**20]
    return out


def router_moves(path: str) -> list[dict[str, float]]:
    """How far the routers' and the other weights move in two steps: with free routers, and with frozen ones."""
    cfg = Config(model=Model(path=path))
    mesh, out = Mesh.build(cfg.parallel), []
    for frozen in (False, True):
        policy = Policy.from_hf(path, cfg, mesh, optimizer=Optimizer(lr=1e-3), total_steps=10, freeze_router=frozen)
        before = {name: p.detach().clone() for name, p in policy.modules[0].named_parameters()}
        packed = micro_batches(fixed_batch(), 400, policy.layout)
        for _ in range(2):
            assert policy.train_step(packed, negative_log_likelihood).applied
        moved = {name: float((p - before[name]).abs().max()) for name, p in policy.modules[0].named_parameters()}
        routers = [gap for name, gap in moved.items() if "router" in name]
        others = [gap for name, gap in moved.items() if "router" not in name]
        out.append({"routers": max(routers), "others": min(others)})
    return out


def log_ratio_spread(path: str, parallel: dict[str, Any]) -> list[dict[str, float]]:
    """What the watch measures without an update, after one of the output layer alone, and after one of the routers."""
    from megarl import algorithms
    from megarl.config.schema import Algorithm
    from megarl.trainers.routing import RoutingWatch

    cfg = Config(model=Model(path=path), parallel=Parallel(**parallel))
    mesh = Mesh.build(cfg.parallel)
    policy = Policy.from_hf(path, cfg, mesh, routing=True)
    batch = fixed_batch()
    batch = batch.replace(
        sequence_index=torch.arange(len(batch)), advantages=torch.ones(len(batch.tokens)), token_weights=None
    )
    algorithm = algorithms.from_config(Algorithm(preset="gspo"), 40)
    watch = RoutingWatch(policy, algorithm, tokens=2000, most_changed=0.3, variance=True)
    watch.before(batch, noise=False)
    out = []
    for changed, change in (("", None), ("output_layer", lambda p: p.mul_(1.5)), ("router.weight", lambda p: p.copy_(p.flip(0)))):
        for name, parameter in (item for chunk in policy.modules for item in chunk.named_parameters()):
            if changed and changed in name:
                with torch.no_grad():
                    change(parameter)
        out.append(reduce_metrics(watch.after(batch), mesh.all_gather_object))
    return out
