"""What the ranks of one layout do: every loss, one optimizer step each, compared with the single process's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from megarl.config.schema import Config, Optimizer
from megarl.convert import stream_gradients, stream_hf
from megarl.convert.hf_io import read_json, write_json
from megarl.data.packing import micro_batches, pack
from megarl.errors import RunFailed
from megarl.learner.policy import Policy
from megarl.metrics import reduce_metrics
from megarl.models.build import DTYPES
from megarl.parallel import Mesh
from megarl.types import Batch, MicroBatch
from megarl.verify.layouts import step
from megarl.verify.layouts.names import REFERENCE, Layout, parse
from megarl.verify.layouts.step import Loss

Kind = Literal["sgd", "adam"]
# Plain gradient descent shows the gradient itself, before any clipping. Adam's first step is the sign of a gradient far
# above eps, however small it is: with the usual eps rounding would show. Both steps move weights by about their size.
OPTIMIZERS: dict[Kind, Optimizer] = {
    "sgd": Optimizer(type="sgd", lr=1.0, clip_grad=0.0),
    "adam": Optimizer(lr=0.1, eps=1e-3, clip_grad=0.1, weight_decay=0.01),
}
FLOOR = 1e-6  # of the whole gradient's norm: a tensor's gradient below it is compared with this instead of its own
PERMUTATION = 5  # seed


def run_layout(folder: Path, name: str) -> None:
    """Run the layout's step and write FOLDER/<name>.json; the layout `one` also writes what it is compared with."""
    layout, cfg = parse(name), Config(**read_json(folder / "config.json", "start `megarl verify layouts` again"))
    cfg = cfg.model_copy(update={"parallel": layout.parallel(distributed_optimizer=False)})
    mesh = Mesh.build(cfg.parallel)
    if name == REFERENCE:
        _record(folder, cfg, mesh)
    run = _Run(folder, cfg, mesh, layout)
    found = [run.compare(loss) for loss in step.losses(run.recorded("policy"))]
    if name == REFERENCE:
        save_file(run.reference, folder / "reference.safetensors")
    if mesh.is_main:
        write_json(folder / f"{name}.json", {"losses": found})


class _Run:
    """One layout's ranks and what they compare with."""

    def __init__(self, folder: Path, cfg: Config, mesh: Mesh, layout: Layout) -> None:
        self.folder, self.cfg, self.mesh, self.layout = folder, cfg, mesh, layout
        self.is_reference = layout.name == REFERENCE
        self.reference: dict[str, Tensor] = {}  # filled by the layout `one`

    def recorded(self, role: str) -> Batch:
        """The batch with what the single process recorded, and the experts that its model of this role chose."""
        fields = load_file(self.folder / "recorded.safetensors")
        batch = step.make_batch(int(fields.pop("vocab")), fields["old_log_probs"].dtype)
        return batch.replace(
            routed_experts=fields.get(f"experts/{role}"), **{name: fields[name] for name in step.RECORDED}
        )

    def compare(self, loss: Loss) -> dict[str, Any]:
        """Run one loss with both optimizers. The result is the same on every rank, the worst of them."""
        result: dict[str, Any] = {"loss_name": loss.name}
        for kind, optimizer in OPTIMIZERS.items():
            policy = self._policy(loss, optimizer, sharded=kind == "adam")
            done = policy.train_step(self._packed(loss, policy), loss)
            if not done.applied:
                raise RunFailed(f"{self.layout.name}, {loss.name}: the gradient norm is {done.grad_norm}")
            metrics = reduce_metrics(done.metrics, self.mesh.all_gather_object)
            result[f"grad_norm/{kind}"] = self.mesh.all_gather_object(done.grad_norm)
            if kind == "sgd":
                result |= {"loss": metrics["total"], "acting": metrics.get(loss.acting or "")}
                result["problems"] = step.problems(loss, metrics)
                gradients = stream_gradients(policy.modules, policy.spec, self.mesh)
                result["gradient"] = self._worst(f"{loss.name}/gradient", gradients, FLOOR)
            weights = stream_hf(policy.modules, policy.spec, self.mesh)
            result[kind] = self._worst(f"{loss.name}/{kind}", weights, 0.0)
        return result

    def _policy(self, loss: Loss, optimizer: Optimizer, sharded: bool) -> Policy:
        """A fresh model. Gradients are read where every rank has them whole: only a `sharded` one may have the layout's
        distributed optimizer."""
        distributed = sharded and self.layout.parallel().distributed_optimizer
        parallel = self.layout.parallel(distributed_optimizer=distributed)
        cfg = self.cfg.model_copy(update={"parallel": parallel})
        return _pinned(self.folder / loss.role, cfg, self.mesh, role=loss.role, optimizer=optimizer)

    def _packed(self, loss: Loss, policy: Policy) -> list[MicroBatch]:
        batch = loss.batch.replace(routed_experts=self.recorded(loss.role).routed_experts)
        layout = policy.layout
        if self.layout.permuted:
            batch = batch.select(torch.randperm(len(batch), generator=torch.Generator().manual_seed(PERMUTATION)))
        if self.layout.unpacked:
            packed = [pack(batch, [sequence], layout) for sequence in range(len(batch))]
        else:
            packed = micro_batches(batch, self.layout.budget, layout)
        if policy.routing is not None:
            for micro in packed:
                micro.experts = policy.routing.local(micro)
        return packed

    def _worst(self, what: str, tensors: Iterator[tuple[str, Tensor]], floor: float) -> list[Any]:
        """[difference, name] of the tensor furthest from the single process's, over all ranks' copies.

        |difference| / max(|tensor|, floor x |all tensors|), in Euclidean norms.
        """
        found = {name: tensor.detach().double().cpu().clone() for name, tensor in tensors}
        if self.is_reference:
            self.reference |= {f"{what}/{name}": tensor for name, tensor in found.items()}
            return [0.0, ""]
        worst = [0.0, ""]
        with safe_open(self.folder / "reference.safetensors", framework="pt") as file:
            wanted = {name: file.get_tensor(f"{what}/{name}") for name in found}
            names = [key[len(what) + 1 :] for key in file.offset_keys() if key.startswith(f"{what}/")]
        if set(names) != set(found):
            raise RunFailed(f"{self.layout.name}: the ranks have other tensors: {sorted(set(names) ^ set(found))[0]}")
        whole = math.sqrt(sum(float(tensor.square().sum()) for tensor in wanted.values()))
        for name, tensor in found.items():
            distance = float((tensor - wanted[name]).norm()) / max(float(wanted[name].norm()), floor * whole)
            if not distance <= worst[0]:  # a nan is worse than anything
                worst = [distance if math.isfinite(distance) else math.inf, name]
        return max(self.mesh.all_gather_object(worst))


def _pinned(path: Path, cfg: Config, mesh: Mesh, **settings: Any) -> Policy:
    """A model whose routers can be given their experts: in float32 two layouts may round a near-tie differently."""
    return Policy.from_hf(path, cfg, mesh, routing=True, **settings)


def _record(folder: Path, cfg: Config, mesh: Mesh) -> None:
    """The single process's log-probs, values and experts, with the noise of `step.record`."""
    fields: dict[str, Tensor] = {}
    said = []
    for role in ("policy", "critic"):
        policy = _pinned(folder / role, cfg, mesh, role=role)
        batch = step.make_batch(policy.spec.vocab_size, DTYPES[cfg.model.dtype])
        micro = pack(batch, range(len(batch)), policy.layout)
        numbers, routing = policy.read([micro])
        said.append(numbers[0])
        if routing:
            fields[f"experts/{role}"] = routing[0].stacked().transpose(0, 1)[: len(batch.tokens)].cpu().contiguous()
    whole = step.record(batch, *said)
    fields |= {name: getattr(whole, name).clone() for name in step.RECORDED}
    fields["vocab"] = torch.tensor(policy.spec.vocab_size)
    save_file(fields, folder / "recorded.safetensors")
