"""Any layout, any packing: the same losses, gradients and weights as one process."""

from __future__ import annotations

import pytest

from tests.dist.checkpoints import make
from tests.dist.harness import run_ranks

CASE = "tests.dist.learner_cases:train"
# every other layout against one process, gradient by gradient: test_verify_layouts.py; here several steps in a row
LAYOUTS = [
    (2, dict(ep=2), 90),
    (4, dict(tp=2, pp=2, ep=2), 60),
    (4, dict(tp=2, etp=2, ep=2), 400),  # experts' tokens gathered in uneven numbers
    (4, dict(pp=2, vpp=2, overlap_grad_reduce=True, overlap_param_gather=True), 120),
    (2, dict(pp=2, last_stage_layers=1, recompute="selective"), 120),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("learner")
    make(folder)
    return str(folder)


@pytest.fixture(scope="module")
def single(checkpoint):
    return run_ranks(CASE, 1, checkpoint, {}, 400)[0]


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """A checkpoint whose output layer is the embedding, and what one process makes of it."""
    folder = tmp_path_factory.mktemp("tied")
    make(folder, tie_word_embeddings=True)
    return str(folder), run_ranks(CASE, 1, str(folder), {}, 400)[0]


@pytest.mark.parametrize("nproc, parallel, budget", LAYOUTS)
def test_layout_changes_nothing(checkpoint, single, nproc, parallel, budget):
    ranks = run_ranks(CASE, nproc, checkpoint, parallel, budget)
    for rank in ranks:
        for mine, expected in zip(rank, single, strict=True):
            assert mine == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("nproc, parallel, budget", [(2, dict(tp=2), 400), (2, dict(pp=2), 60)])
def test_layout_changes_nothing_for_tied_embeddings(tied, nproc, parallel, budget):
    """Under pp the last stage multiplies by a copy of its own, under tp and alone by the embedding itself."""
    folder, single = tied
    for rank in run_ranks(CASE, nproc, folder, parallel, budget):
        for mine, expected in zip(rank, single, strict=True):
            assert mine == pytest.approx(expected, rel=2e-5)


def test_tied_losses_are_those_of_transformers(tied):
    test_losses_are_those_of_transformers(*tied)


@pytest.mark.parametrize("nproc, parallel", [(1, {}), (2, dict(tp=2))])
def test_bfloat16_is_near(checkpoint, single, nproc, parallel):
    for rank in run_ranks(CASE, nproc, checkpoint, parallel, 400, dtype="bfloat16"):
        for mine, expected in zip(rank, single, strict=True):
            assert mine == pytest.approx(expected, rel=0.05)


LOG_PROBS = [(1, {}, 400), (2, dict(tp=2), 400), (2, dict(pp=2), 60), (2, dict(ep=2), 90)]


@pytest.mark.parametrize("nproc, parallel, budget", LOG_PROBS)
def test_only_trained_tokens_have_log_probs(checkpoint, nproc, parallel, budget):
    ranks = run_ranks("tests.dist.learner_cases:masked", nproc, checkpoint, parallel, budget)
    assert [name for rank in ranks for name, holds in rank.items() if not holds] == []


@pytest.mark.parametrize("vocab", [29, 13])  # padding to 32 in the last rank's half; or all of it padding
@pytest.mark.parametrize("columns", [1, 5, 16])
def test_log_probs_over_two_vocabulary_shards(vocab, columns):
    for gaps in run_ranks("tests.dist.learner_cases:sharded_log_probs", 2, vocab, columns):
        assert max(gaps.values()) < 1e-12, gaps


def test_losses_are_those_of_transformers(checkpoint, single):
    """Independent source: the loss, its gradient norm and Adam's first update by transformers and torch alone."""
    import torch
    from transformers import AutoModelForCausalLM

    from tests.dist.learner_cases import fixed_batch

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
    batch, losses = fixed_batch(), []
    decay = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    adam = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}], lr=1e-3, betas=(0.9, 0.95)
    )
    for _ in range(3):
        adam.zero_grad()
        total = 0.0
        for s in range(len(batch)):
            one = batch.select([s])
            log_probs = torch.log_softmax(model(one.tokens[None]).logits[0, :-1].float(), -1)
            chosen = log_probs.gather(1, one.tokens[1:, None])[:, 0]
            total = total - (one.token_weights[1:] * chosen).sum()
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        losses.append([total.item(), norm.item()])
    for mine, expected in zip(single, losses):
        assert [mine[0], mine[2]] == pytest.approx(expected, rel=5e-5)


@pytest.mark.parametrize("parallel", [{}, dict(tp=2)])
def test_recomputed_activations_give_the_same_gradients_from_less_memory(checkpoint, parallel):
    for modes in run_ranks("tests.dist.learner_cases:recomputed", parallel.get("tp", 1), checkpoint, parallel):
        gaps, kept = zip(*(modes[mode] for mode in ("none", "selective", "full")), strict=True)
        # an MoE layer as one node of the graph adds up the gradients of router and experts before the rest: rounding
        assert gaps[0] == gaps[2] == 0.0 and gaps[1] < 5e-6
        assert kept[0] > 1.1 * kept[1] and kept[1] > 1.4 * kept[2], kept  # the weights are in all three


AUX = 0.3


@pytest.fixture(scope="module")
def balanced(checkpoint):
    return run_ranks(CASE, 1, checkpoint, {}, 400, "float32", 2, aux_loss_coef=AUX)[0]


def test_the_load_balancing_loss_is_that_of_switch_transformers(checkpoint, balanced):
    """Independent source: transformers' router logits, and the formula of arXiv 2101.03961 written out, layer by layer."""
    import torch
    from transformers import AutoModelForCausalLM

    from tests.dist.learner_cases import fixed_batch

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
    batch, total, logits = fixed_batch(), 0.0, []
    for s in range(len(batch)):
        one = batch.select([s])
        out = model(one.tokens[None], output_router_logits=True)
        log_probs = torch.log_softmax(out.logits[0, :-1].float(), -1).gather(1, one.tokens[1:, None])[:, 0]
        total = total - (one.token_weights[1:] * log_probs).sum()
        logits.append(torch.stack(out.router_logits))
    scores = torch.cat(logits, dim=1).softmax(-1)  # [layers, tokens, E]
    layers, tokens, experts = scores.shape
    chosen = torch.zeros_like(scores).scatter_(2, scores.topk(2).indices, 1.0)
    aux = (experts * chosen.sum(1) / (2 * tokens) * scores.sum(1) / tokens).sum()
    (total + AUX * aux).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert balanced[0][2] == pytest.approx(norm.item(), rel=5e-5)


@pytest.mark.parametrize("nproc, parallel", [(2, dict(cp=2, recompute="full")), (4, dict(tp=2, pp=2))])
def test_the_load_balancing_loss_is_that_of_the_whole_row(checkpoint, balanced, nproc, parallel):
    """Padding, which differs between layouts, has no say in it."""
    for rank in run_ranks(CASE, nproc, checkpoint, parallel, 400, "float32", 2, aux_loss_coef=AUX):
        for mine, expected in zip(rank, balanced, strict=True):
            assert mine == pytest.approx(expected, rel=2e-5)


def test_a_frozen_router_keeps_its_weights(checkpoint):
    free, frozen = run_ranks("tests.dist.learner_cases:router_moves", 1, checkpoint)[0]
    assert frozen["routers"] == 0.0 < free["routers"] and frozen["others"] > 0.0


@pytest.fixture(scope="module")
def spread(checkpoint):
    return run_ranks("tests.dist.learner_cases:log_ratio_spread", 1, checkpoint, {})[0]


def test_the_spread_of_the_log_ratio_is_split_into_weights_and_routing(spread):
    untouched, output_layer, routers = spread
    std = {name: f"routing/log_ratio_std_{name}" for name in ("live", "replayed", "difference")}
    assert untouched[std["live"]] == untouched[std["replayed"]] == 0.0
    assert output_layer[std["live"]] == output_layer[std["replayed"]] > 0.0 == output_layer[std["difference"]]
    assert output_layer["routing/update_changed"] == 0.0 < routers["routing/update_changed"]
    assert routers[std["difference"]] > 0.0
    assert 0.0 < routers["routing/log_ratio_seq_std_live"] < routers[std["live"]]


@pytest.mark.parametrize("parallel", [dict(ep=2), dict(cp=2), dict(tp=2), dict(pp=2)])
def test_the_spread_of_the_log_ratio_is_that_of_one_process(checkpoint, spread, parallel):
    for rank in run_ranks("tests.dist.learner_cases:log_ratio_spread", 2, checkpoint, parallel):
        for mine, expected in zip(rank, spread, strict=True):
            measured = {name: value for name, value in expected.items() if "log_ratio" in name or "inverse" in name}
            assert {name: mine.get(name) for name in measured} == pytest.approx(measured, rel=1e-3, abs=1e-6)
