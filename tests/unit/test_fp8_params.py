"""FP8 parameters: their numbers wherever weights are read, what is refused, and what Megatron is told.

The tensors are those of `tests.dist.te_quantised`, which stand for the protocol of Transformer Engine's; that runs with them
give the numbers of runs without is tested in `tests/dist/test_fp8_params_layouts.py`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from megarl import platform
from megarl.config import check
from megarl.config.schema import RL, SFT, Config, Generate, Model, Optimizer, Parallel, Rollout
from megarl.convert import load
from megarl.convert.rules import Rule, Shard
from megarl.convert.stacks import KEPT_PARAMETERS, Readable, Stack, stretch
from megarl.convert.stream import Weights
from megarl.errors import BadInput
from megarl.models.fp8 import E4M3, rounded
from megarl.platform.quantised import PROTOCOL
from megarl.rollout.fp8_weights import CODES, FACTORS, Coded
from tests.dist.te_quantised import Float8BlockwiseQTensor, Float8Tensor, MXFP8Tensor, Quantizer
from tests.signatures import load as table
from tests.unit.test_fp8_rollout import DENSE, plan_of

platform.setup()

from megatron.core.distributed import DistributedDataParallelConfig  # noqa: E402
from megatron.core.optimizer import OptimizerConfig  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402

from megarl.learner.optimizer import build_optimizer  # noqa: E402
from megarl.models import build  # noqa: E402
from megarl.models.layers.te_fp8 import fp8_settings  # noqa: E402
from megarl.plan.hardware import named  # noqa: E402
from megarl.plan.memory import plan_memory  # noqa: E402

KINDS = [
    Quantizer(Float8Tensor, None, False),
    Quantizer(Float8BlockwiseQTensor, (128, 128), True),
    Quantizer(MXFP8Tensor, (1, 32), True),
]
TENSOR = "transformer_engine.pytorch.tensor"
FP8 = dict(layers="te", dtype="bfloat16", fp8="blockwise", fp8_params=True)


@pytest.fixture(params=KINDS, ids=lambda quantizer: quantizer.kind.__name__)
def quantizer(request):
    return request.param


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()


def test_the_protocol_is_transformer_engines_and_no_plain_tensors():
    release = table("transformer-engine")
    for name in ("QuantizedTensor", "Float8Tensor", "Float8BlockwiseQTensor", "mxfp8_tensor.MXFP8Tensor"):
        own = release[f"{TENSOR}.{name}"]
        assert all(method in own or method in release[f"{TENSOR}.QuantizedTensor"] for method in PROTOCOL)
    assert not platform.is_quantised(torch.zeros(1)) and "quantize_" in PROTOCOL
    # `rebuilt` calls a kind with its metadata, as the release's `make_like` does
    for kind in (Float8Tensor, Float8BlockwiseQTensor, MXFP8Tensor):
        text = release[f"{TENSOR}.{kind.__name__}Storage"]["__new__"]
        assert all(name in text for name in kind.names) and "**kwargs" in text


def test_plain_is_the_identity_or_the_numbers(quantizer):
    weight = random(256, 128)
    assert platform.plain(weight) is weight and platform.parts_of(weight) == [weight]
    quantised = quantizer(weight)
    expected = rounded(weight, quantizer.tile, E4M3, quantizer.power_of_two)
    assert torch.equal(platform.plain(quantised), expected.bfloat16())
    again = platform.rebuilt(quantised, torch.clone)
    assert type(again) is type(quantised) and torch.equal(platform.plain(again), platform.plain(quantised))
    assert not {p.data_ptr() for p in platform.parts_of(again)} & {p.data_ptr() for p in platform.parts_of(quantised)}


def test_what_has_been_rounded_rounds_to_itself():
    """So blocks that a rollout in FP8 is sent are those that the learner multiplies with."""
    for quantizer in KINDS[1:]:
        once = platform.plain(quantizer(random(256, 384)))
        assert torch.equal(platform.plain(quantizer(once)), once)


class Reader:
    """Of files whose tensor has these numbers."""

    def __init__(self, numbers: torch.Tensor) -> None:
        self.numbers = numbers

    def check(self, name, shape): ...

    def read_into(self, view, name, hf):
        assert not platform.is_quantised(view)
        view.copy_(self.numbers[hf])


def test_loading_rounds_a_whole_parameter_and_tells_what_it_was(quantizer):
    numbers, seen = random(256, 128), []
    quantised = quantizer(torch.zeros(256, 128).bfloat16())
    rule = Rule("weight", ("w",), ("V", "H"))
    spec = replace(DENSE, vocab_size=256, hidden_size=128)
    load.load_parameter(Reader(numbers), rule, spec, Shard(), quantised, lambda *pair: seen.append(pair))
    assert torch.equal(platform.plain(quantised), platform.plain(quantizer(numbers)))
    assert torch.equal(quantised.columns, quantised.codes.t())
    assert len(seen) == 1 and seen[0][0] is quantised and torch.equal(seen[0][1], numbers)


def test_a_model_gives_quantised_parameters_themselves(quantizer):
    """Not their `.data`, of which the copy by columns may be another."""
    parameter = torch.nn.Parameter(quantizer(random(128, 128)))
    assert load._weight(parameter) is parameter and load._weight(torch.nn.Parameter(random(2))) is not parameter


def test_reading_gives_numbers_one_expert_at_a_time(quantizer):
    weights = [random(256, 128) * (i + 1) for i in range(4)]
    parts = [quantizer(weight) for weight in weights]
    numbers = torch.stack([platform.plain(part).view(2, 128, 128) for part in parts])
    held = {"experts": Stack(parts, (2, 128, 128)), "linear": parts[1], "norm": weights[0]}
    read = Readable(held)
    assert read["norm"] is weights[0] and torch.equal(read["linear"], numbers[1].view(256, 128))
    for index in ((2, 1), (slice(1, 2), 0, slice(3, 9)), (slice(0, 4), slice(0, 2)), (slice(1, 3), 1)):
        assert torch.equal(read["experts"][index], numbers[index]) and not platform.is_quantised(read["experts"][index])
    assert torch.equal(stretch(read["experts"], 100, 40_000), numbers.view(-1)[100:40_100])
    weights = Weights.of(held)
    found = weights.fetch(["linear"])["linear"]
    assert weights.dtypes["experts"] is torch.bfloat16 and not platform.is_quantised(found)
    assert torch.equal(found, numbers[1].view(256, 128))


def test_reading_makes_no_more_numbers_than_are_read():
    made = []
    held = {str(i): random(2) for i in range(KEPT_PARAMETERS + 1)}
    read = Readable(held, lambda tensor: made.append(tensor) or tensor)
    assert list(read) == list(held) and made == []
    for name in [*held, *held]:
        assert read[name] is held[name]
    assert len(made) == 2 * len(held) and len(read._made) == KEPT_PARAMETERS


def test_a_rollout_in_fp8_gets_the_codes_of_the_weights():
    """Both sides in blocks: the numbers of the codes that are sent are those of the parameter."""
    plan = plan_of(DENSE, Parallel(), 1)
    rule = next(rule for rules in plan.blocks for rule, _ in rules if rule.megatron.endswith("linear_fc2.weight"))
    weight = KINDS[1](random(*rule.local_shape(DENSE, Shard())))
    coded = Coded(Readable({rule.megatron: weight}), plan, 0)
    codes, factors = coded[rule.megatron + CODES], coded[rule.megatron + FACTORS]
    numbers = codes.float() * factors.repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert torch.equal(numbers, platform.plain(weight).float())


def test_megatron_is_told():
    found = fp8_settings(Model(path="", **FP8))
    assert found["fp8_param"] is True and found["fp8"] == "e4m3" and found["fp8_recipe"] == "blockwise"
    assert fp8_settings(Model(path="", **FP8 | {"fp8_params": False}))["fp8_param"] is False
    fields = lambda kind: {f.name for f in dataclasses.fields(kind)}  # noqa: E731
    assert found.keys() <= fields(TransformerConfig)
    assert {"fp8_param_gather", "reuse_grad_buf_for_mxfp8_param_ag"} <= fields(DistributedDataParallelConfig)
    assert {"fp8_recipe", "reuse_grad_buf_for_mxfp8_param_ag"} <= fields(OptimizerConfig)


@pytest.mark.parametrize("recipe, shared", [("mxfp8", True), ("blockwise", False), (None, False)])
def test_the_optimizer_shares_the_gradients_memory_for_mxfp8_alone(recipe, shared, monkeypatch):
    seen = {}

    def built(config, chunks):
        seen["config"] = config
        return SimpleNamespace(chained_optimizers=[])

    monkeypatch.setattr("megarl.learner.optimizer.get_megatron_optimizer", built)
    build_optimizer(Optimizer(), torch.bfloat16, [], True, recipe)
    assert seen["config"].fp8_recipe == recipe and seen["config"].reuse_grad_buf_for_mxfp8_param_ag is shared


def config(parallel: dict | None = None, optimizer: dict | None = None, **model) -> Config:
    sft = SFT(data=[], optimizer=Optimizer(**optimizer or {}))
    return Config(model=Model(path="m", **FP8 | model), parallel=Parallel(**parallel or {}), sft=sft)


@pytest.mark.parametrize(
    "changes, parts",
    [
        (dict(fp8="none"), ["model.fp8 = 'none'", "set model.fp8: blockwise"]),
        (dict(layers="torch"), ["model.layers = 'torch'", "same numbers", "set model.layers: te"]),
        (dict(dtype="float32"), ["model.dtype = 'float32'", "set model.dtype: bfloat16"]),
        (dict(fp8="delayed"), ["model.fp8 = 'delayed'", "set model.fp8: tensorwise"]),
        (dict(parallel={"distributed_optimizer": False}), ["set parallel.distributed_optimizer: true"]),
        (dict(fp8="mxfp8", parallel={"overlap_param_gather": True}), ["mxfp8", "set parallel.overlap_param_gather: false"]),
        (dict(optimizer={"type": "muon"}), ["sft.optimizer.type = 'muon'", "set sft.optimizer.type: adam"]),
        (dict(optimizer={"cpu_offload": True}), ["sft.optimizer.cpu_offload = true", "cpu_offload: false"]),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_in_one_line(changes, parts, monkeypatch):
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: object())
    check._check_fp8_params(config())
    with pytest.raises(BadInput) as info:
        check._check_fp8_params(config(**changes))
    line = str(info.value)
    assert line.startswith("model.fp8_params = true: ") and line.endswith(", or model.fp8_params: false") and "\n" not in line
    assert all(part in line for part in parts), line


@pytest.mark.parametrize("recipe", ["blockwise", "tensorwise", "mxfp8"])
@pytest.mark.parametrize("parallel", [{}, {"overlap_grad_reduce": True, "overlap_param_gather": True}], ids=str)
def test_what_works_is_not_refused(recipe, parallel, monkeypatch):
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: object())
    if recipe != "mxfp8" or not parallel:
        check._check_fp8_params(config(parallel, fp8=recipe))


def test_without_transformer_engine_it_is_refused_before_and_when_a_model_is_built():
    with pytest.raises(BadInput, match="Transformer Engine is not installed.*install it, or model.fp8_params: false"):
        check._check_fp8_params(config(layers="auto"))
    with pytest.raises(BadInput) as info:  # before anything else is looked at
        build.build_model(DENSE, Model(path="", **FP8 | {"layers": "auto"}), None, Parallel())
    assert str(info.value).startswith("model.fp8_params = true: ") and "set model.fp8_params: false" in str(info.value)


GPU = Generate(hidden_size=256, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=64, num_experts=4, moe_intermediate_size=128)


def planned(**model) -> Config:
    model = Model(path="nowhere", generate=GPU, **{"dtype": "bfloat16", "fp8": "blockwise"} | model)
    return Config(model=model, rl=RL(data=[]), rollout=Rollout(max_response_tokens=64), parallel=Parallel(ep=2))


def test_the_planner_counts_no_copies_and_gathers_a_byte():
    hardware = named("h200")
    plain, params, mxfp8 = (
        plan_memory(planned(**model), 2, hardware).ranks[0].phases["update"]
        for model in ({}, {"fp8_params": True}, {"fp8": "mxfp8", "fp8_params": True})
    )
    assert plain["fp8_copies"][0] == plain["policy_weights"][0] and "fp8_copies" not in params
    # two codes are as large as one bfloat16, and a scale is shared by 128 x 128, or 32
    assert params["policy_weights"][0] == pytest.approx(plain["policy_weights"][0] * (1 + 4 / 128**2))
    assert mxfp8["policy_weights"][0] == pytest.approx(plain["policy_weights"][0] * (1 + 1 / 32))
