"""The micro-batches of an optimizer step that failed, kept so that it can be looked at and run again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from megarl.errors import BadInput
from megarl.types import Batch, MicroBatch

PACKING = ("tokens", "position_ids", "cu_seqlens", "targets", "last_rows")  # every micro-batch has them
REPLAY = "experts"  # only where routing is replayed


def save_micro_batches(path: Path, micro_batches: Sequence[MicroBatch], role: str = "policy") -> None:
    """Write every tensor of one rank's micro-batches as safetensors; the file appears whole.

    `role`: whose optimizer step it was: policy, critic or reward.
    """
    tensors: dict[str, Tensor] = {}
    for number, micro in enumerate(micro_batches):
        tensors |= {f"{number}.{name}": getattr(micro, name) for name in PACKING}
        tensors |= {} if micro.experts is None else {f"{number}.{REPLAY}": micro.experts}
        values = {item.name: getattr(micro.batch, item.name) for item in fields(Batch)}
        tensors |= {f"{number}.batch.{name}": value for name, value in values.items() if value is not None}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    whole = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    save_file(whole, partial, metadata={"role": role})
    partial.replace(path)


def role_of(path: Path) -> str:
    """Whose optimizer step the micro-batches are of: policy, critic or reward. Raises BadInput when the file says none."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata()["role"]
    except (OSError, KeyError, TypeError, SafetensorError) as error:
        raise BadInput(f"{path}: holds no micro-batches ({' '.join(str(error).split())[:100]})") from None


def load_micro_batches(path: Path) -> list[MicroBatch]:
    """The inverse of `save_micro_batches`. Raises BadInput when the file is not one of them."""
    try:
        tensors = load_file(path)
        count = 1 + max(int(name.split(".")[0]) for name in tensors)
        names = [item.name for item in fields(Batch)]
        return [
            MicroBatch(
                Batch(**{name: tensors.get(f"{number}.batch.{name}") for name in names}),
                *(tensors[f"{number}.{name}"] for name in PACKING),
                tensors.get(f"{number}.{REPLAY}"),
            )
            for number in range(count)
        ]
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise BadInput(f"{path}: holds no micro-batches ({' '.join(str(error).split())[:100]})") from None
