"""FP8 rollout: codes and factors that arrive are those of the whole tensors, and the learner's own; what cannot be is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megarl import platform
from megarl.config.schema import Generate, Model, Parallel, Rollout
from megarl.convert.encodings import Fp8Blocks
from megarl.convert.load import family
from megarl.convert.stacks import Stack
from megarl.errors import BadInput
from megarl.models.fp8 import Product, Quantised, dequantize, recipe_of
from megarl.models.generate import spec_of
from megarl.rollout import fp8_weights
from megarl.rollout.engine_shards import EngineDegrees
from megarl.rollout.exchange import values_of
from megarl.rollout.fp8_weights import Coded, Fp8Weights
from megarl.rollout.sync_plan import LearnerLayout, SyncPlan

platform.setup()
SHAPE = dict(hidden_size=256, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=128, intermediate_size=256)
SPEC = replace(spec_of(Generate(**SHAPE, num_experts=4, top_k=2, moe_intermediate_size=256)), vocab_size=131)
NARROW = replace(SPEC, num_heads=8, num_kv_heads=4, head_dim=64)  # a group's queries, key and value are no whole blocks
DENSE = spec_of(Generate(family="qwen3", **SHAPE))


WHOLE = EngineDegrees()


def plan_of(spec, parallel, world, degrees=WHOLE, **model):
    fp8 = Fp8Weights.of(spec, Model(path="", **model), Rollout(fp8="blockwise"))
    return SyncPlan(spec, "bfloat16", LearnerLayout.of(parallel, world, 2), degrees, fp8=fp8)


def tensors_of(spec):
    generator = torch.Generator().manual_seed(0)
    shapes = family(spec.family).hf_shapes(spec)
    return {name: torch.randn(shape, generator=generator) * torch.rand((), generator=generator) for name, shape in shapes.items()}


def parameters_of(plan, rank, tensors):
    """A rank's shard of every parameter."""
    shard, out = plan.learner.shard(rank), {}
    for rules in plan.blocks:
        for rule, _ in rules:
            out[rule.megatron] = torch.zeros(rule.local_shape(plan.spec, shard))
            for region in rule.regions(plan.spec, shard):
                out[rule.megatron][region.local] = tensors[region.hf_name][region.hf]
    return out


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize(
    "spec, parallel, world, degrees",
    [
        (SPEC, Parallel(), 1, EngineDegrees()),
        (SPEC, Parallel(tp=2, ep=2), 2, EngineDegrees(2)),
        (SPEC, Parallel(tp=2, etp=2, pp=2), 4, EngineDegrees(2, 2, True)),
        (NARROW, Parallel(tp=2), 2, EngineDegrees(2, 1, True)),
        (DENSE, Parallel(tp=2), 2, EngineDegrees()),
    ],
)
def test_every_engine_rank_gets_the_blocks_of_the_whole_tensors(
    spec, parallel, world, degrees, power_of_two, monkeypatch
):
    """As an export of the whole model writes them, for scales that are no powers of two; quantised in several goes."""
    monkeypatch.setattr(fp8_weights, "AT_ONCE", 3 * 128 * 256)
    plan, tensors = plan_of(spec, parallel, world, degrees, fp8_power_of_two=power_of_two), tensors_of(spec)
    held = [Coded(parameters_of(plan, rank, tensors), plan, rank) for rank in range(world)]
    expected = {}
    for name, tensor in tensors.items():
        if name in plan.fp8.coded:
            codes, factors, _ = plan.fp8.quantise(tensor)
            expected |= {name: codes.float(), f"{name}_scale_inv": factors}
            exported = list(Fp8Blocks().encode(tensor))
            same = torch.equal(torch.cat([part for _, _, part in exported]), factors)
            assert same is not power_of_two and (power_of_two or torch.equal(exported[0][1].float(), codes[:1024].float()))
        else:
            expected[name] = tensor
    for rank in range(world):
        hosted = {name: torch.full([s.stop - s.start for s in box], torch.nan) for name, box in plan.hosted(rank).items()}
        for block in range(len(plan.blocks)):
            for sender, pieces in plan.incoming(block, rank).items():
                for piece in pieces:
                    values = values_of(piece, held[sender][piece.entry.source])
                    coded = piece.entry.hf_name.removesuffix("_scale_inv") in plan.fp8.coded
                    assert not coded or str(values.dtype) == f"torch.{piece.entry.dtype}"
                    hosted[piece.entry.hf_name][piece.target] = values.reshape(piece.shape).float()
        for name, box in plan.hosted(rank).items():
            assert torch.equal(hosted[name], expected[name][box]), name


def numbers(operand):
    """What a product multiplies."""
    return dequantize(operand) if isinstance(operand, Quantised) else operand


@pytest.mark.parametrize("power_of_two", [False, True])
def test_codes_are_those_that_a_learner_in_fp8_multiplies_with(power_of_two):
    model = dict(fp8="blockwise", fp8_power_of_two=power_of_two)
    plan = plan_of(SPEC, Parallel(tp=2, ep=2), 2, **model)
    product, seen = Product(recipe_of(Model(path="", **model))), 0
    for rank in range(2):
        parameters = parameters_of(plan, rank, tensors_of(SPEC))
        coded = Coded(parameters, plan, rank)
        for name, parameter in parameters.items():
            if plan.blocked(name, rank) is None:
                continue
            matrices = parameter[None] if parameter.dim() == 2 else parameter.flatten(1, -2)  # of experts, one by one
            own = torch.cat([numbers(product.operand(matrix, "weight", False)) for matrix in matrices])
            sent = dequantize(Quantised(coded[name + ":codes"], coded[name + ":factors"], (128, 128)))
            assert torch.equal(own, sent) and not torch.equal(own, parameter.flatten(0, -2))
            seen += 1
    assert not plan.regrouped(0) and plan_of(NARROW, Parallel(), 1).regrouped(0) == [
        f"decoder.layers.{layer}.self_attention.linear_qkv.weight" for layer in range(2)
    ]
    assert seen == 2 * 2 * 4  # of both ranks' layers: attention in and out, experts in and out


def test_experts_that_are_a_parameter_each_have_the_same_codes():
    plan, name = plan_of(SPEC, Parallel(), 1), "decoder.layers.1.mlp.experts.weight1"
    parameters = parameters_of(plan, 0, tensors_of(SPEC))
    stack = Stack(list(parameters[name].flatten(1, 2)), tuple(parameters[name].shape[1:]))
    one, other = (Coded(parameters | {name: held}, plan, 0) for held in (parameters[name], stack))
    assert torch.equal(one[name + ":codes"].float(), other[name + ":codes"].float())
    assert torch.equal(one[name + ":factors"], other[name + ":factors"])


def test_the_plan_counts_a_byte_for_a_code_and_four_for_a_factor():
    plan, size = plan_of(SPEC, Parallel(ep=2), 2), 0
    for name, tensor in tensors_of(SPEC).items():
        coded = any(part in name for part in ("self_attn.q_proj", "k_proj", "v_proj", "o_proj", ".experts."))
        size += tensor.numel() + tensor.numel() // 128**2 * 4 if coded else tensor.numel() * 2
    assert plan.bytes == size
    assert plan.traffic(0).written == size and plan.traffic(0).received == 2 * 2 * 3 * 256 * 256 * (1 + 4 / 128**2)


def test_what_stays_plain_is_what_the_learner_leaves_so():
    plain = plan_of(SPEC, Parallel(), 1, fp8_skip_first=1).fp8
    assert plain.coded and all(name.startswith("model.layers.1.") for name in plain.coded)
    kept = plain.config()["modules_to_not_convert"]
    assert {"lm_head", "model.embed_tokens", "model.layers.1.mlp.gate", "model.layers.0.self_attn.q_proj"} <= set(kept)
    assert not any(f"{module}.weight" in plain.coded for module in kept)


@pytest.mark.parametrize(
    "changes, degrees, parallel, message",
    [
        (dict(moe_intermediate_size=192), EngineDegrees(), {}, "set rollout.fp8: none"),
        (dict(), EngineDegrees(4), {}, "lower rollout.tensor_parallel to 2"),
        (dict(num_kv_heads=4), EngineDegrees(4), {}, "tensor_parallel to 2 or set rollout.expert_parallel: true"),
        (dict(num_kv_heads=4), EngineDegrees(), dict(tp=4, etp=4), "is 64 x 256 on a rank of the learner, and blocks are "),
    ],
)
def test_blocks_cut_between_ranks_are_refused_with_what_works(changes, degrees, parallel, message):
    plan = plan_of(replace(SPEC, **changes), Parallel(**parallel), 4, degrees)
    with pytest.raises(BadInput) as error:
        plan.fp8.check(degrees)
        plan.schedule(0)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_models_that_vllm_has_no_such_layers_for_are_refused():
    for changes in (dict(family="gpt_oss"), dict(family="deepseek_v3", kv_lora_rank=512)):
        with pytest.raises(BadInput, match=f"not for {changes['family']}; set rollout.fp8: none"):
            plan_of(replace(SPEC, **changes), Parallel(), 1)
    with pytest.raises(BadInput, match="no layer of 2 is left in FP8"):
        plan_of(SPEC, Parallel(), 1, fp8_skip_first=1, fp8_skip_last=1)
