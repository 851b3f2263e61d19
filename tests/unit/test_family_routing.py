"""Routers of every kind, recorded and replayed, against transformers with the same experts put into its routers."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megarl import platform

platform.setup()

from megarl.config import Config, Model  # noqa: E402
from megarl.config.schema import Optimizer, Parallel  # noqa: E402
from megarl.convert import stream_gradients  # noqa: E402
from megarl.data.packing import pack  # noqa: E402
from megarl.learner.policy import Policy  # noqa: E402
from megarl.trainers.losses import token_mean_loss  # noqa: E402
from megarl.types import Batch  # noqa: E402
from tests.dist.convert_cases import TOKENS, tokens  # noqa: E402
from tests.families import all_cases  # noqa: E402
from tests.unit.test_families import mesh  # noqa: E402, F401

# case -> (score, whether the gates of the chosen add up to 1, what multiplies them)
KINDS = {
    "deepseek_v3": ("sigmoid", True, 1.7),
    "deepseek_v2": ("softmax", False, 1.7),
    "glm4_moe": ("sigmoid", True, 2.5),
    "gpt_oss": ("softmax", True, 1.0),
    "qwen2_moe": ("softmax", False, 1.0),
}


def gates(name: str, logits: Tensor, experts: Tensor) -> Tensor:
    """[n, k] of the router's logits `[n, E]` and a token's experts `[n, k]`."""
    score, normalised, scaling = KINDS[name]
    chosen = getattr(torch, score)(logits, **({"dim": 1} if score == "softmax" else {})).gather(1, experts)
    return scaling * (chosen / chosen.sum(dim=1, keepdim=True) if normalised else chosen)


class Reference:
    """transformers' model: `experts` and `weights` that its routers chose; `given` is what they take instead."""

    def __init__(self, name: str, model: torch.nn.Module) -> None:
        self.name, self.model = name, model
        self.given: Tensor | None = None
        self.routers = [module for module in model.modules() if type(module).__name__.lower().endswith("topkrouter")]
        for router in self.routers:
            router.register_forward_hook(self._hook)

    def log_probs(self) -> Tensor:
        self.experts: list[Tensor] = []
        self.weights: list[Tensor] = []
        row = tokens(131)
        return self.model(row).logits[0, :-1].log_softmax(-1).gather(1, row[0, 1:, None])[:, 0]

    def _hook(self, _module, _inputs, output) -> tuple[Tensor, Tensor, Tensor] | None:
        logits, weights, experts = output
        layer = len(self.experts)
        self.experts.append(experts), self.weights.append(weights)
        if self.given is not None:
            return logits, gates(self.name, logits, self.given[layer]), self.given[layer]


def in_order(experts: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Both by the number of the expert."""
    experts, order = experts.long().sort(dim=-1)
    return experts, weights.gather(-1, order)


@pytest.mark.parametrize("name", KINDS)
def test_recorded_and_replayed(name, mesh, tmp_path):  # noqa: F811
    reference = Reference(name, all_cases()[name].write(tmp_path / "in"))
    parallel = Parallel(distributed_optimizer=False)  # which plain gradient descent needs
    cfg = Config(model=Model(path=str(tmp_path / "in")), parallel=parallel)
    optimizer = Optimizer(type="sgd", lr=1.0, clip_grad=0.0)
    policy = Policy.from_hf(tmp_path / "in", cfg, mesh, optimizer=optimizer, routing=True)
    mask = torch.ones(TOKENS)
    mask[0] = 0
    batch = Batch(tokens(131)[0], torch.tensor([TOKENS]), mask, token_weights=mask / mask.sum())
    micro = pack(batch, [0], policy.layout)

    with torch.no_grad():
        expected = reference.log_probs()
    (live,), (routing,) = policy.read([micro])
    assert (live[1:] - expected).abs().max() <= 1e-5
    own = routing.stacked()
    experts, weights = in_order(torch.stack(reference.experts), torch.stack(reference.weights))
    found, own_weights = in_order(own, torch.stack(routing.gates))
    assert torch.equal(found, experts)
    torch.testing.assert_close(own_weights * KINDS[name][2], weights, atol=1e-6, rtol=1e-4)

    micro.experts = own
    assert torch.equal(policy.read([micro])[0][0], live)

    micro.experts = (own + 3) % policy.spec.num_experts  # mostly out of the best groups
    reference.given = micro.experts.long()
    expected = reference.log_probs()
    (replayed,), _ = policy.read([micro])
    assert (replayed[1:] - expected).abs().max() <= 1e-5 < (replayed - live).abs().max()

    (-expected.mean()).backward()
    assert policy.train_step([micro], token_mean_loss).applied
    with torch.no_grad():
        for parameter in reference.model.parameters():
            parameter.copy_(parameter.grad)
    reference.model.save_pretrained(tmp_path / "gradients")  # under the names of a checkpoint
    wanted = load_file(tmp_path / "gradients" / "model.safetensors")
    for key, gradient in stream_gradients(policy.modules, policy.spec, mesh):
        assert wanted[key].any() or ".experts." in key, key  # an expert may have no token
        assert (gradient - wanted[key]).norm() <= 1e-4 * wanted[key].norm(), key
