"""`megarl verify conversion`: a Hugging Face folder through the table and back, and its logits against transformers."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megarl import launcher, platform
from megarl.config.schema import Config, Model
from megarl.convert import family, read_spec, stream_hf
from megarl.convert.hf_io import read_json, write_json
from megarl.convert.load import layout_problem, load_parameter, open_weights
from megarl.convert.reader import HFReader
from megarl.convert.rules import Rule, Shard
from megarl.errors import BadInput, RunFailed
from megarl.models.spec import ModelSpec
from megarl.verify.layouts.model import shrink, write_checkpoint
from megarl.verify.layouts.names import Layout, parse

DEFAULT = ("one", "tp2", "pp2", "ep2", "etp2")
TOLERANCE = 1e-5  # of logits and log-probs in float32, times the largest logit where that is above 1
SEQUENCES, TOKENS = 4, 24
COMMAND = (sys.executable, "-m", "megarl")
ROOM = 0.6  # of the free memory that a model may take to be run as it is


def verify_conversion(folder: Path, names: Sequence[str], nproc: int) -> None:
    """Prints a line a check. Raises BadInput for a damaged folder or an impossible layout, RunFailed for a difference.

    The weights of `folder` go, a layer at a time, into every rank's shard of each layout and back, without a model. A
    model that fits into memory is then loaded on ranks of each layout, streamed back, and its log-probs of random
    tokens compared with those of transformers; of a larger one, a small copy with random weights.
    """
    spec = read_spec(folder)
    layouts = _chosen(names, spec, nproc)
    reader = open_weights(folder, spec)
    for name, size in family(spec.family).hf_shapes(spec).items():
        reader.check(name, size)
    print(f"{folder}: {spec.family}, {spec.num_layers} layers, {len(reader.tensors)} tensors, all known", flush=True)
    for layout in layouts:
        count, size = round_trip(reader, spec, layout)
        print(f"{layout.name:<10} {count} tensors, {size / 2**20:.0f} MiB through the table and back: the same bytes", flush=True)
    if spec.head == "scalar":
        print("a reward model: no logits to compare")
        return
    work = Path(tempfile.mkdtemp(prefix="megarl-conversion-"))
    model = folder.resolve()
    if _bytes(spec) > ROOM * psutil.virtual_memory().available:
        spec, model = shrink(spec), work / "model"
        write_checkpoint(model, spec, seed=0)
        print(f"too large for this machine's memory: logits of a copy with {spec.num_layers} layers of width {spec.hidden_size}")
    write_json(work / "job.json", {"model": str(model)})
    failed = _run(work, "transformers")
    for layout in [] if failed else layouts:
        failed += _run(work, layout.name)
    if failed:
        raise RunFailed(f"verify conversion: {'; '.join(failed)} (more in {work})")
    shutil.rmtree(work)


def _chosen(names: Sequence[str], spec: ModelSpec, nproc: int) -> list[Layout]:
    out = []
    for layout in map(parse, names or DEFAULT):
        reason = layout_problem(spec, layout.parallel())
        if layout.world > nproc:
            reason = f"needs {layout.world} processes; set --nproc {layout.world}"
        elif layout.has_experts and not spec.is_moe:
            reason = "the model has no experts; leave it out"
        if reason is None:
            out.append(layout)
        elif names:
            raise BadInput(f"--layouts {layout.name}: {reason}")
    return out


def _bytes(spec: ModelSpec) -> int:
    """Of the weights in float32."""
    return 4 * sum(torch.Size(size).numel() for size in family(spec.family).hf_shapes(spec).values())


def round_trip(reader: HFReader, spec: ModelSpec, layout: Layout) -> tuple[int, int]:
    """Each tensor of a folder through every rank's shard and back: how many, and their bytes. Raises RunFailed.

    Nothing but one parameter and the tensors it is made of is in memory.
    """
    degrees = {name: layout.degrees.get(name, 1) for name in ("tp", "ep", "etp")}
    count = size = 0
    for rule in (rule for block in family(spec.family).blocks(spec) for rule in block if rule.exported):
        wanted = {name: reader.read(name, tuple(slice(0, n) for n in shape)) for name, shape in rule.hf_shapes(spec).items()}
        found = dict(_back(reader, rule, spec, Shard(**degrees), {name: tensor.dtype for name, tensor in wanted.items()}))
        for name, tensor in wanted.items():
            if not same_bytes(tensor, found[name]):
                raise RunFailed(f"verify conversion: {name} is not the same after {layout.name} and back")
            count, size = count + 1, size + tensor.nbytes
    return count, size


def _back(
    reader: HFReader, rule: Rule, spec: ModelSpec, shard: Shard, dtypes: dict[str, torch.dtype]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a rule as all ranks' parameters give them back; what no rank holds is nan."""
    dtype = next(iter(dtypes.values()))
    out = {name: torch.full(shape, torch.nan, dtype=dtype) for name, shape in rule.hf_shapes(spec).items()}
    for member in shard.members(rule.group):
        parameter = torch.full(rule.local_shape(spec, member), torch.nan, dtype=dtype)
        load_parameter(reader, rule, spec, member, parameter)
        for region in rule.regions(spec, member):
            part = out[region.hf_name][region.hf]
            part.copy_(region.of(parameter).reshape(part.shape))
    yield from out.items()


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Equal in dtype, shape and every bit: 0 is not -0, and one nan is another only if it is the same."""
    flat = lambda x: x.contiguous().reshape(-1).view(torch.uint8)  # noqa: E731
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(flat(a), flat(b))


def _run(work: Path, name: str) -> list[str]:
    """Prints the result of a layout's ranks, or of transformers; what is wrong with it, if anything."""
    world = 1 if name == "transformers" else parse(name).world
    code = launcher.launch([*COMMAND, "verify", "conversion-rank", str(work), name], world, work / "logs" / name, 2)
    if code in (129, 130, 143):
        raise SystemExit(code)
    if code:
        return [f"{name}: ended with code {code}"]
    result = read_json(work / f"{name}.json", f"look into {work / 'logs' / name}")
    print(f"{name:<10} {result['says']}", flush=True)
    return [f"{name}: {problem}" for problem in result["problems"]]


def run_rank(work: Path, name: str) -> None:
    """What a rank of a layout does, or the one process of transformers: WORK/<name>.json."""
    model = read_json(work / "job.json", "start `megarl verify conversion` again")["model"]
    if name == "transformers":
        write_json(work / f"{name}.json", _reference(work, model))
        return
    result = _compare(work, model, parse(name))
    if result is not None:
        write_json(work / f"{name}.json", result)


def _tokens(vocab_size: int) -> Tensor:
    return torch.randint(0, vocab_size, (SEQUENCES, TOKENS), generator=torch.Generator().manual_seed(0))


def _reference(work: Path, model: str) -> dict[str, Any]:
    """transformers' own logits, of its own code only."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager", use_safetensors=True, trust_remote_code=False
    )
    with torch.no_grad():
        logits = theirs.eval()(_tokens(read_spec(model).vocab_size)).logits
    save_file({"logits": logits.contiguous()}, work / "logits.safetensors")
    problems = [] if logits.isfinite().all() else ["its logits are not finite"]
    return {"says": f"{tuple(logits.shape)} logits, {logits.std():.2f} wide", "problems": problems}


def _compare(work: Path, model: str, layout: Layout) -> dict[str, Any] | None:
    """A layout's log-probs and weights against transformers and the file; None on all ranks but the first."""
    from megarl.learner.policy import Policy
    from megarl.learner.probes import probe_log_probs
    from megarl.parallel import Mesh

    cfg = Config(model=Model(path=model, dtype="float32"), parallel=layout.parallel())
    mesh = Mesh.build(cfg.parallel)
    policy = Policy.from_hf(model, cfg, mesh)
    tokens = _tokens(policy.spec.vocab_size)
    logits = load_file(work / "logits.safetensors")["logits"]
    wanted = logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    found = torch.stack([torch.from_numpy(row)[1:] for row in probe_log_probs(policy, tokens.tolist())])
    gaps = {"log-probs": (found - wanted).abs().max().item()}
    if mesh.world_size == 1:
        gaps["logits"] = max((_logits(policy, row) - theirs).abs().max().item() for row, theirs in zip(tokens, logits))
    bound = TOLERANCE * max(1.0, logits.abs().max().item())
    problems = [f"{what} differ by {gap:.1e}, more than {bound:.0e}" for what, gap in gaps.items() if not gap <= bound]
    changed = _changed(HFReader(model), stream_hf(policy.modules, policy.spec, mesh))
    problems += [f"{changed[0]} and {len(changed) - 1} more tensors come back changed"] if changed else []
    said = ", ".join(f"{what} within {gap:.1e}" for what, gap in gaps.items())
    says = f"{layout.world} ranks: {said} of transformers (at most {bound:.0e}); the same bytes streamed back"
    everyone = sorted({problem for found in mesh.all_gather_object(problems) for problem in found})
    return {"says": says if not everyone else f"FAIL: {'; '.join(everyone)}", "problems": everyone} if mesh.is_main else None


def _changed(reader: HFReader, streamed: Iterator[tuple[str, Tensor]]) -> list[str]:
    """Names of the tensors that are not in the file as they came out of a float32 learner."""
    out = []
    for name, tensor in streamed:
        stored = reader.read(name, tuple(slice(0, n) for n in tensor.shape))
        if not same_bytes(tensor.cpu().to(stored.dtype), stored):
            out.append(name)
    return out


@torch.no_grad()
def _logits(policy: Any, tokens: Tensor) -> Tensor:
    """[n, V] of one sequence, in one process."""
    from megarl.models.layers.lm_head import output_weight
    from megarl.models.packing_params import PackedRow

    (chunk,) = policy.modules
    while hasattr(chunk, "module"):
        chunk = chunk.module
    tokens, positions = tokens.to(platform.device()), torch.arange(len(tokens), device=platform.device())
    documents, spec = positions.new_tensor([0, len(tokens)], dtype=torch.int32), policy.spec
    row = PackedRow.build(documents, positions, spec.rope, windows=spec.windows)
    hidden = chunk.eval()(tokens[None], positions[None], None, packed_seq_params=row)
    return (hidden[0] @ output_weight(chunk).t())[:, : policy.spec.vocab_size].cpu()
