"""Many small experts against few large ones: a whole MoE layer, forward and backward, in turns on the same tokens.

    OMP_NUM_THREADS=1 .venv/bin/python tools/bench/experts.py

Every pair of layers has the same active parameters a token. One round times each layer of the pair once, on the same
micro-batch of random hidden states; the ratio is taken within a round, and the median over rounds is printed, as the
table that is in results/experts.md. With `--profile`, the operators of both layers instead.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time

import torch
from torch import Tensor, nn

from megarl import platform
from megarl.config.schema import Model, Parallel
from megarl.models.spec import ModelSpec, Rope
from megarl.parallel import Mesh

SPEC = ModelSpec("qwen3_moe", 1, 256, 4, 4, 64, 512, 128, 64, Rope(1e4, 64), 1e-6, False, qk_norm="head", moe_layers=(0,))
# hidden size, then (experts, top-k, width of an expert) of the few and of the many
PAIRS = [
    (256, (8, 2, 256), (128, 2, 256)),
    (256, (8, 2, 256), (128, 8, 64)),
    (512, (8, 2, 256), (128, 8, 64)),
    (512, (8, 8, 192), (128, 8, 192)),
    (2048, (8, 2, 3072), (128, 8, 768)),  # Qwen3-30B-A3B's own layer
]


def build_layer(mesh: Mesh, hidden: int, experts: int, top_k: int, width: int) -> nn.Module:
    """Megatron's MoE layer as megarl trains it, in Megatron's DDP with its gradient buffer; float32, random weights."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.spec_utils import build_module

    from megarl.models.build import _layer_spec, layers_of, transformer_config

    spec = dataclasses.replace(SPEC, hidden_size=hidden, num_experts=experts, top_k=top_k, moe_intermediate_size=width)
    config = transformer_config(spec, Model(path=""), mesh, Parallel())
    layer = build_module(_layer_spec(spec, True, layers_of("torch")).submodules.mlp, config=config)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.05)
    return DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), layer)


def step(layer: nn.Module, hidden: Tensor) -> float:
    """This process's CPU seconds of one forward and backward pass: what others do on the machine counts less."""
    start = time.process_time()
    out, _bias = layer(hidden)
    out.backward(hidden.detach())
    seconds = time.process_time() - start
    layer.zero_grad_buffer()
    hidden.grad = None
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="of one micro-batch")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--pair", type=int, help="this pair only, counted from 0")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    platform.setup()
    mesh = Mesh.build(Parallel())
    torch.manual_seed(0)
    if not args.profile:
        print("| hidden | few | many | few, us/token | many, us/token | ratio | lowest, highest |")
        print("|---|---|---|---|---|---|---|")
    for hidden, *shapes in PAIRS if args.pair is None else [PAIRS[args.pair]]:
        tokens = torch.randn(args.tokens, 1, hidden, device=platform.device(), requires_grad=True)
        few, many = (build_layer(mesh, hidden, *shape) for shape in shapes)
        if args.profile:
            for layer in (few, many):
                step(layer, tokens)
                with torch.profiler.profile(activities=platform.profiler_activities()) as profile:
                    step(layer, tokens)
                print(
                    profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=22, max_name_column_width=40)
                )
            continue
        times = [(step(few, tokens), step(many, tokens)) for _ in range(args.rounds + 1)][1:]  # the first warms up
        ratios = sorted(b / a for a, b in times)
        micro = [statistics.median(column) / args.tokens * 1e6 for column in zip(*times, strict=True)]
        names = [f"{e} x {w} wide, top-{k}" for e, k, w in shapes]
        print(
            f"| {hidden} | {names[0]} | {names[1]} | {micro[0]:.1f} | {micro[1]:.1f} "
            f"| {statistics.median(ratios):.2f} | {ratios[0]:.2f}, {ratios[-1]:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
