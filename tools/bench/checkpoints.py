"""Loading, export and conversion of checkpoints: seconds and memory.

python tools/bench/checkpoints.py make SHAPE DIR        writes a random checkpoint: 691m, 30b-a3b:LAYERS or 30b-a3b:LAYERS:fp8
python tools/bench/checkpoints.py measure DIR OUT       691m: load, stream to a null sink, export to disk, plain write
python tools/bench/checkpoints.py convert DIR OUT [LAYOUT]  there and back with `megarl convert`: peak memory of each rank
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from megarl import launcher, platform
from megarl.config.schema import Model, Parallel
from megarl.convert import family, load_hf, read_spec, save_hf, stream_hf
from megarl.convert.encodings import Fp8Blocks
from megarl.convert.hf_io import write_json
from megarl.convert.save import coded_tensors
from megarl.convert.writer import ShardedWriter

COMMON = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "dtype": "bfloat16", "hidden_act": "silu",
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "norm_topk_prob": True, "num_experts_per_tok": 8,
    "max_position_embeddings": 4096, "tie_word_embeddings": False,
}  # fmt: skip
SHAPES = {
    "tiny": dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4, head_dim=16,
                 intermediate_size=64, moe_intermediate_size=32, num_experts=8, vocab_size=256),
    "691m": dict(hidden_size=1024, num_hidden_layers=8, num_attention_heads=16, num_key_value_heads=4, head_dim=64,
                 intermediate_size=3072, moe_intermediate_size=384, num_experts=64, vocab_size=32000),
    "30b-a3b": dict(hidden_size=2048, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
                    intermediate_size=6144, moe_intermediate_size=768, num_experts=128, vocab_size=151936),
}  # fmt: skip
MIB = 2**20


def make(shape: str, folder: Path) -> None:
    """Random weights in the shape's files of at most 2 GiB, from one block of normal numbers read at odd places."""
    name, *more = shape.split(":")
    config = COMMON | SHAPES[name] | ({"num_hidden_layers": int(more[0])} if more else {})
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config)
    spec = read_spec(folder)
    shapes, blocks = family(spec.family).hf_shapes(spec), Fp8Blocks()
    coded = coded_tensors(spec) if "fp8" in more else set()
    plan = {}
    for tensor, size in shapes.items():
        plan[tensor] = (torch.float8_e4m3fn if tensor in coded else torch.bfloat16, size)
        if tensor in coded:
            plan[f"{tensor}_scale_inv"] = (torch.float32, blocks.scales(size))
    if coded:
        write_json(folder / "config.json", config | {"quantization_config": blocks.config(["lm_head"])})
    noise = torch.randn(8 * MIB + 1, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    writer, at = ShardedWriter(folder, plan), 0
    for tensor, (dtype, size) in plan.items():
        count = torch.Size(size).numel()
        at = (at + 7919) % (len(noise) // 2)
        numbers = noise[at:].repeat(count // (len(noise) - at) + 1)[:count].view(size)
        writer.add(tensor, numbers if dtype != torch.float8_e4m3fn else (numbers * 1000).to(dtype))
    writer.close()
    print(f"{folder}: {sum(torch.Size(s).numel() for s in shapes.values()) / 1e6:.0f}M parameters")


def resident() -> float:
    """MiB of this process now."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds, and peak MiB above what was resident before."""
    Path("/proc/self/clear_refs").write_text("5")
    before, start = resident(), time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    peak = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    return seconds, peak - before


def rank(folder: Path, out: Path) -> None:
    """One rank of `measure`."""
    from megarl.models.build import build_model
    from megarl.parallel import Mesh

    platform.setup()
    world = int(os.environ["WORLD_SIZE"])
    parallel = Parallel(ep=world)
    mesh, spec = Mesh.build(parallel), read_spec(folder)
    chunks = build_model(spec, Model(path=str(folder), dtype="bfloat16"), mesh, parallel)
    for parameter in chunks[0].parameters():  # memory that was never touched would count as the load's
        torch.nn.init.zeros_(parameter)
    rows: dict[str, list[tuple[float, float]]] = {"load": [], "stream": [], "export": [], "plain": []}
    for _ in range(3):
        mesh.barrier()
        rows["load"].append(timed(lambda: load_hf(folder, chunks, spec, mesh)))
        mesh.barrier()
        rows["stream"].append(timed(lambda: [tensor.shape for _, tensor in stream_hf(chunks, spec, mesh)] and None))
        mesh.barrier()
        rows["export"].append(timed(lambda: save_hf(out / "export", chunks, spec, mesh)))
        if mesh.is_main:
            rows["plain"].append(timed(lambda: plain_write(out / "plain", out / "export")))
        mesh.barrier()
    medians = {name: [statistics.median(s for s, _ in found), max(m for _, m in found)] for name, found in rows.items() if found}
    (out / f"{world}-{mesh.rank}.json").write_text(json.dumps(medians))


def plain_write(target: Path, export: Path) -> None:
    """The export's bytes, from one block in memory, in files of the same sizes, each synced."""
    block = memoryview(bytearray(16 * MIB))
    target.mkdir()
    for file in export.glob("*.safetensors"):
        left = file.stat().st_size
        with (target / file.name).open("wb", buffering=0) as stream:
            while left:
                left -= stream.write(block[:left])
            os.fsync(stream.fileno())
    shutil.rmtree(target)


def measure(folder: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    print("| ranks | what | seconds (median of 3) | peak MiB above the start (worst of 3, of ranks) |\n|---|---|---|---|")
    for world in (1, 2):
        command = [sys.executable, __file__, "rank", str(folder), str(out)]
        if launcher.launch(command, world, out / "logs", 5):
            raise SystemExit(1)
        found = [json.loads((out / f"{world}-{r}.json").read_text()) for r in range(world)]
        for name in found[0]:
            seconds = max(f[name][0] for f in found if name in f)
            peak = max(f[name][1] for f in found if name in f)
            print(f"| {'1' if world == 1 else 'EP2'} | {name} | {seconds:.2f} | {peak:.0f} |")


def convert(folder: Path, out: Path, layout: str) -> None:
    """There and back; memory above what converting a tiny model of the same kind takes: Python and its libraries."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "tiny").exists():
        make("tiny", out / "tiny")
    spec = read_spec(folder)
    layer = max(
        sum(torch.Size(size).numel() for rule in block for size in rule.hf_shapes(spec).values()) * 2 / MIB
        for block in family(spec.family).blocks(spec)
    )
    print(f"largest layer: {layer:.0f} MiB in bfloat16\n")
    print("| command | seconds | MiB written | peak MiB of each rank, above Python | of the largest layer |")
    print("|---|---|---|---|---|")
    for to in ("megatron", "hf"):
        base = converted(out / "tiny", out, to, layout)[2]
        seconds, written, peaks = converted(folder, out, to, layout)
        above = [peak - start for peak, start in zip(peaks, base)]
        shown = ", ".join(f"{peak:.0f}" for peak in above)
        print(f"| convert --to {to} {layout} | {seconds:.1f} | {written / MIB:.0f} | {shown} | {max(above) / layer:.2f} |")


def converted(folder: Path, out: Path, to: str, layout: str) -> tuple[float, int, list[float]]:
    """Seconds, bytes written, and peak MiB of each rank of one conversion."""
    megatron, hf = (out / f"{folder.name}-{kind}" for kind in ("megatron", "hf"))
    source, target = (folder, megatron) if to == "megatron" else (megatron, hf)
    shutil.rmtree(target, ignore_errors=True)
    arguments = ["convert", str(source), str(target), "--to", to, *(["--parallel", layout] if layout else [])]
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "megarl", *arguments], stdout=subprocess.DEVNULL)
    peaks: dict[int, float] = {}
    while process.poll() is None:
        for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            with contextlib.suppress(OSError, TypeError):
                if b"\0RANK=" in Path(f"/proc/{pid}/environ").read_bytes():
                    text = Path(f"/proc/{pid}/status").read_text()
                    peaks[int(pid)] = int(re.search(r"VmHWM:\s+(\d+)", text)[1]) / 1024
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(1)
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    return time.perf_counter() - start, size, [peaks[pid] for pid in sorted(peaks)]


if __name__ == "__main__":
    what, first, second, *rest = sys.argv[1:]
    if what == "make":
        make(first, Path(second))
    elif what == "measure":
        measure(Path(first), Path(second))
    elif what == "convert":
        convert(Path(first), Path(second), *(rest or [""]))
    else:
        rank(Path(first), Path(second))
