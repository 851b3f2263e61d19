"""Transformer Engine's parameter names and one tensor an expert, against the tables' names and stacked experts."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch

import megarl
from megarl.convert.families import family
from megarl.convert.rules import Shard
from megarl.convert.stacks import NORMS, Stack, in_table_names, stretch, views
from megarl.models.spec import ModelSpec, Rope

COMMON = dict(
    num_layers=2, hidden_size=16, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=24, vocab_size=40,
    max_position_embeddings=64, rope=Rope(1e4, 8), norm_eps=1e-5, tie_embeddings=False, num_experts=4, top_k=2,
    moe_intermediate_size=12,
)  # fmt: skip
SPECS = [
    ModelSpec("qwen3_moe", **COMMON, qk_norm="head", moe_layers=(1,)),
    ModelSpec("gpt_oss", **COMMON, moe_layers=(0, 1), expert_bias=True, router_bias=True, sinks=True, qkv_bias=True),
]
SHARDS = [Shard(), Shard(tp=2, ep=2, tp_rank=1, ep_rank=1)]


def tables(spec: ModelSpec, shard: Shard) -> dict[str, tuple]:
    """Name -> (rule, random tensor of this rank)."""
    torch.manual_seed(0)
    rules = [rule for block in family(spec.family).blocks(spec) for rule in block]
    return {rule.megatron: (rule, torch.randn(rule.local_shape(spec, shard))) for rule in rules}


def as_transformer_engine(named: dict[str, tuple]) -> dict[str, torch.Tensor]:
    """The same numbers as Megatron's modules of Transformer Engine name and shape them, written out by hand."""
    out = {}
    for name, (_, tensor) in named.items():
        dense = name.replace("pre_mlp_layernorm", "mlp.router") not in named
        if name.endswith("input_layernorm.weight"):
            name = name.replace("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight")
        elif name.endswith("pre_mlp_layernorm.weight") and dense:
            name = name.replace("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")
        found = re.fullmatch(r"(.*mlp\.experts\.)(weight|bias)([12])", name)
        if found is None:
            out[name] = tensor.clone()
            continue
        for expert, part in enumerate(tensor):
            shape = part.flatten(0, 1) if found[3] == "1" else part
            out[f"{found[1]}linear_fc{found[3]}.{found[2]}{expert}"] = shape.clone()
    return out


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.family)
@pytest.mark.parametrize("shard", SHARDS, ids=["whole", "tp2ep2"])
def test_names_and_regions_are_those_of_the_tables(spec, shard):
    named = tables(spec, shard)
    found = dict(in_table_names(as_transformer_engine(named).items()))
    assert found.keys() == named.keys() and any(isinstance(tensor, Stack) for tensor in found.values())
    for name, (rule, tensor) in named.items():
        own = found[name]
        assert own.shape == tensor.shape and own.numel() == tensor.numel() and own.nbytes == tensor.nbytes
        for region in rule.regions(spec, shard):
            assert torch.equal(region.of(own), region.of(tensor)), name
        for start, count in ((0, tensor.numel()), (3, 5), (tensor.numel() // 2 - 3, tensor.numel() // 2)):
            assert torch.equal(stretch(own, start, count), tensor.view(-1)[start : start + count]), name


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.family)
@pytest.mark.parametrize("shard", SHARDS, ids=["whole", "tp2ep2"])
def test_what_is_written_into_views_is_in_the_parameters(spec, shard):
    """Filled region by region from full tensors, every parameter holds what it held before it was emptied."""
    named = tables(spec, shard)
    parameters = as_transformer_engine(named)
    found = dict(in_table_names(parameters.items()))
    full: dict[str, torch.Tensor] = {}
    for rule, tensor in named.values():
        for hf_name, shape in rule.hf_shapes(spec).items():
            full.setdefault(hf_name, torch.zeros(shape))
        for region in rule.regions(spec, shard):
            target = full[region.hf_name][region.hf]
            target.copy_(region.of(tensor).reshape(target.shape))
    for tensor in parameters.values():
        tensor.fill_(float("nan"))
    for name, (rule, _) in named.items():
        for region in rule.regions(spec, shard):
            for view, hf in views(region, found[name]):
                view.copy_(full[region.hf_name][hf].reshape(view.shape))
    for name, tensor in as_transformer_engine(named).items():
        if "word_embeddings" not in name and "output_layer" not in name:  # padded rows are in no file
            assert torch.equal(parameters[name], tensor), name


def test_the_shards_know_the_same_norms():
    tree = ast.parse((Path(megarl.__file__).parent / "models" / "layers" / "te_layers.py").read_text())
    keywords = [k for node in ast.walk(tree) if isinstance(node, ast.Call) for k in node.keywords]
    assert [ast.literal_eval(k.value) for k in keywords if k.arg == "shard_names"] == [NORMS]
