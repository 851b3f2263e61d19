"""What each rank runs for test_convert_layouts.py and, alone, for tests/unit/test_convert.py."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from megarl import platform
from megarl.config.schema import Model, Parallel
from megarl.parallel import Mesh

TOKENS = 24


def build(path: str, **degrees):
    """(chunks with the checkpoint loaded, spec, mesh)."""
    platform.setup()
    from megarl.convert import load_hf, read_spec
    from megarl.models.build import build_model

    spec = read_spec(path)
    parallel = Parallel(**degrees)
    mesh = Mesh.build(parallel)
    chunks = build_model(spec, Model(path=path), mesh, parallel)
    for chunk in chunks:
        for parameter in chunk.parameters():
            torch.nn.init.constant_(parameter, float("nan"))  # what load_hf leaves out is seen
    load_hf(path, chunks, spec, mesh)
    return chunks, spec, mesh


def tokens(vocab_size: int) -> Tensor:
    return torch.randint(0, vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(5))


def hidden_states(chunk, spec) -> Tensor:
    """What the last stage makes of the fixed token row `[1, TOKENS, H]`, and another one passes on."""
    from megarl.models.packing_params import PackedRow

    positions = torch.arange(TOKENS)
    documents = torch.tensor([0, TOKENS], dtype=torch.int32)
    row = PackedRow.build(documents, positions, spec.rope, windows=spec.windows)
    return chunk(tokens(spec.vocab_size), positions[None], None, packed_seq_params=row)


@torch.no_grad()
def logits(chunks, spec, mesh) -> Tensor:
    """[TOKENS, V] of the fixed token row; on a layout with pipeline stages, on the last one, zeros on the others."""
    from megarl.models.layers.lm_head import output_weight

    (chunk,) = chunks
    chunk.eval()
    neighbour = lambda step: dist.get_global_rank(mesh.pp_group, mesh.pp_rank + step)  # noqa: E731
    if mesh.pp_rank > 0:
        received = torch.empty(TOKENS // mesh.tp, 1, spec.hidden_size)
        dist.recv(received, neighbour(-1))
        chunk.set_input_tensor(received)
    hidden = hidden_states(chunk, spec)
    if not mesh.is_last_stage:
        dist.send(hidden.contiguous(), neighbour(1))
        return torch.zeros(TOKENS, spec.vocab_size)
    local = hidden[0] @ output_weight(chunk).t()
    parts = [torch.empty_like(local) for _ in range(mesh.tp)]
    dist.all_gather(parts, local, group=mesh.tp_group)
    return torch.cat(parts, dim=-1)[:, : spec.vocab_size]


def upstream(vocab_size: int) -> Tensor:
    """[TOKENS, V]: the gradient of the logits in comparisons of gradients."""
    return torch.randn(TOKENS, vocab_size, generator=torch.Generator().manual_seed(7))


def write_gradients(reference, folder) -> None:
    """The gradients of transformers' model, under the names of its checkpoint; its weights are lost."""
    (reference(tokens(reference.config.vocab_size)).logits[0] * upstream(reference.config.vocab_size)).sum().backward()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.copy_(parameter.grad)
    reference.save_pretrained(folder)


def gradient_gaps(chunks, spec, mesh, folder: str) -> dict[str, float]:
    """Name -> distance from transformers' gradient over its norm; on one process, or with tensor parallelism alone.

    Summed over ranks is what Megatron sums: by the marks on the parameters.
    """
    from megarl.convert import stream_gradients
    from megarl.models.layers.lm_head import output_weight

    (chunk,) = chunks
    weight = output_weight(chunk)
    padded = torch.nn.functional.pad(upstream(spec.vocab_size), (0, mesh.tp * len(weight) - spec.vocab_size))
    (hidden_states(chunk, spec)[0] @ weight.t() * padded.chunk(mesh.tp, dim=1)[mesh.tp_rank]).sum().backward()
    for parameter in chunk.parameters():
        if getattr(parameter, "sequence_parallel", False) or not getattr(parameter, "allreduce", True):
            dist.all_reduce(parameter.grad, group=mesh.tp_group)
        parameter.main_grad = parameter.grad
    expected = load_file(Path(folder) / "model.safetensors")
    found = {name: gradient.clone() for name, gradient in stream_gradients(chunks, spec, mesh)}
    assert set(found) == {name for name in expected if "e_score_correction_bias" not in name}
    for name in found:  # an expert may have no token
        assert expected[name].any() or ".experts." in name, name
    gaps = {name: (gradient - expected[name]).norm().item() for name, gradient in found.items()}
    return {name: gap / max(expected[name].norm().item(), 1e-12) for name, gap in gaps.items()}


def refusal(path: str, degrees: dict) -> list[str]:
    """The error of building a checkpoint's model on a layout, as (type, message)."""
    try:
        build(path, **degrees)
    except Exception as error:
        return [type(error).__name__, str(error)]
    return ["", "built"]


def round_trip(
    path: str, out: str, degrees: dict, expected_logits: str | None = None, expected_gradients: str | None = None
) -> dict:
    """Loads, streams on every rank, exports from rank 0, and says how far each result is from the file."""
    from megarl.convert import save_hf, stream_hf

    chunks, spec, mesh = build(path, **degrees)
    gap = None
    if expected_logits is not None:
        found = logits(chunks, spec, mesh)
        gap = (found - load_file(expected_logits)["logits"]).abs().max().item() if mesh.is_last_stage else 0.0
    save_hf(out, chunks, spec, mesh, extra_from=path)
    reference = load_file(Path(path) / "model.safetensors")
    streamed = {name: tensor.clone() for name, tensor in stream_hf(chunks, spec, mesh)}
    exported = load_file(Path(out) / "model.safetensors")
    padding = [
        tensor[max(0, spec.vocab_size - mesh.tp_rank * tensor.shape[0]) :].abs().sum().item()
        for chunk in chunks
        for name, tensor in chunk.named_parameters()
        if name in ("embedding.word_embeddings.weight", "output_layer.weight")
    ]
    return {
        "streamed_equal": same(streamed, reference),
        "exported_equal": same(exported, reference),
        "padding": padding,
        "logits_gap": gap,
        "gradient_gaps": gradient_gaps(chunks, spec, mesh, expected_gradients) if expected_gradients else {},
    }


def names(path: str, degrees: dict) -> list[str]:
    """The order in which this rank sees the tensors."""
    from megarl.convert import stream_hf

    return [name for name, _ in stream_hf(*build(path, **degrees))]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in b)


def there_and_back(path: str, folder: str, there: dict, back: dict) -> bool:
    """Hugging Face -> Megatron on one layout -> Hugging Face on another: are the weights the same bits?"""
    platform.setup()
    from megatron.core import parallel_state

    from megarl.learner.convert_checkpoint import convert_checkpoint

    convert_checkpoint(path, f"{folder}/megatron", "megatron", Parallel(**there))
    dist.barrier()
    parallel_state.destroy_model_parallel()
    convert_checkpoint(f"{folder}/megatron", f"{folder}/hf", "hf", Parallel(**back))
    dist.barrier()
    return same(load_file(f"{folder}/hf/model.safetensors"), load_file(f"{path}/model.safetensors"))


def export_into(path: str, out: str, degrees: dict) -> list[str]:
    """The error of an export on this rank, as (type, message)."""
    from megarl.convert import save_hf

    chunks, spec, mesh = build(path, **degrees)
    try:
        save_hf(out, chunks, spec, mesh)
    except Exception as error:
        return [type(error).__name__, str(error)]
    return []


def time_stream(path: str, degrees: dict, repeats: int = 5) -> dict:
    """Median seconds to stream the whole model and touch every tensor, and the growth of peak memory in MiB."""
    from megarl.convert import stream_hf

    chunks, spec, mesh = build(path, **degrees)
    before, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for _ in range(repeats):
        dist.barrier()
        start = time.perf_counter()
        count = sum(tensor.numel() for _, tensor in stream_hf(chunks, spec, mesh))
        seconds.append(time.perf_counter() - start)
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"seconds": sorted(seconds)[repeats // 2], "parameters": count, "growth_mib": growth}


def fail_on_rank_1(folder: str) -> None:
    """Rank 1 fails at once; rank 0 would wait for a minute."""
    rank = os.environ["RANK"]
    (Path(folder) / f"pid-{rank}").write_text(str(os.getpid()))
    if rank == "1":
        while not (Path(folder) / "pid-0").exists():
            time.sleep(0.01)
        raise RuntimeError("bad luck on rank 1")
    time.sleep(60)
