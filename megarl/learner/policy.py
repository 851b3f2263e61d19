"""`Policy`: one model of the learner, its optimizer, and the two passes everything else is made of."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megarl import platform
from megarl.config.schema import Config, Optimizer
from megarl.convert import load_hf, read_spec
from megarl.errors import BadInput
from megarl.learner.optimizer import build_optimizer, build_schedule
from megarl.metrics import Max, Mean, Metric, merge
from megarl.models.build import DTYPES, build_model, transformer_config
from megarl.models.layers.lm_head import output_weight
from megarl.models.log_probs import linear_log_probs
from megarl.models.packing_params import PackedRow
from megarl.models.spec import ModelSpec
from megarl.parallel import Mesh
from megarl.types import MicroBatch, SequenceShards

platform.setup()

from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.transformer.module import Float16Module  # noqa: E402
from megatron.core.utils import get_model_config  # noqa: E402

Role = Literal["policy", "reference", "critic", "reward"]
# (the micro-batch's tokens on the device, *what the role's output is read as, shards) -> its share of the step's loss,
# metrics. Between batch and shards stand, by role: log-probs [n] and entropy [n]; values [n] of a critic; scores [S] of
# a reward model.
LossFunction = Callable[..., tuple[Tensor, dict[str, Metric]]]
SCALAR_ROLES: tuple[Role, ...] = ("critic", "reward")


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did. `metrics` are this rank's, to be reduced once over all ranks."""

    applied: bool  # False: a gradient was not finite, and nothing was changed
    grad_norm: float  # before clipping, over all ranks
    metrics: dict[str, Metric]


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
    ) -> None:
        self.spec = spec = replace(spec, head="scalar" if role in SCALAR_ROLES else "lm")
        self.mesh, self.role = mesh, role
        self.temperature = temperature
        self.config = transformer_config(spec, cfg.model, mesh)
        dtype = DTYPES[cfg.model.dtype]
        self.modules = build_model(spec, cfg.model, mesh)  # what convert reads and writes
        chunks = [Float16Module(self.config, m) for m in self.modules] if dtype is torch.bfloat16 else self.modules
        self.optimizer = self.schedule = None
        if optimizer is not None:
            distributed = cfg.parallel.distributed_optimizer
            ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=distributed)
            chunks = [DistributedDataParallel(self.config, ddp, c) for c in chunks]
            self.optimizer = build_optimizer(optimizer, dtype, chunks, distributed)
            self.schedule = build_schedule(optimizer, self.optimizer, total_steps)
            config = get_model_config(chunks[0])
            config.finalize_model_grads_func = finalize_model_grads
            config.grad_scale_func = self.optimizer.scale_loss
        self.chunks = chunks
        self.updates = 0  # optimizer steps taken: the policy version
        self._run = get_forward_backward_func()

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
        load_hf(path, self.modules, self.spec, self.mesh)
        if self.optimizer is not None:
            self.optimizer.reload_model_params()

    def next_lr(self) -> float:
        """The learning rate of the next optimizer step."""
        return float(self.optimizer.param_groups[0]["lr"]) if self.optimizer.param_groups else 0.0

    def log_probs(
        self, micro_batches: Sequence[MicroBatch], temperature: float | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Log-probs and entropies `[n]` of each micro-batch's real tokens, on the CPU; empty off the last stage.

        Computed where `response_mask` is 1, and 0 elsewhere and at the first token of a sequence.
        The same packing and code path as `train_step`, so that before the first update the ratio is exactly 1.
        `temperature`: of the softmax, None: the one sampled with.
        """
        outputs = self._outputs(micro_batches, temperature)
        return [o[0] for o in outputs], [o[1] for o in outputs]

    def values(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        """Of a critic: the value `[n]` of the state before each real token, float32 on the CPU; empty off the last stage.

        Entry t is the head's output at t - 1, the shift of `log_probs`: entry 0, and the first token of any later
        sequence, mean nothing.
        """
        return [values for (values,) in self._outputs(micro_batches)]

    def scores(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        """Of a reward model: the head's output `[S]` at the last token of each sequence, float32 on the CPU.

        Empty off the last stage.
        """
        return [scores for (scores,) in self._outputs(micro_batches)]

    def train_step(self, micro_batches: Sequence[MicroBatch], loss: LossFunction) -> StepResult:
        """One optimizer step over this rank's micro-batches; every rank passes the same number of them.

        A step whose gradient norm is not finite on any rank changes nothing and says `applied=False`.
        """
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        scale = len(micro_batches) * self.mesh.dp * self.mesh.cp

        def wrapped(micro_batch: MicroBatch, out: Tensor) -> tuple[Tensor, Tensor, dict[str, Metric]]:
            return _megatron_loss(*self._loss(micro_batch, out, loss), scale)

        collected = self._forward_backward(micro_batches, wrapped, forward_only=False)
        lr = self.next_lr()
        applied, grad_norm = self._apply()
        metrics: dict[str, Metric] = {}
        if self.mesh.is_last_stage and self.mesh.tp_rank == 0:  # the other ranks would repeat the same numbers
            for item in collected:
                merge(metrics, item)
        own = {"grad_norm": Mean(grad_norm), "grad_norm_max": Max(grad_norm), "lr": Mean(lr)}
        metrics |= {f"{self.role}/{name}": metric for name, metric in own.items()}
        return StepResult(applied, grad_norm, metrics)

    def validate(self, micro_batches: Sequence[MicroBatch], loss: LossFunction) -> dict[str, Metric]:
        """The loss's metrics over this rank's micro-batches, without a gradient."""

        def wrapped(micro_batch: MicroBatch, out: Tensor) -> dict[str, Metric]:
            return self._loss(micro_batch, out, loss)[1]

        with self._evaluating(), torch.no_grad():
            collected = self._forward_backward(micro_batches, wrapped, forward_only=True, collect=True)
        metrics: dict[str, Metric] = {}
        if self.mesh.is_last_stage and self.mesh.tp_rank == 0:
            for item in collected:
                merge(metrics, item)
        return metrics

    def _apply(self) -> tuple[bool, float]:
        """Measure the gradient, check that it is finite on every rank, clip and step."""
        parts = getattr(self.optimizer, "chained_optimizers", [self.optimizer])
        overflow = self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        if self.mesh.any(overflow or not math.isfinite(grad_norm)):
            return False, grad_norm
        clip = self.optimizer.config.clip_grad
        for part in parts:
            parameters = [] if getattr(part, "is_stub_optimizer", False) else part.get_parameters()
            if clip > 0 and parameters:
                clip_grad_by_total_norm_fp32(parameters, max_norm=clip, total_norm=grad_norm)
        self.optimizer.step_with_ready_grads()
        self.schedule.step(1)
        self.updates += 1
        return True, grad_norm

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        for chunk in self.chunks:
            chunk.eval()
        yield

    def _forward_backward(
        self, micro_batches: Sequence[MicroBatch], last_stage: Callable, forward_only: bool, collect: bool = False
    ) -> list[Any]:
        """Megatron's schedule over this rank's micro-batches; `last_stage(micro_batch, out)` runs on the last one.

        `out` is what the head gives: `[1, n, H]` hidden states, or `[1, n, 1]`.
        """
        rows = [self._row(micro_batch) for micro_batch in micro_batches]

        def step(data: Iterator, model: Any) -> tuple[Tensor, Callable]:
            micro_batch, row = next(data)
            tokens = micro_batch.tokens.to(platform.device())[None]
            out = model(tokens, row.position_ids[None], None, packed_seq_params=row)
            if collect:
                return out, lambda out, non_loss_data=True: last_stage(micro_batch, out)
            return out, lambda out: last_stage(micro_batch, out)

        iterators = [iter(list(zip(micro_batches, rows, strict=True))) for _ in self.chunks]
        return self._run(
            forward_step_func=step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=len(micro_batches),
            seq_length=max(m.tokens.numel() for m in micro_batches),
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=collect,
        )

    def _row(self, micro_batch: MicroBatch) -> PackedRow:
        device = platform.device()
        return PackedRow.build(
            micro_batch.cu_seqlens.to(device),
            micro_batch.position_ids.to(device),
            self.spec.head_dim,
            self.spec.rope_theta,
        )

    @torch.no_grad()
    def _outputs(
        self, micro_batches: Sequence[MicroBatch], temperature: float | None = None
    ) -> list[tuple[Tensor, ...]]:
        """`_read` of each micro-batch, on the CPU; empty off the last stage."""

        def collected(micro_batch: MicroBatch, out: Tensor) -> tuple[Tensor, ...]:
            return tuple(tensor.cpu() for tensor in self._read(micro_batch, out, temperature))

        with self._evaluating():
            outputs = self._forward_backward(micro_batches, collected, forward_only=True, collect=True)
        return outputs if self.mesh.is_last_stage else []

    def _read(self, micro_batch: MicroBatch, out: Tensor, temperature: float | None = None) -> tuple[Tensor, ...]:
        """What a loss of this role gets of the head's output (padding cut off), differentiable.

        Log-probs and entropy `[n]`, 0 where `response_mask` is 0 and at first tokens; values `[n]`, each at the token
        its state comes before; or scores `[S]`.
        """
        real = micro_batch.batch.tokens.numel()
        if self.role in SCALAR_ROLES:
            numbers = out[0, :, 0]
            if self.role == "reward":
                return (numbers[micro_batch.batch.offsets()[1:].to(out.device) - 1],)
            return (torch.cat([numbers.new_zeros(1), numbers[:-1]])[:real],)
        weight = output_weight(self.modules[-1])
        wanted = (micro_batch.batch.response_mask > 0) & (micro_batch.position_ids[:real] > 0)
        index = wanted.nonzero()[:, 0].to(out.device)
        outputs = linear_log_probs(
            out[0, index - 1].to(weight.dtype),  # Megatron's wrapper made float32 of bfloat16
            weight,
            micro_batch.batch.tokens.to(out.device)[index],
            self.spec.vocab_size,
            self.mesh.tp_group,
            temperature or self.temperature,
        )
        return tuple(x.new_zeros(real).index_copy(0, index, x) for x in outputs)

    def _loss(self, micro_batch: MicroBatch, out: Tensor, loss: LossFunction) -> tuple[Tensor, dict[str, Metric]]:
        batch = micro_batch.batch.to(out.device)
        shards = SequenceShards(batch.sequence_ids(), len(batch))
        read = self._read(micro_batch, out)
        share, metrics = loss(batch, *read, shards)
        # a micro-batch without a trained token gives every parameter a gradient, and its backward every collective
        return share + 0.0 * read[0].sum(), metrics


def _megatron_loss(loss: Tensor, metrics: dict[str, Metric], scale: int) -> tuple[Tensor, Tensor, dict[str, Metric]]:
    """The seam to Megatron's loss scaling: the only place that undoes it.

    `loss` is this micro-batch's share of the optimizer step's loss, with global denominators. Megatron divides by the
    token count it is given (1), by the number of micro-batches, and its gradient reduction by dp * cp; `scale` is the
    product of the last two.
    """
    return loss * scale, torch.ones((), dtype=torch.int, device=loss.device), metrics
