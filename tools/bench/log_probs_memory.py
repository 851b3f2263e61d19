"""Memory of log-probs and their gradients: `linear_log_probs` against logits that are all there at once.

    OMP_NUM_THREADS=2 .venv/bin/python tools/bench/log_probs_memory.py

Every case is a fresh process that makes hidden states and a weight, then log-probs, entropy and the gradients of both.
Its figure is the highest resident memory in that time above what it held before; in the backward pass, less the two
gradients it returns.
Prints the table that is in results/log_probs.md.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from types import SimpleNamespace

import torch
from torch import Tensor

from megarl import platform
from megarl.models.log_probs import linear_log_probs
from megarl.platform.host import host_memory

VOCAB, MIB = 151_936, 2**20
ALONE = SimpleNamespace(rank=lambda: 0, size=lambda: 1)  # the group of one rank
# way, tokens, MiB of a block; materialised logits of 8,192 tokens would need more than the machine has
CASES = [("blocks", 8192, 16), ("blocks", 8192, 256), ("blocks", 2048, 16), ("materialised", 2048, 0)]


def materialised(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    every = torch.nn.functional.linear(hidden, weight).log_softmax(-1)
    with torch.no_grad():
        entropy = -(every.exp() * every).sum(-1)
    return every.gather(1, targets[:, None])[:, 0], entropy


def measure(way: str, tokens: int, block: int, hidden_size: int) -> tuple[float, float]:
    """Peak MiB beyond inputs and gradients; seconds."""
    platform.setup()
    platform.set_threads()
    if block:
        platform.block_bytes = lambda: block * MIB
    torch.manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, requires_grad=True)
    weight = torch.randn(VOCAB, hidden_size).mul_(hidden_size**-0.5).requires_grad_()
    targets = torch.randint(VOCAB, (tokens,))
    torch.autograd.grad((hidden[:8] @ weight[:8].t()).sum(), hidden)  # the libraries' own memory
    before, start = host_memory()["rss"], time.perf_counter()
    if way == "blocks":
        log_probs, _entropy = linear_log_probs(hidden, weight, targets, VOCAB, ALONE)
    else:
        log_probs, _entropy = materialised(hidden, weight, targets)
    forward = host_memory()["peak_rss"] - before
    gradients = torch.autograd.grad(log_probs.sum(), (hidden, weight))
    seconds = time.perf_counter() - start
    returned = sum(g.numel() * g.element_size() for g in gradients) / 2**30
    return max(forward, host_memory()["peak_rss"] - before - returned) * 1024, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--case", nargs=3, help="one case, in this process: way, tokens, MiB of a block")
    args = parser.parse_args()
    if args.case:
        way, tokens, block = args.case[0], int(args.case[1]), int(args.case[2])
        print(*measure(way, tokens, block, args.hidden))
        return
    print("| logits | tokens | float32 logits of all tokens | extra peak | time |\n|---|---|---|---|---|")
    for way, tokens, block in CASES:
        case = [way, str(tokens), str(block), "--hidden", str(args.hidden)]
        done = subprocess.run([sys.executable, __file__, "--case", *case], check=True, capture_output=True, text=True)
        extra, seconds = map(float, done.stdout.split())
        name = f"blocks of {block} MiB" if block else "all at once"
        size = tokens * VOCAB * 4 / MIB
        print(f"| {name} | {tokens:,} | {size:,.0f} MiB | {extra:,.0f} MiB | {seconds:.1f} s |", flush=True)


if __name__ == "__main__":
    main()
