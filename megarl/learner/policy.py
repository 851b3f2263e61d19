"""`Policy`: one model of the learner, its optimizer, and the two passes everything else is made of."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megarl import platform
from megarl.config.schema import Config, Model, Optimizer, Parallel
from megarl.convert import read_spec
from megarl.data.packing import BatchLayout
from megarl.errors import BadInput
from megarl.learner.fp8_params import FP8Params
from megarl.learner.host_parked import HostParked, by_owner, tensors_of
from megarl.learner.optimizer import (
    build_optimizer,
    build_schedule,
    clip_gradient,
    gradient_norm,
    state_tensors,
    step_optimizer,
)
from megarl.metrics import Max, Mean, Metric, Sum, merge
from megarl.models.build import DTYPES, build_model, transformer_config
from megarl.models.fp8 import recipe_of
from megarl.models.layers.fp8_layers import FP8Layers
from megarl.models.layers.lm_head import output_weight
from megarl.models.layers.provider import choose
from megarl.models.layers.te_fp8 import TEFP8
from megarl.models.log_probs import linear_log_probs
from megarl.models.moe.groups import keep_selection_bias
from megarl.models.moe.replay import RoutingReplay, RowRouting
from megarl.models.packing_params import PackedRow
from megarl.models.spec import ModelSpec
from megarl.parallel import GroupSum, Mesh
from megarl.types import MicroBatch, SequenceShards

platform.setup()

from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.transformer.module import Float16Module  # noqa: E402
from megatron.core.utils import get_attr_wrapped_model, get_model_config  # noqa: E402

Role = Literal["policy", "reference", "critic", "reward"]
# (the micro-batch's tokens that this rank scores, on the device, *what the role's output is read as, shards) -> its share
# of the step's loss, metrics. Between batch and shards stand, by role: log-probs [m] and entropy [m]; values [m] of a
# critic; scores [S] of a reward model, with whole sequences, the same on all context-parallel ranks, as is then the loss.
LossFunction = Callable[..., tuple[Tensor, dict[str, Metric]]]
SCALAR_ROLES: tuple[Role, ...] = ("critic", "reward")
REASONS = {1: "grad_norm", 2: "loss", 3: "nonfinite"}  # not to apply an optimizer step


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did. `metrics` are this rank's, to be reduced once over all ranks."""

    refused: str  # why nothing was changed: nonfinite, grad_norm or loss; empty when the step was applied
    grad_norm: float  # before clipping, over all ranks
    metrics: dict[str, Metric]
    routing: list[RowRouting]  # what the routers did, one for each micro-batch; empty without `routing`

    @property
    def applied(self) -> bool:
        return not self.refused


class Policy:
    """A Megatron-core model on this rank's part of the mesh, for training (`optimizer` given) or for scoring.

    Roles `policy` and `reference` have a language model's head; `critic` and `reward` one number a token: a critic's
    value of the state before each token, a reward model's score of a sequence at its last token.
    """

    def __init__(
        self,
        spec: ModelSpec,
        cfg: Config,
        mesh: Mesh,
        role: Role = "policy",
        optimizer: Optimizer | None = None,
        total_steps: int = 1,
        temperature: float = 1.0,
        routing: bool = False,
        freeze_router: bool = False,
        aux_loss_coef: float = 0.0,
    ) -> None:
        """`routing`: passes record what the routers choose, and replay `MicroBatch.experts`; of an MoE model.

        `freeze_router`: training leaves the routers' weights alone. `aux_loss_coef`: of the routers' load balancing loss,
        the mean over micro-batches, from live routing even under replay.
        """
        self.spec = spec = replace(spec, head="scalar" if role in SCALAR_ROLES else "lm")
        self.mesh, self.role = mesh, role
        self.temperature = temperature
        self.layout = batch_layout(spec, cfg, mesh)  # what the micro-batches of this model must be packed for
        self.config = transformer_config(spec, cfg.model, mesh, cfg.parallel, aux_loss_coef)
        self.dtype = DTYPES[cfg.model.dtype]
        self.head_dtype = DTYPES[cfg.model.head_dtype] if cfg.model.head_dtype else None
        self._modules = build_model(spec, cfg.model, mesh, cfg.parallel, aux_loss_coef)
        if freeze_router:
            for name, parameter in (item for module in self._modules for item in module.named_parameters()):
                parameter.requires_grad = ".mlp.router." not in name
        is_half = self.dtype is torch.bfloat16
        self.chunks = [Float16Module(self.config, m) for m in self._modules] if is_half else self._modules
        for module in self._modules:
            keep_selection_bias(module)
        self.fp8_params = FP8Params(self._modules)
        # after the wrapper, which would make bfloat16 of its float32 buffers
        self.fp8 = fp8_of(self._modules, cfg.model, spec, mesh)
        self.optimizer = self.schedule = None
        self._gathers_late = False  # updated parameters arrive during the next forward pass
        if optimizer is not None:
            self._prepare_training(optimizer, cfg.parallel, total_steps)
        self.fp8_params.forget_initial()
        self.updates = 0  # optimizer steps taken: the policy version
        self.routing = RoutingReplay(self._modules, spec, mesh, role) if routing and spec.is_moe else None
        self._run = get_forward_backward_func()
        # what can leave the device, each by itself; gradients are zero at the start of every optimizer step anyway
        self.parked = {
            owner: HostParked(lambda owner=owner: self._storages()[owner], forgets=owner == "gradients")
            for owner in ("weights", "gradients", "optimizer")
        }

    def _storages(self) -> dict[str, list[torch.UntypedStorage]]:
        buffers = [b for chunk in self.chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)] if self.optimizer else []
        weights = [b.param_data for b in buffers if b.param_data is not None]
        return by_owner(
            {
                "gradients": [b.grad_data for b in buffers],  # mxfp8 parameters are gathered in the same memory
                "weights": [*weights, *tensors_of(self._modules)],
                "optimizer": state_tensors(self.optimizer) if self.optimizer else [],
            }
        )

    def _prepare_training(self, optimizer: Optimizer, parallel: Parallel, total_steps: int) -> None:
        # Megatron's distributed optimizer knows Adam only, and half and single precision
        distributed = parallel.distributed_optimizer and optimizer.type == "adam" and self.dtype is not torch.float64
        self._gathers_late = parallel.overlap_param_gather and distributed
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=self.dtype is not torch.float64,
            use_distributed_optimizer=distributed,
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            overlap_param_gather=self._gathers_late,
            fp8_param_gather=self.config.fp8_param,
            reuse_grad_buf_for_mxfp8_param_ag=self.config.fp8_param and self.config.fp8_recipe == "mxfp8",
        )
        self.chunks = [DistributedDataParallel(self.config, ddp, chunk) for chunk in self.chunks]
        fp8_params = self.config.fp8_recipe if self.config.fp8_param else None
        self.optimizer = build_optimizer(optimizer, self.dtype, self.chunks, distributed, fp8_params)
        self.schedule = build_schedule(optimizer, self.optimizer, total_steps)
        config = get_model_config(self.chunks[0])
        config.finalize_model_grads_func = finalize_model_grads
        config.grad_scale_func = self.optimizer.scale_loss
        if parallel.overlap_grad_reduce:
            no_sync = [chunk.no_sync for chunk in self.chunks]
            config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]

    @property
    def modules(self) -> list[Any]:
        """This rank's chunks of the model, with the weights of the last update: what convert reads and writes."""
        if self._gathers_late:
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)
            self.fp8_params.finish_gather()
        return self._modules

    @classmethod
    def from_hf(cls, path: str | Path, cfg: Config, mesh: Mesh, role: Role = "policy", **settings: Any) -> Policy:
        """A model with the weights of a Hugging Face folder.

        A critic or reward model takes a reward model's folder, or a language model's: its head is then 0. Raises
        BadInput when the folder cannot be read, or is a reward model's and the role needs logits.
        """
        spec = read_spec(path)
        if spec.head == "scalar" and role not in SCALAR_ROLES:
            raise BadInput(f"{path}: a reward model cannot be the {role}; give the folder of a language model")
        policy = cls(spec, cfg, mesh, role, **settings)
        policy.load_hf(path)
        return policy

    def load_hf(self, path: str | Path) -> None:
        """Replace the weights, and the optimizer's main copy of them, by those of a Hugging Face folder."""
        self.fp8_params.load_hf(path, self._modules, self.spec, self.mesh, self.optimizer)

    def next_lr(self) -> float:
        """The learning rate of the next optimizer step."""
        return float(self.optimizer.param_groups[0]["lr"]) if self.optimizer.param_groups else 0.0

    def log_probs(
        self, micro_batches: Sequence[MicroBatch], temperature: float | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Log-probs and entropies `[N]` of each micro-batch's real tokens, on the CPU; empty off the last stage.

        0 where `response_mask` is 0, and at tokens that this rank does not score (see `MicroBatch.owned`). The same
        packing and code path as `train_step`, so that before the first update the ratio is exactly 1. `temperature`: of
        the softmax, None: the one sampled with.
        """
        outputs, _routing = self._outputs(micro_batches, temperature)
        log_probs, entropies = ([_at_owned(m, o[i]) for m, o in zip(micro_batches, outputs)] for i in (0, 1))
        return log_probs, entropies

    def read(
        self, micro_batches: Sequence[MicroBatch], temperature: float | None = None
    ) -> tuple[list[Tensor], list[RowRouting]]:
        """Log-probs (a critic's values) as `log_probs`, and what the routers did, one for each micro-batch.

        The latter is empty without `routing`.
        """
        outputs, routing = self._outputs(micro_batches, temperature)
        return [_at_owned(micro, out[0]) for micro, out in zip(micro_batches, outputs)], routing

    def values(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        """Of a critic: the value `[N]` of the state before each real token, float32 on the CPU; empty off the last stage.

        Entry t is the head's output at t - 1, the shift of `log_probs`; 0 at tokens that this rank does not score.
        """
        return self.read(micro_batches)[0]

    def scores(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        """Of a reward model: the head's output `[S]` at the last token of each sequence, float32 on the CPU.

        Empty off the last stage.
        """
        return [scores for (scores,) in self._outputs(micro_batches)[0]]

    def train_step(
        self, micro_batches: Sequence[MicroBatch], loss: LossFunction, most: Mapping[str, float] = {}
    ) -> StepResult:
        """One optimizer step over this rank's micro-batches; every rank passes the same number of them.

        A step whose loss or gradient norm is not finite on any rank, or above what `most` has for `loss` or `grad_norm`,
        changes nothing and says why in `refused`.
        """
        self._need("weights", "gradients", "optimizer")
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        scale = len(micro_batches) * self.mesh.dp * self.mesh.cp

        shares: list[Tensor] = []

        def wrapped(micro_batch: MicroBatch, out: Tensor) -> tuple[Tensor, Tensor, dict[str, Metric]]:
            share, found = self._loss(micro_batch, out, loss)
            shares.append(share.detach())
            return _megatron_loss(share, found, scale)

        collected, routing = self._forward_backward(micro_batches, wrapped, forward_only=False)
        if self.fp8 is not None:
            self.fp8.advance()
        lr = self.next_lr()
        refused, grad_norm = self._apply(float(sum(shares)), most)
        metrics: dict[str, Metric] = {}
        if self._reports:
            for item in collected:
                merge(metrics, item)
        own = {"grad_norm": Mean(grad_norm), "grad_norm_max": Max(grad_norm), "lr": Mean(lr)}
        metrics |= {f"{self.role}/{name}": metric for name, metric in own.items()}
        return StepResult(refused, grad_norm, metrics, routing)

    def validate(self, micro_batches: Sequence[MicroBatch], loss: LossFunction) -> dict[str, Metric]:
        """The loss's metrics over this rank's micro-batches, without a gradient."""

        def wrapped(micro_batch: MicroBatch, out: Tensor) -> dict[str, Metric]:
            return self._loss(micro_batch, out, loss)[1]

        with self._evaluating(), torch.no_grad():
            collected, _ = self._forward_backward(micro_batches, wrapped, forward_only=True, collect=True)
        metrics: dict[str, Metric] = {}
        if self._reports:
            for item in collected:
                merge(metrics, item)
        return metrics

    @property
    def _reports(self) -> bool:
        # all context-parallel ranks know a reward model's scores, and compute the same loss from them
        return self.mesh.reports and (self.role != "reward" or self.mesh.cp_rank == 0)

    def _apply(self, loss: float, most: Mapping[str, float]) -> tuple[str, float]:
        """Measure the gradient, check on every rank that it and this rank's `loss` may be used, clip and step.

        Why they may not be, and the gradient norm.
        """
        overflow = self.optimizer.prepare_grads()
        grad_norm = gradient_norm(self.optimizer)
        whole = self.mesh.total(loss if self._reports else 0.0) if "loss" in most else loss
        found = grad_norm > most.get("grad_norm", math.inf), whole > most.get("loss", math.inf)
        bad = overflow or not math.isfinite(grad_norm) or not math.isfinite(loss)
        reason = self.mesh.largest(3 if bad else int(found[0] or 2 * found[1]))
        if reason:
            return REASONS[reason], grad_norm
        clip_gradient(self.optimizer, grad_norm, self.optimizer.config.clip_grad)
        step_optimizer(self.optimizer, self.chunks)
        self.schedule.step(1)
        self.updates += 1
        return "", grad_norm

    def _need(self, *owners: str) -> None:
        """A kernel that meets a tensor without bytes would end the process without a word."""
        parked = [owner for owner in owners if self.parked[owner].is_parked]
        if parked:
            raise RuntimeError(f"the {self.role}'s {' and '.join(parked)} are parked on the host")

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        self._need("weights")
        for chunk in self.chunks:
            chunk.eval()
        yield

    def _forward_backward(
        self, micro_batches: Sequence[MicroBatch], last_stage: Callable, forward_only: bool, collect: bool = False
    ) -> tuple[list[Any], list[RowRouting]]:
        """Megatron's schedule over this rank's micro-batches; `last_stage(micro_batch, out)` runs on the last one.

        `out` is what the head gives: `[1, n, H]` hidden states, or `[1, n, 1]`. Returns what it returned, and what the
        routers did.
        """
        rows = [self._row(micro_batch) for micro_batch in micro_batches]

        def step(data: Iterator, model: Any) -> tuple[Tensor, Callable]:
            micro_batch, row = next(data)
            tokens = micro_batch.tokens.to(platform.device())[None]
            padding = self._padding(micro_batch, model) if self.config.moe_aux_loss_coeff else {}
            out = model(tokens, row.position_ids[None], None, packed_seq_params=row, **padding)
            if collect:
                return out, lambda out, non_loss_data=True: last_stage(micro_batch, out)
            return out, lambda out: last_stage(micro_batch, out)

        iterators = [iter(list(zip(micro_batches, rows, strict=True))) for _ in self.chunks]
        collected = self._run(
            forward_step_func=step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=len(micro_batches),
            seq_length=max(m.tokens.numel() for m in micro_batches),
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=collect,
        )
        if self.routing is None:
            return collected, []
        routing = [row.routing for row in rows]
        self.routing.finish(routing, uses=1 if forward_only or self.config.recompute_granularity is None else 2)
        return collected, routing

    def _padding(self, micro_batch: MicroBatch, model: Any) -> dict[str, Tensor]:
        """Rows that the load balancing loss leaves out.

        Megatron's documentation has the mask the other way round, and it takes the sequence-parallel part of it on the
        first pipeline stage only.
        """
        padding = (micro_batch.held < 0).to(platform.device())
        if not get_attr_wrapped_model(model, "pre_process"):
            padding = padding.view(self.mesh.tp, -1)[self.mesh.tp_rank]
        return {"padding_mask": padding[None]}

    def _row(self, micro_batch: MicroBatch) -> PackedRow:
        device = platform.device()
        row = PackedRow.build(
            micro_batch.cu_seqlens.to(device),
            micro_batch.position_ids.to(device),
            self.spec.rope,
            self.mesh.cp_group,
            torch.promote_types(self.dtype, torch.float32),
            self.spec.windows,
        )
        if self.fp8 is not None:
            row.real = self.fp8.real_rows(micro_batch)
        if self.routing is not None:
            row.routing = self.routing.begin(micro_batch, device)
        return row

    @torch.no_grad()
    def _outputs(
        self, micro_batches: Sequence[MicroBatch], temperature: float | None = None
    ) -> tuple[list[tuple[Tensor, ...]], list[RowRouting]]:
        """`_read` of each micro-batch, on the CPU, empty off the last stage; and what the routers did."""

        def collected(micro_batch: MicroBatch, out: Tensor) -> tuple[Tensor, ...]:
            return tuple(tensor.cpu() for tensor in self._read(micro_batch, out, temperature))

        with self._evaluating():
            outputs, routing = self._forward_backward(micro_batches, collected, forward_only=True, collect=True)
        return outputs if self.mesh.is_last_stage else [], routing

    def _read(self, micro_batch: MicroBatch, out: Tensor, temperature: float | None = None) -> tuple[Tensor, ...]:
        """What a loss of this role gets of the head's output, differentiable.

        Log-probs and entropy `[m]`, 0 where `response_mask` is 0, or values `[m]`, of the tokens this rank scores; or all
        scores `[S]`.
        """
        targets = micro_batch.targets.to(out.device)
        if self.role == "reward":
            return (self._scores(micro_batch.last_rows.to(out.device), out[0, :, 0]),)
        rows = (targets >= 0).nonzero()[:, 0]
        if self.role == "critic":
            return (out[0, :, 0][rows],)
        tokens, mask = (x.to(out.device)[targets[rows]] for x in (micro_batch.batch.tokens, micro_batch.batch.response_mask))
        index, weight = (mask > 0).nonzero()[:, 0], output_weight(self._modules[-1])
        found = linear_log_probs(
            out[0, rows[index]].to(self.head_dtype or weight.dtype),  # Megatron's wrapper made float32 of bfloat16
            weight,
            tokens[index],
            self.spec.vocab_size,
            self.mesh.tp_group,
            temperature or self.temperature,
        )
        return tuple(x.new_zeros(len(rows)).index_copy(0, index, x) for x in found)

    def _scores(self, last_rows: Tensor, numbers: Tensor) -> Tensor:
        """[S], the same on every context-parallel rank; each score has a gradient on the rank that computed it."""
        mine = last_rows >= 0
        scores = torch.where(mine, numbers[last_rows.clamp(min=0)], 0.0)
        if self.mesh.cp == 1:
            return scores
        return scores + GroupSum(self.mesh.cp_group)(scores.detach().clone()) - scores.detach()

    def _loss(self, micro_batch: MicroBatch, out: Tensor, loss: LossFunction) -> tuple[Tensor, dict[str, Metric]]:
        batch = micro_batch.batch if self.role == "reward" else micro_batch.local_batch()
        batch, reduce = batch.to(out.device), GroupSum(self.mesh.cp_group)
        shards = SequenceShards(batch.sequence_ids(), len(batch), reduce)
        read = self._read(micro_batch, out)
        share, metrics = loss(batch, *read, shards)
        if self.mesh.cp > 1:
            metrics["sequences/bytes_reduced"] = Sum(reduce.bytes)
        # a micro-batch without a trained token gives every parameter a gradient, and its backward every collective
        return share + 0.0 * read[0].sum(), metrics


def fp8_of(chunks: Sequence[Any], model: Model, spec: ModelSpec, mesh: Mesh) -> FP8Layers | TEFP8 | None:
    """What keeps FP8 in order in a built model, by its layer provider; None when the `model` section asks for none."""
    recipe = recipe_of(model)
    if recipe is None:
        return None
    kind = TEFP8 if choose(model).name == "te" else FP8Layers
    return kind(chunks, recipe, model, spec, mesh)


def batch_layout(spec: ModelSpec, cfg: Config, mesh: Mesh) -> BatchLayout:
    """How batches are shared out and packed for this model on this mesh."""
    recipe = recipe_of(cfg.model)
    rows = 1 if recipe is None else recipe.rows
    # Transformer Engine rounds each rank's part of the rows to FP8 and gathers that
    row_multiple = mesh.tp * rows if choose(cfg.model).name == "te" else math.lcm(mesh.tp, rows)
    return BatchLayout(
        dp=mesh.dp,
        dp_rank=mesh.dp_rank,
        cp=mesh.cp,
        cp_rank=mesh.cp_rank,
        row_multiple=row_multiple,
        count_multiple=mesh.pp if mesh.vpp else 1,
        attention=spec.attention_cost,
        equal_rows=spec.is_moe and cfg.parallel.dispatcher == "allgather",
    )


def _at_owned(micro_batch: MicroBatch, values: Tensor) -> Tensor:
    """[N]: `values` at the tokens that this rank scores, 0 elsewhere."""
    return values.new_zeros(micro_batch.batch.tokens.numel()).index_copy_(0, micro_batch.owned, values)


def _megatron_loss(loss: Tensor, metrics: dict[str, Metric], scale: int) -> tuple[Tensor, Tensor, dict[str, Metric]]:
    """The seam to Megatron's loss scaling: the only place that undoes it.

    `loss` is this micro-batch's share of the optimizer step's loss, with global denominators. Megatron divides by the
    token count it is given (1), by the number of micro-batches, and its gradient reduction by dp * cp; `scale` is the
    product of the last two.
    """
    return loss * scale, torch.ones((), dtype=torch.int, device=loss.device), metrics
