"""Losses, gradients and advantages of this installation against a file of vectors.

A file in the format of the one beside this module: `inputs` (tensors [B, T] and [B]), `advantages` (vectors by name),
`vector_axes` and `cases`, each with its `axes`. A case is built from its axes alone, never from its name.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megarl.algorithms import (
    KL,
    Algorithm,
    Correction,
    Counts,
    LossInputs,
    Outcomes,
    ValueLoss,
    advantage,
    count,
    gate,
    group_filter,
    mismatch_weights,
    policy_loss,
    shaping,
    value_loss,
)
from megarl.errors import BadInput
from megarl.metrics import Metric
from megarl.types import SequenceShards

# (dtype, tolerance of the loss, of the gradient): the specification's
PRECISIONS = {"float64": (torch.float64, 1e-12, 1e-12), "float32": (torch.float32, 2e-7, 1e-7)}
VECTOR_TOLERANCE = 1e-12
GOLDEN = Path(__file__).with_name("golden.json")
CASE_AXES = {
    "policy": {
        "loss", "advantage", "ratio", "ratio_base", "gate", "aggregate", "n_seq", "fixed_length", "mask", "kl",
        "correction", "veto", "off_policy_sequence_mask",
    },
    "value": {"loss", "target", "clip", "aggregate", "n_seq", "fixed_length", "mask"},
}  # fmt: skip
KL_SETTINGS = ("estimator", "coef", "reference", "input_clamp", "output_clamp")
CORRECTION_SETTINGS = tuple(field.name for field in dataclasses.fields(Correction))
UNBUILDABLE = (ValueError, KeyError, TypeError, RuntimeError, IndexError, AttributeError)  # what wrong axes lead to


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison; `problem` instead of differences when the axes cannot be built here."""

    name: str
    precision: str
    loss: float = 0.0  # |difference|; of a vector, the largest entry's
    gradient: float | None = None
    problem: str | None = None
    ok: bool = True


class Vectors:
    """A file of vectors. Raises BadInput when it is not one."""

    def __init__(self, path: Path) -> None:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            self.cases, self.axes = content["cases"], content["vector_axes"]
            self.named, raw = content["advantages"], content["inputs"]
            for part in (self.cases, self.axes, self.named, raw):
                if not isinstance(part, dict):
                    raise TypeError(f"a {type(part).__name__} where names are expected")
            if not self.cases and not self.axes:
                raise ValueError("no cases and no vectors")
            self.inputs = {name: torch.tensor(value, dtype=torch.float64) for name, value in raw.items()}
            self.rows, self.columns = self.inputs["mask"].shape
        except (OSError, ValueError, KeyError, TypeError) as error:
            problem = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
            raise BadInput(f"{path}: not a file of vectors ({problem}); give one in golden.json's format") from None
        self.ids = torch.arange(self.rows).repeat_interleave(self.columns)

    def tensor(self, name: str) -> Tensor:
        """A named entry of `advantages` or `inputs`, float64."""
        if name in self.named:
            return torch.tensor(self.named[name], dtype=torch.float64)
        if name in self.inputs:
            return self.inputs[name]
        raise ValueError(f"{name} is neither in `advantages` nor in `inputs`")

    def mask(self, name: str) -> Tensor:
        """The trained tokens [B, T] of a `mask` axis."""
        base = self.inputs["mask"]
        if name == "response":
            return base
        if name == "drop-truncated":
            return base * (1 - self.inputs["truncated"])[:, None]
        if name == "kept-groups":
            kept = group_filter("dynamic-sampling")(self.inputs["reward"], self.inputs["group"].long())
            return base * torch.isin(self.inputs["group"].long(), kept)[:, None]
        raise ValueError(f"mask {name} is unknown; choose one of: response, drop-truncated, kept-groups")

    def outcomes(self, reward: str = "reward", kl_coef: float = 0.0) -> Outcomes:
        """What an estimator sees; `reward` is a sum of names, joined by +."""
        rewards = sum(self.tensor(part.strip()) for part in reward.split("+"))
        k1 = KL("k1", 1.0, "reward", None, None)(self.inputs["logp_old"], self.inputs["logp_ref"], None)
        return Outcomes(
            rewards,
            self.inputs["group"].long(),
            self.inputs["mask"].flatten(),
            self.ids,
            (kl_coef * k1).flatten() if kl_coef else None,
            self.inputs["value_old"].flatten() if "value_old" in self.inputs else None,
        )

    def vector(self, axes: dict[str, Any]) -> Tensor:
        """The vector that the axes describe. Raises ValueError for axes this installation does not know."""
        settings = dict(axes)
        if "shaping" in settings:
            return shaping(settings.pop("shaping"), **settings)(self.inputs["gen_len"], 0)
        if "filter" in settings:
            kept = group_filter(settings.pop("filter"), **settings)
            return kept(self.inputs["reward"], self.inputs["group"].long())
        outcomes = self.outcomes(settings.pop("reward", "reward"), settings.pop("kl_coef", 0.0))
        kind, output = settings.pop("estimator"), "advantages"
        if kind in ("gae", "return-to-go"):
            output = settings.pop("output", output)
            if output not in ("advantages", "returns", "whitened"):
                raise ValueError(f"output {output} is unknown; choose one of: advantages, returns, whitened")
            settings["whiten"] = output == "whitened"
        estimate = advantage(kind, **settings)(outcomes)
        found = estimate.returns if output == "returns" and estimate.returns is not None else estimate.advantages
        if kind in ("group", "leave-one-out"):
            return found  # [B]
        found = found.reshape(self.rows, -1).expand(-1, self.columns)
        return torch.where(self.inputs["mask"] > 0, found, 0.0)


def algorithm_of(axes: dict[str, Any]) -> Algorithm:
    """The algorithm of a policy case; its advantages are given, so the estimator is any. Raises ValueError."""
    kl, fix = axes["kl"], axes["correction"]
    return Algorithm(
        advantage=advantage("group"),
        ratio=axes["ratio"],
        gate=gate(**axes["gate"]),
        aggregate=axes["aggregate"],
        kl=None if kl is None else _loss_kl(kl),
        correction=None if fix is None else Correction(**_known("correction", fix, CORRECTION_SETTINGS)),
        veto=axes["veto"],
        off_policy_sequence_mask=axes["off_policy_sequence_mask"],
        ratio_base=axes["ratio_base"],
        n_seq=axes["n_seq"],
        fixed_length=axes["fixed_length"],
    )


def _loss_kl(axes: dict[str, Any]) -> KL:
    """A KL axis in the loss, without the coefficient's sign or its use judged."""
    _known("kl", axes, KL_SETTINGS)
    return KL(axes["estimator"], axes["coef"], "loss", axes["input_clamp"], axes["output_clamp"])


def _known(axis: str, given: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """`given`. Raises ValueError when it has a key that is not among `names`."""
    for name in given:
        if name not in names:
            raise ValueError(f"{axis} has no setting {name}; it has: {', '.join(names)}")
    return given


def policy_case(
    vectors: Vectors, axes: dict[str, Any], dtype: torch.dtype, parts: list[list[int]] | None = None
) -> tuple[Tensor, Tensor, dict[str, Metric]]:
    """Loss, gradient [B, T] with respect to the log-probs, and metrics; the sequences split into `parts`.

    Everything off the mask holds NaN. Metrics are those of the last part, and of the mismatch on the whole batch.
    """
    algorithm = algorithm_of(axes)
    mask = vectors.mask(axes["mask"])
    nan = torch.full_like(mask, float("nan"))
    given = vectors.tensor(axes["advantage"])
    given = given if given.dim() == 2 else given[:, None].expand_as(mask)
    fields = {
        "advantages": given,
        "old_log_probs": vectors.inputs["logp_old"],
        "rollout_log_probs": vectors.inputs["logp_rollout"],
    }
    if axes["kl"]:
        fields["ref_log_probs"] = vectors.tensor(axes["kl"]["reference"])
    fields = {name: x.where(mask > 0, nan).to(dtype) for name, x in fields.items()}
    log_probs = vectors.inputs["logp"].where(mask > 0, nan).to(dtype).requires_grad_()
    counted, mismatch_metrics = mask, {}
    if algorithm.needs_old_log_probs:
        whole = SequenceShards(vectors.ids, vectors.rows)
        old, rollout = fields["old_log_probs"].flatten(), fields["rollout_log_probs"].flatten()
        found = mismatch_weights(algorithm.correction, algorithm.veto, old, rollout, mask.flatten(), whole)
        fields["mismatch_weights"], mismatch_metrics = found.weights.reshape(mask.shape), found.metrics
        if algorithm.correction is not None and algorithm.correction.renormalise:
            counted = mask * (fields["mismatch_weights"] > 0)
    counts = Counts.from_tensor(count(counted.flatten(), vectors.ids, vectors.rows))
    loss, metrics = torch.zeros((), dtype=dtype), {}
    for part in parts or [list(range(vectors.rows))]:
        own = torch.arange(len(part)).repeat_interleave(vectors.columns)
        inputs = LossInputs(
            log_probs=log_probs[part].flatten(),
            token_weights=algorithm.token_weights(counted[part].flatten(), own, counts).to(dtype),
            mask=mask[part].flatten(),
            **{name: x[part].flatten() for name, x in fields.items()},
        )
        share, metrics = policy_loss(algorithm, inputs, SequenceShards(own, len(part)))
        loss = loss + share
    loss.backward()
    return loss.detach(), log_probs.grad, metrics | mismatch_metrics


def value_case(
    vectors: Vectors, axes: dict[str, Any], dtype: torch.dtype, parts: list[list[int]] | None = None
) -> tuple[Tensor, Tensor, dict[str, Metric]]:
    """The same for a case of the critic; the gradient is with respect to the new values."""
    mask = vectors.mask(axes["mask"])
    plain = Algorithm(
        advantage("group"), "token", gate("none"), axes["aggregate"],
        n_seq=axes.get("n_seq") or "all", fixed_length=axes.get("fixed_length"),
    )  # fmt: skip
    counts = Counts.from_tensor(count(mask.flatten(), vectors.ids, vectors.rows))
    values = vectors.inputs["value_new"].clone().to(dtype).requires_grad_()
    fields = [x.to(dtype) for x in (vectors.inputs["value_old"], vectors.tensor(axes["target"]))]
    loss, metrics = torch.zeros((), dtype=dtype), {}
    for part in parts or [list(range(vectors.rows))]:
        own = torch.arange(len(part)).repeat_interleave(vectors.columns)
        weights = plain.token_weights(mask[part].flatten(), own, counts).to(dtype)
        old, returns = (x[part].flatten() for x in fields)
        share, metrics = value_loss(
            ValueLoss(axes["clip"]), values[part].flatten(), old, returns, weights, mask[part].flatten()
        )
        loss = loss + share
    loss.backward()
    return loss.detach(), values.grad, metrics


CASES: dict[str, Callable[..., tuple[Tensor, Tensor, dict[str, Metric]]]] = {"policy": policy_case, "value": value_case}


def compare(path: Path) -> list[Row]:
    """Every case in both precisions, then every vector in float64. Raises BadInput when the file is not one of them."""
    vectors = Vectors(path)
    rows = [_case(vectors, name, case, kind) for name, case in vectors.cases.items() for kind in PRECISIONS]
    return rows + [_vector(vectors, name, axes) for name, axes in vectors.axes.items()]


def _case(vectors: Vectors, name: str, case: dict[str, Any], precision: str) -> Row:
    dtype, loss_tolerance, gradient_tolerance = PRECISIONS[precision]
    try:
        axes = case["axes"]
        if axes["loss"] not in CASES:
            raise ValueError(f"loss {axes['loss']} is unknown; choose one of: {', '.join(CASES)}")
        unknown = set(axes) - CASE_AXES[axes["loss"]]
        if unknown:
            raise ValueError(
                f"axis {sorted(unknown)[0]} is unknown; known: {', '.join(sorted(CASE_AXES[axes['loss']]))}"
            )
        loss, gradient, _ = CASES[axes["loss"]](vectors, axes, dtype)
        expected = torch.tensor(case["grad"], dtype=torch.float64)
        loss_gap = abs(loss.double().item() - case["loss"])
        gradient_gap = _largest_gap(gradient.double(), expected)
    except UNBUILDABLE as error:
        return Row(name, precision, problem=_problem(error), ok=False)
    ok = loss_gap <= loss_tolerance and gradient_gap <= gradient_tolerance  # a nan is neither
    return Row(name, precision, loss_gap, gradient_gap, ok=ok)


def _vector(vectors: Vectors, name: str, axes: dict[str, Any]) -> Row:
    try:
        gap = _largest_gap(vectors.vector(axes).double(), vectors.tensor(name))
    except UNBUILDABLE as error:
        return Row(name, "float64", problem=_problem(error), ok=False)
    return Row(name, "float64", gap, ok=gap <= VECTOR_TOLERANCE)


def _largest_gap(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return float("inf")
    return (found - expected).abs().max().item() if found.numel() else 0.0


def _problem(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"missing {text}" if isinstance(error, KeyError) else text


def render(rows: list[Row]) -> str:
    """A table: case, precision, loss difference, gradient difference, verdict."""
    width = max((len(row.name) for row in rows), default=4)
    lines = [f"{'case':<{width}}  precision  {'loss':>8}  {'gradient':>8}"]
    for row in rows:
        if row.problem:
            lines.append(f"{row.name:<{width}}  {row.precision}  cannot be built here: {row.problem}")
            continue
        gradient = "" if row.gradient is None else f"{row.gradient:.1e}"
        lines.append(
            f"{row.name:<{width}}  {row.precision:<9}  {row.loss:>8.1e}  {gradient:>8}  {'ok' if row.ok else 'DIFFERS'}"
        )
    bad = sum(not row.ok for row in rows)
    verdict = "all within tolerance" if not bad else f"{bad} not"
    return "\n".join([*lines, f"{len(rows)} comparisons: {verdict}"])
