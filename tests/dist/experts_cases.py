"""Run by the ranks of `test_experts.py`: one MoE layer in float64 against the definition, expert by expert."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megarl.config.schema import Model, Parallel
from megarl.models.spec import ModelSpec, Rope
from megarl.parallel import Mesh

TOKENS, HIDDEN, EXPERTS, TOP_K, WIDTH = 50, 16, 8, 2, 12
MOE = dict(num_experts=EXPERTS, top_k=TOP_K, moe_intermediate_size=WIDTH, moe_layers=(0,))
SPEC = ModelSpec("qwen3_moe", 1, HIDDEN, 2, 1, 8, 32, 64, 64, Rope(1e4, 8), 1e-6, False, "head", **MOE)


def dense(x: Tensor, router: Tensor, weight1: Tensor, weight2: Tensor) -> tuple[Tensor, Tensor]:
    """Every token through every expert, weighted with 0 where it was not sent; tokens of each expert."""
    top, chosen = (x @ router.t()).topk(TOP_K)
    gates = torch.zeros(len(x), EXPERTS, dtype=x.dtype).scatter(1, chosen, top.softmax(-1))
    gate, up = torch.einsum("th,epfh->petf", x, weight1)
    out = torch.einsum("etf,ehf->eth", F.silu(gate) * up, weight2)
    return torch.einsum("te,eth->th", gates, out), (gates > 0).sum(0)


def against_dense(ep: int, skewed: bool) -> dict[str, float]:
    """How far output and gradients are from the dense layer's; `empty`: experts here without a token; `here`: tokens.

    Skewed, every token of every rank goes to experts 0 and 1, and with `ep = 2` the second rank has none of them.
    """
    mesh = Mesh.build(Parallel(ep=ep))
    from megatron.core.transformer.spec_utils import build_module

    from megarl.models.build import _layer_spec, layers_of, transformer_config

    config = transformer_config(SPEC, Model(path="", dtype="float64"), mesh, Parallel(ep=ep))
    layer = build_module(_layer_spec(SPEC, True, layers_of("torch")).submodules.mlp, config=config)
    torch.manual_seed(0)  # the same on every rank
    x = torch.randn(ep * TOKENS, HIDDEN, dtype=torch.float64)
    x = x.abs() + 0.1 if skewed else x
    upstream = torch.randn_like(x)
    router = 0.1 * torch.randn(EXPERTS, HIDDEN, dtype=torch.float64)
    if skewed:
        router[:2] += 1.0
    weight1 = torch.randn(EXPERTS, 2, WIDTH, HIDDEN, dtype=torch.float64)
    weight2 = torch.randn(EXPERTS, HIDDEN, WIDTH, dtype=torch.float64)
    experts = slice(mesh.ep_rank * EXPERTS // ep, (mesh.ep_rank + 1) * EXPERTS // ep)
    rows = slice(mesh.ep_rank * TOKENS, (mesh.ep_rank + 1) * TOKENS)
    with torch.no_grad():
        layer.router.weight.copy_(router)
        layer.experts.weight1.copy_(weight1[experts])
        layer.experts.weight2.copy_(weight2[experts])

    own = x[rows, None].clone().requires_grad_()
    out, _bias = layer(own)
    out.backward(upstream[rows, None])
    everything = [tensor.requires_grad_() for tensor in (x, router, weight1, weight2)]
    expected, counts = dense(*everything)
    grad_x, _, grad1, grad2 = torch.autograd.grad(expected, everything, upstream)
    (grad_router,) = torch.autograd.grad(dense(x[rows], router, weight1, weight2)[0], router, upstream[rows])
    pairs = {
        "output": (out[:, 0], expected[rows]),
        "gradient of x": (own.grad[:, 0], grad_x[rows]),
        "gradient of the router": (layer.router.weight.grad, grad_router),
        "gradient of weight1": (layer.experts.weight1.grad, grad1[experts]),
        "gradient of weight2": (layer.experts.weight2.grad, grad2[experts]),
    }
    gaps = {name: float((a - b).abs().max().detach()) for name, (a, b) in pairs.items()}
    dist.barrier()
    return gaps | {"empty": int((counts[experts] == 0).sum()), "here": int(counts[experts].sum())}
