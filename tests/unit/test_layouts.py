"""What the layout oracle is made of: names, the small model, the step whose gates act, and replayed routing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megarl.config import Config, Model
from megarl.config.schema import Generate
from megarl.errors import BadInput
from megarl.types import Batch, SequenceShards
from megarl.verify.layouts import step
from megarl.verify.layouts.model import LAYERS, shrunken
from megarl.verify.layouts.names import DEFAULT, parse


@pytest.mark.parametrize(
    "name, world", [("one", 1), ("dp3", 3), ("tp2", 2), ("ep4", 4), ("tp2ep4", 4), ("tp2cp2pp2", 8), ("etp2ep2pp2", 8)]
)
def test_a_name_gives_the_smallest_world(name, world):
    assert parse(name).world == world


def test_suffixes_become_settings():
    layout = parse("pp2vpp2+recompute+distopt+budget90+permuted")
    section = layout.parallel()
    assert (section.pp, section.vpp, section.recompute, section.distributed_optimizer) == (2, 2, "full", True)
    assert (layout.budget, layout.permuted, layout.unpacked) == (90, True, False)
    assert not parse("pp2").parallel().distributed_optimizer
    assert parse("ep2+allgather").parallel().dispatcher == "allgather"


def test_default_layouts_have_names_of_their_own():
    assert len(set(DEFAULT)) == len(DEFAULT) and all(parse(name).name == name for name in DEFAULT)


@pytest.mark.parametrize("name", ["", "tp2x", "2tp", "tp0", "tp2tp2", "two", "tp2+", "tp2 pp2"])
def test_other_names_are_refused(name):
    with pytest.raises(BadInput, match="give degrees such as"):
        parse(name)


def small(**changes):
    return shrunken(Config(model=Model(path="/nowhere", generate=Generate(**changes))))


def test_the_small_model_keeps_the_kind():
    spec = small(num_layers=30, num_experts=128, top_k=8, hidden_size=2048, num_heads=32, num_kv_heads=4)
    assert (spec.num_layers, spec.num_experts, spec.top_k, spec.num_heads // spec.num_kv_heads) == (LAYERS, 8, 4, 2)
    dense = small(family="qwen3", tie_embeddings=True, num_heads=4, num_kv_heads=4)
    assert not dense.is_moe and dense.tie_embeddings and dense.num_heads == dense.num_kv_heads


@pytest.fixture(scope="module")
def batch() -> Batch:
    made = step.make_batch(299, torch.float64)
    generator = torch.Generator().manual_seed(0)
    said = [torch.randn(len(made.tokens), dtype=torch.float64, generator=generator) for _ in range(2)]
    return step.record(made, *said)


def test_the_batch_is_uneven(batch):
    trained = SequenceShards(batch.sequence_ids(), len(batch)).sum(batch.response_mask)[:, 0]
    assert (trained == 0).sum() == 1 and batch.lengths.max() > 16 * batch.lengths.min()
    assert 1 in torch.bincount(batch.group_index)


def test_no_token_is_at_the_edge_of_a_gate(batch):
    """Where rounding would decide, one layout could clip what another does not."""
    z, on = step.log_ratios(batch), batch.response_mask > 0
    edges = torch.tensor([0.8, 1.2, 1.28]).double().log()
    assert (z[on, None] - edges).abs().min() > 1e-3
    moves = step.value_moves(batch)
    assert (moves[on].abs() - 0.2).abs().min() > 1e-3
    values = batch.values + moves
    clipped = batch.values + moves.clamp(-0.2, 0.2)
    gaps = ((values - batch.returns).abs() - (clipped - batch.returns).abs()).abs()[on & (moves.abs() > 0.2)]
    assert gaps.min() > 1e-3
    low, high = step.sequence_band(batch)
    moved = SequenceShards(batch.sequence_ids(), len(batch)).mean(z, batch.response_mask)
    assert (moved[:, None] - torch.tensor([1 - low, 1 + high]).double().log()).abs().min() > 1e-3


def test_a_step_whose_gates_stay_shut_is_refused(batch):
    grpo, gspo, *_, sft = step.losses(batch)
    good = {grpo.acting: 0.3, gspo.acting: 0.3, "policy/log_ratio_seq_std": 0.1}
    assert step.problems(grpo, good) == step.problems(gspo, good) == step.problems(sft, {}) == []
    assert "0% of the gates act" in step.problems(grpo, good | {grpo.acting: 0.0})[0]
    assert "100% of the gates act" in step.problems(gspo, good | {gspo.acting: 1.0})[0]
    assert "ratios of the sequences differ by 0.0" in step.problems(grpo, good | {"policy/log_ratio_seq_std": 0.0})[0]


def test_mixed_models_stay_mixed(tmp_path):
    from megarl.convert import family
    from megarl.convert.hf_io import write_json

    spec = replace(small(), num_layers=12, moe_layers=tuple(range(6, 12)))
    write_json(tmp_path / "config.json", family(spec.family).write_config(spec))
    assert shrunken(Config(model=Model(path=str(tmp_path)))).moe_layers == (1, 2, 3)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("before", [True, False])
def test_a_float64_router_gives_float64_gates(score, before):
    from megarl import platform

    platform.setup()
    from megatron.core.transformer.moe import router

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, 8, dtype=torch.float64, generator=generator, requires_grad=True)
    probs, chosen = router.topk_routing_with_score_function(logits, 2, use_pre_softmax=before, score_function=score)
    if score == "sigmoid":
        kept = torch.where(chosen, logits.sigmoid(), 0.0)
        expected = kept / (kept.sum(-1, keepdim=True) + 1e-20)
    elif before:
        expected = torch.where(chosen, logits.softmax(-1), 0.0)
    else:
        expected = logits.masked_fill(~chosen, -torch.inf).softmax(-1)
    assert chosen.sum(-1).unique().tolist() == [2]
    assert torch.allclose(probs, expected, rtol=0, atol=1e-15)
    (mine,), (wanted,) = (torch.autograd.grad(x.square().sum(), logits, retain_graph=True) for x in (probs, expected))
    assert torch.allclose(mine, wanted, rtol=0, atol=1e-14)
