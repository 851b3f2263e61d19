"""Export of a sharded model to a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Callable, Set
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megarl.convert.encodings import QUANTISED, Fp8Blocks
from megarl.convert.families import family
from megarl.convert.family import LAYER
from megarl.convert.hf_io import (
    INDEX,
    SINGLE,
    copy_side_files,
    new_folder,
    one_line,
    pad_token_id,
    read_config,
    write_json,
)
from megarl.convert.load import matched, read_spec
from megarl.convert.reader import DTYPES, HFReader
from megarl.convert.stream import Weights, hf_dtypes, stream_weights
from megarl.convert.writer import Layout, ShardedWriter
from megarl.errors import BadInput, RunFailed
from megarl.models.spec import ModelSpec

FP8 = "fp8"  # as the dtype of an export: blocks of e4m3, what is no product in bfloat16
ASIDE = "aside.safetensors"  # beside the config.json of a Megatron checkpoint: tensors the learner has no use for


@dataclass(frozen=True)
class Export:
    """How a model is written: everything but its weights.

    `dtype`: a precision of torch, "fp8" (block-wise), or none: the learner's. `extra_from`: the folder whose
    config.json, tokenizer and other files go along, and the tensors the learner has no use for; of a reward model: the
    language model it was made from, or itself; none: only a config.json made from the spec. `settings`: see
    `new_folder`. `start` is told the bytes that will be written, `on_bytes` those that were.
    """

    dtype: str | torch.dtype | None = None
    extra_from: str | Path | None = None
    max_file_bytes: int = 2 << 30
    settings: dict[str, Any] | None = None
    start: Callable[[int], None] = lambda total: None
    on_bytes: Callable[[int], None] = lambda count: None


def save_hf(
    out_dir: str | Path,
    chunks: list[nn.Module],
    spec: ModelSpec,
    mesh,
    dtype: str | torch.dtype | None = None,
    extra_from: str | Path | None = None,
    max_file_bytes: int = 2 << 30,
) -> None:
    """Writes the model as a folder that transformers and vLLM load. Collective; rank 0 writes.

    See `Export` for the arguments and `export_weights` for the rest.
    """
    weights = Weights.of({name: tensor for name, (_, tensor) in matched(chunks, spec).items()})
    export_weights(out_dir, weights, spec, mesh, Export(dtype, extra_from, max_file_bytes))


def export_weights(out_dir: str | Path, weights: Weights, spec: ModelSpec, mesh, export: Export) -> None:
    """Writes weights as a Hugging Face folder, tensor by tensor as they come. Collective; rank 0 writes.

    The folder appears whole or not at all, in one rename; an earlier export at the same place is replaced. Raises
    BadInput (on every rank) when `out_dir` holds something that is not an export or cannot be written, RunFailed when
    writing fails on the way.
    """
    dtypes = hf_dtypes(weights, spec, mesh)
    files, problem = None, None
    with ExitStack() as stack:
        if mesh.is_main:
            problem, files = _attempt(lambda: _Files.open(Path(out_dir), spec, dtypes, export, stack))
        skip = _agree(problem, mesh, files.finished() if files else None)
        # After a failed write the stream still runs to its end, so that no rank waits in a collective.
        for name, tensor in stream_weights(weights, spec, mesh, skip):
            if files is not None and problem is None:
                problem, _ = _attempt(lambda name=name, tensor=tensor: files.add(name, tensor))
            del tensor  # before the next ones come
        if files is not None and problem is None:
            problem, _ = _attempt(lambda: files.finish(stack))
        _agree(problem, mesh)


@dataclass
class _Files:
    """Rank 0's side of an export."""

    folder: Path
    spec: ModelSpec
    export: Export
    writer: ShardedWriter
    dtype: torch.dtype  # of most numbers
    aside: dict[str, Layout]
    coded: set[str] = field(default_factory=set)  # tensors written in blocks of e4m3
    blocks = Fp8Blocks()

    @classmethod
    def open(cls, out: Path, spec: ModelSpec, dtypes: dict[str, torch.dtype], export: Export, stack: ExitStack) -> _Files:
        if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or (out / "config.json").exists())):
            raise BadInput(f"{out}: exists and is not an earlier export; give another folder")
        source = export.extra_from
        if source is not None and replace(read_spec(source), head=spec.head) != spec:
            raise BadInput(f"{source}/config.json: describes another model than the one to export; give its own folder")
        coded = coded_tensors(spec) if export.dtype == FP8 else set()
        shapes, plan, kept = family(spec.family).hf_shapes(spec), {}, family(spec.family).own_dtypes(spec)
        for name, learner in dtypes.items():
            dtype = learner if name in kept else _target(export.dtype, learner)
            if name in coded:
                weight, scale = cls.blocks.parts(name)
                plan[weight] = (torch.float8_e4m3fn, shapes[name])
                plan[scale] = (torch.float32, cls.blocks.scales(shapes[name]))
            else:
                plan[name] = (dtype, shapes[name])
        aside = aside_layouts(source, spec, keep_codes=bool(coded)) if source is not None else {}
        folder = stack.enter_context(new_folder(out, export.settings))
        export.start(sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in (plan | aside).values()))
        writer = ShardedWriter(folder, plan | aside, export.max_file_bytes, on_bytes=export.on_bytes)
        main = _target(export.dtype, next(iter(dtypes.values())))
        return cls(folder, spec, export, writer, main, aside, coded)

    def finished(self) -> set[str]:
        """Names of the model's tensors that are in complete files of an earlier attempt."""
        names = family(self.spec.family).hf_shapes(self.spec)
        parts = {name: self.blocks.parts(name) if name in self.coded else (name,) for name in names}
        return {name for name in names if all(part in self.writer.finished for part in parts[name])}

    def add(self, name: str, tensor: Tensor) -> None:
        if name not in self.coded:
            self.writer.add(name, tensor)
            return
        weight, scale = self.blocks.parts(name)
        step = self.blocks.block[0]
        for first, codes, factors in self.blocks.encode(tensor.detach().cpu()):
            last = first + len(codes) == len(tensor)
            self.writer.add_rows(weight, first, codes, last)
            self.writer.add_rows(scale, first // step, factors, last)

    def finish(self, stack: ExitStack) -> None:
        source, spec = self.export.extra_from, self.spec
        if self.aside:
            reader = HFReader(source, ASIDE if (Path(source) / ASIDE).exists() else None)
            for name, layout in self.aside.items():
                tensor = reader.stored(name) if reader_layout(reader, name) == layout else read_whole(reader, name)
                self.writer.add(name, tensor)
        self.writer.close()
        table = family(spec.family)
        config = table.write_config(spec) if source is None else table.implied() | read_config(source)
        if source is not None:
            if spec.head == "scalar":
                config |= table.scorer_config() | {"pad_token_id": pad_token_id(source)}
            copy_side_files(source, self.folder)
        config.pop(QUANTISED, None)
        if self.coded:
            config[QUANTISED] = self.blocks.config(plain_modules(spec, self.coded, self.aside))
        write_json(self.folder / "config.json", with_dtype(config, self.dtype))
        stack.close()


def _target(wanted: str | torch.dtype | None, learner: torch.dtype) -> torch.dtype:
    if wanted is None or not learner.is_floating_point:
        return learner
    if wanted == FP8:
        return torch.bfloat16
    return getattr(torch, wanted) if isinstance(wanted, str) else wanted


def coded_tensors(spec: ModelSpec) -> set[str]:
    """The tensors of an fp8 export that are stored in blocks: matrices of the layers' products, not the router's."""
    out = set()
    for block in family(spec.family).blocks(spec):
        for rule in block:
            product = ".linear_" in rule.megatron or ".experts." in rule.megatron
            if rule.exported and product and rule.megatron.startswith(LAYER):
                out |= {name for name, size in rule.hf_shapes(spec).items() if len(size) == 2}
    return out


def plain_modules(spec: ModelSpec, coded: Set[str], aside: dict[str, Layout]) -> list[str]:
    """Modules with a matrix that an fp8 export leaves as plain floats."""
    shapes = family(spec.family).hf_shapes(spec) | {name: shape for name, (dtype, shape) in aside.items() if dtype.itemsize > 1}
    plain = [name for name, size in shapes.items() if len(size) == 2 and name not in coded and name.endswith(".weight")]
    return [name.removesuffix(".weight") for name in plain]


def aside_layouts(folder: str | Path, spec: ModelSpec, keep_codes: bool = True) -> dict[str, Layout]:
    """The tensors in a folder that the learner has no use for and an export writes back: name -> dtype and shape.

    `keep_codes`: as they are stored; otherwise encoded ones as the floats they stand for.
    """
    prefixes, folder = family(spec.family).aside(spec), Path(folder)
    if not prefixes or not any((folder / name).exists() for name in (ASIDE, SINGLE, INDEX)):
        return {}
    reader = HFReader(folder, ASIDE if (folder / ASIDE).exists() else None)
    out = {name: reader_layout(reader, name) for name in reader.tensors if name.startswith(prefixes)}
    if not keep_codes:
        for name in [name for name in out if reader.encoded(name)]:
            shape = reader.encoding.shape(reader, name)
            for part in reader.parts(name):
                out.pop(part)
            out[name] = (torch.bfloat16, shape)
    return out


def reader_layout(reader: HFReader, name: str) -> Layout:
    """Dtype and shape of a stored tensor."""
    return DTYPES[reader.tensors[name].dtype], reader.tensors[name].shape


def read_whole(reader: HFReader, name: str) -> Tensor:
    """An encoded tensor as floats."""
    return reader.read(name, tuple(slice(0, n) for n in reader.encoding.shape(reader, name)))


def copy_aside(source: Path, folder: Path, spec: ModelSpec) -> list[str]:
    """Writes `ASIDE` into `folder`, byte by byte as in `source`; the names of its tensors."""
    layouts = aside_layouts(source, spec)
    if layouts:
        reader = HFReader(source)
        writer = ShardedWriter(folder, layouts, name=ASIDE)
        for name in layouts:
            writer.add(name, reader.stored(name))
        writer.close()
    return list(layouts)


def with_dtype(config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """config.json naming the precision of the weights beside it, in the form it already uses."""
    name = str(dtype).removeprefix("torch.")
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    return config | dict.fromkeys(keys, name)


def _attempt(action: Callable[[], Any]) -> tuple[Exception | None, Any]:
    try:
        return None, action()
    except (BadInput, RunFailed) as error:
        return error, None
    except OSError as error:
        return RunFailed(f"writing the checkpoint failed ({one_line(error)}); free some space or give another folder"), None


def _agree(problem: Exception | None, mesh, found: Any = None) -> Any:
    """Every rank raises what rank 0 met, or gets what it found."""
    problem, found = mesh.broadcast_object((problem, found), src=0)
    if problem is not None:
        raise problem
    return found


def on_main(action: Callable[[], Any], mesh) -> Any:
    """What `action` returns on rank 0, which alone runs it, or BadInput or RunFailed: on every rank. Collective."""
    problem, found = _attempt(action) if mesh.is_main else (None, None)
    return _agree(problem, mesh, found)
