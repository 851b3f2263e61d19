"""Hugging Face -> Megatron: each rank reads the ranges its parameters need."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from megarl import platform
from megarl.config.schema import Parallel
from megarl.convert.encodings import QUANTISED, encoding_of
from megarl.convert.families import family
from megarl.convert.family import LAYER, OUTPUT
from megarl.convert.hf_io import read_config
from megarl.convert.reader import HFReader, check_names
from megarl.convert.rules import Rule, Shard
from megarl.convert.stacks import Stack, in_table_names, views
from megarl.errors import BadInput, RunFailed
from megarl.models.spec import ModelSpec

Unrounded = Callable[[Tensor, Tensor], None]  # (a quantised parameter, the numbers that were read for it)


def read_spec(path: str | Path) -> ModelSpec:
    """The architecture of a Hugging Face checkpoint folder.

    Raises BadInput for a missing or malformed config.json, an unsupported model_type, and every setting that would
    change the numbers and is not implemented.
    """
    where = str(Path(path) / "config.json")
    config = read_config(path)
    try:
        encoding_of(config, where)  # how the weights are stored is no part of the architecture
        config.pop(QUANTISED, None)
        return family(config.get("model_type"), where).read_config(config, where)
    except (TypeError, AttributeError, ValueError, KeyError, IndexError, ArithmeticError) as error:  # a value of a kind that
        line = " ".join(str(error).split())[:200]  # no config.json has: text for a number, a list for an object
        raise BadInput(f"{where}: malformed ({type(error).__name__}: {line}); restore the file") from None


@torch.no_grad()
def load_hf(
    path: str | Path, chunks: list[nn.Module], spec: ModelSpec, mesh, unrounded: Unrounded = lambda *_: None
) -> None:
    """Fills this rank's chunks from a checkpoint folder, converting to the parameters' dtype.

    Only the ranges this rank holds are read. A model with a scalar head takes all but the head from a language model
    and keeps its own. `unrounded` is told of every quantised parameter what it was rounded from. Raises BadInput when the
    files are damaged or do not fit `spec`.
    """
    reader, shard = open_weights(path, spec), Shard.of(mesh)
    scored = read_spec(path).head != spec.head
    for name, (rule, tensor) in matched(chunks, spec).items():
        if name == OUTPUT and scored:
            continue
        if tuple(tensor.shape) != rule.local_shape(spec, shard):
            raise RunFailed(
                f"load: {rule.megatron} has shape {list(tensor.shape)} in the learner where the {spec.family} table "
                f"expects {list(rule.local_shape(spec, shard))}"
            )
        load_parameter(reader, rule, spec, shard, tensor, unrounded)


def layout_problem(spec: ModelSpec, parallel: Parallel) -> str | None:
    """Why the model's weights cannot be cut as a layout says, in words; None: they can."""
    stages = parallel.pp * (parallel.vpp or 1)
    counts = {
        "attention heads over tp": (spec.num_heads, parallel.tp),
        "layers over pp x vpp": (spec.num_layers, stages if not parallel.first_stage_layers else 1),
        "experts over ep": (spec.num_experts, parallel.ep),
        "columns of an expert over etp": (spec.moe_intermediate_size, parallel.etp),
    }
    if parallel.tp % spec.num_kv_heads:  # otherwise each of them is on several ranks
        counts["key/value heads over tp"] = (spec.num_kv_heads, parallel.tp)
    if spec.expert_bias and parallel.etp > 1:
        return f"the experts of {spec.family} have biases, which etp = {parallel.etp} cannot share out"
    return next((f"{n} {what} = {by} do not divide" for what, (n, by) in counts.items() if n % by), None)


def open_weights(path: str | Path, spec: ModelSpec) -> HFReader:
    """The weights of a folder, once no tensor in it is unknown to the model. Raises BadInput."""
    table, reader = family(spec.family), HFReader(path)
    found = replace(spec, head=read_spec(path).head)
    ignored = ("rotary_emb.inv_freq", *(("lm_head.weight",) if spec.tie_embeddings else ()))
    check_names(reader, set(table.hf_shapes(found)), ignored, table.aside(found))
    return reader


@torch.no_grad()
def load_parameter(
    reader: HFReader,
    rule: Rule,
    spec: ModelSpec,
    shard: Shard,
    tensor: Tensor | Stack,
    unrounded: Unrounded = lambda *_: None,
) -> None:
    """Fills one parameter of a rank, of shape `rule.local_shape`. Raises BadInput when the files do not fit.

    A quantised one cannot be filled in parts: it is rounded from numbers read beside it, which `unrounded` gets too.
    """
    quantised = tensor.parts if isinstance(tensor, Stack) else [tensor]
    if platform.is_quantised(quantised[0]):
        numbers = [torch.empty(part.shape, dtype=part.dtype, device=part.device) for part in quantised]
        load_parameter(
            reader, rule, spec, shard, Stack(numbers, tensor.inner) if isinstance(tensor, Stack) else numbers[0]
        )
        for part, whole in zip(quantised, numbers, strict=True):
            part.copy_(whole)
            unrounded(part, whole)
        return
    regions = rule.regions(spec, shard)
    shapes = rule.hf_shapes(spec)
    for name in dict.fromkeys(region.hf_name for region in regions):  # of all experts, only this rank's
        reader.check(name, shapes[name])
    found = [(*view, region.hf_name) for region in regions for view in views(region, tensor)]
    if sum(view.numel() for view, _hf, _name in found) < tensor.numel():
        tensor.zero_()
    for view, hf, name in found:
        reader.read_into(view, name, hf)


def matched(
    chunks: list[nn.Module], spec: ModelSpec, gradients: bool = False
) -> dict[str, tuple[Rule, Tensor | Stack]]:
    """Every tensor of this rank's chunks that a checkpoint holds, with its rule, by its name with global layer numbers.

    Names and shapes are the tables', whatever the layer provider. Quantised parameters are themselves: `Readable` gives
    their numbers, `copy_` fills them. `gradients`: the main gradients of the parameters instead. Raises RunFailed for a
    parameter without a rule.
    """
    rules = {rule.megatron: rule for block in family(spec.family).blocks(spec) for rule in block}
    out = {}
    for chunk in chunks:
        while hasattr(chunk, "module"):
            chunk = chunk.module
        numbers = [layer.layer_number - 1 for layer in chunk.decoder.layers]
        parameters = [(name, p.main_grad if gradients else _weight(p)) for name, p in chunk.named_parameters()]
        for name, tensor in in_table_names(_numbered(parameters, numbers)):
            if name not in rules:
                raise RunFailed(f"conversion: no rule of the {spec.family} table names the parameter {name}")
            out[name] = (rules[name], tensor)
        buffers = [] if gradients else [(name, b) for name, b in chunk.named_buffers() if b is not None]
        out |= {name: (rules[name], buffer) for name, buffer in _numbered(buffers, numbers) if name in rules}
    return out


def _weight(parameter: nn.Parameter) -> Tensor:
    # `.data` of a quantised one is another, which shares its bytes but not the state of its copy by columns
    return parameter if platform.is_quantised(parameter) else parameter.data


def _numbered(tensors: list[tuple[str, Tensor]], numbers: list[int]) -> Iterator[tuple[str, Tensor]]:
    """`numbers`: the global ones of a chunk's layers."""
    for name, tensor in tensors:
        if name.startswith(LAYER):
            local, rest = name.removeprefix(LAYER).split(".", 1)
            name = f"{LAYER}{numbers[int(local)]}.{rest}"
        yield name, tensor


def validate_folder(path: str | Path) -> ModelSpec:
    """`read_spec`, and all weights are there with the right shapes. Raises BadInput."""
    spec, reader = read_spec(path), HFReader(path)
    for name, size in family(spec.family).hf_shapes(spec).items():
        reader.check(name, size)
    if not (Path(path) / "tokenizer_config.json").exists():
        raise BadInput(f"{path}: tokenizer_config.json is missing; save the tokenizer into this folder")
    return spec
