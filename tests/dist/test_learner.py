"""Any layout, any packing: the same losses, gradients and weights as one process."""

from __future__ import annotations

import pytest

from tests.dist.checkpoints import make
from tests.dist.harness import run_in_turn

CASES = "tests.dist.learner_cases"
AUX = 0.3
# every other layout against one process, gradient by gradient: test_verify_layouts.py; here several steps in a row
LAYOUTS = {
    "ep2": (2, dict(ep=2), 90),
    "tp2pp2ep2": (4, dict(tp=2, pp=2, ep=2), 60),
    "tp2etp2ep2": (4, dict(tp=2, etp=2, ep=2), 400),  # experts' tokens gathered in uneven numbers
    "pp2vpp2 overlapped": (4, dict(pp=2, vpp=2, overlap_grad_reduce=True, overlap_param_gather=True), 120),
    "pp2 uneven": (2, dict(pp=2, last_stage_layers=1, recompute="selective"), 120),
}
TIED = {"tp2": (dict(tp=2), 400), "pp2": (dict(pp=2), 60)}
MASKED = {"one": ({}, 400), "tp2": (dict(tp=2), 400), "pp2": (dict(pp=2), 60), "ep2": (dict(ep=2), 90)}
BALANCED = {"cp2": (2, dict(cp=2, recompute="full")), "tp2pp2": (4, dict(tp=2, pp=2))}
SPREAD = {"ep2": dict(ep=2), "cp2": dict(cp=2), "tp2": dict(tp=2), "pp2": dict(pp=2)}
SHARDS = [(vocab, columns) for vocab in (29, 13) for columns in (1, 5, 16)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint, and one whose output layer is the embedding."""
    plain, tied = (tmp_path_factory.mktemp(name) for name in ("learner", "tied"))
    make(plain)
    make(tied, tie_word_embeddings=True)
    return str(plain), str(tied)


@pytest.fixture(scope="module")
def checkpoint(folders):
    return folders[0]


@pytest.fixture(scope="module")
def one(folders):
    """What a process alone makes of every case."""
    plain, tied = folders
    alone = dict(path=plain, parallel={})
    cases = {
        "plain": ("train", alone | dict(budget=400)),
        "tied": ("train", dict(path=tied, parallel={}, budget=400)),
        "bfloat16": ("train", alone | dict(budget=400, dtype="bfloat16")),
        "balanced": ("train", alone | dict(budget=400, steps=2, aux_loss_coef=AUX)),
        "masked one": ("masked", alone | dict(budget=400)),
        "recomputed": ("recomputed", alone),
        "routers": ("router_moves", dict(path=plain)),
        "spread": ("log_ratio_spread", alone),
    }
    return {name: results[0] for name, results in run_in_turn(CASES, 1, cases).items()}


@pytest.fixture(scope="module")
def two(folders):
    plain, tied = folders
    cases = _layouts(2, plain) | {"bfloat16": ("train", dict(path=plain, parallel=dict(tp=2), budget=400, dtype="bfloat16"))}
    for name, (parallel, budget) in TIED.items():
        cases[f"tied {name}"] = ("train", dict(path=tied, parallel=parallel, budget=budget))
    for name, (parallel, budget) in MASKED.items():
        if parallel:
            cases[f"masked {name}"] = ("masked", dict(path=plain, parallel=parallel, budget=budget))
    cases["recomputed"] = ("recomputed", dict(path=plain, parallel=dict(tp=2)))
    for name, parallel in SPREAD.items():
        cases[f"spread {name}"] = ("log_ratio_spread", dict(path=plain, parallel=parallel))
    for vocab, columns in SHARDS:
        cases[f"shards {vocab} {columns}"] = ("sharded_log_probs", dict(vocab=vocab, columns=columns))
    return run_in_turn(CASES, 2, cases)


@pytest.fixture(scope="module")
def four(folders):
    return run_in_turn(CASES, 4, _layouts(4, folders[0]))


def _layouts(world: int, path: str) -> dict[str, tuple[str, dict]]:
    """The cases of LAYOUTS and BALANCED that need so many ranks."""
    cases = {
        name: ("train", dict(path=path, parallel=parallel, budget=budget))
        for name, (nproc, parallel, budget) in LAYOUTS.items()
        if nproc == world
    }
    for name, (nproc, parallel) in BALANCED.items():
        if nproc == world:
            settings = dict(path=path, parallel=parallel, budget=400, steps=2, aux_loss_coef=AUX)
            cases[f"balanced {name}"] = ("train", settings)
    return cases


def assert_near(ranks: list, expected: list, rel: float) -> None:
    for rank in ranks:
        for mine, wanted in zip(rank, expected, strict=True):
            assert mine == pytest.approx(wanted, rel=rel)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_changes_nothing(request, one, name):
    ranks = request.getfixturevalue("two" if LAYOUTS[name][0] == 2 else "four")
    assert_near(ranks[name], one["plain"], 2e-5)


@pytest.mark.parametrize("name", TIED)
def test_layout_changes_nothing_for_tied_embeddings(one, two, name):
    """Under pp the last stage multiplies by a copy of its own, under tp and alone by the embedding itself."""
    assert_near(two[f"tied {name}"], one["tied"], 2e-5)


def test_bfloat16_is_near(one, two):
    assert_near([one["bfloat16"], *two["bfloat16"]], one["plain"], 0.05)


@pytest.mark.parametrize("name", MASKED)
def test_only_trained_tokens_have_log_probs(one, two, name):
    ranks = two[f"masked {name}"] if MASKED[name][0] else [one["masked one"]]
    assert [name for rank in ranks for name, holds in rank.items() if not holds] == []


@pytest.mark.parametrize("vocab, columns", SHARDS)  # vocab: padding to 32 in the last rank's half; or all of it padding
def test_log_probs_over_two_vocabulary_shards(two, vocab, columns):
    for gaps in two[f"shards {vocab} {columns}"]:
        assert max(gaps.values()) < 1e-12, gaps


@pytest.mark.parametrize("kind", ["plain", "tied"])
def test_losses_are_those_of_transformers(folders, one, kind):
    """Independent source: the loss, its gradient norm and Adam's first update by transformers and torch alone."""
    import torch
    from transformers import AutoModelForCausalLM

    from tests.dist.learner_cases import fixed_batch

    folder = folders[kind == "tied"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
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
            row = batch.select([s])
            log_probs = torch.log_softmax(model(row.tokens[None]).logits[0, :-1].float(), -1)
            chosen = log_probs.gather(1, row.tokens[1:, None])[:, 0]
            total = total - (row.token_weights[1:] * chosen).sum()
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        losses.append([total.item(), norm.item()])
    for mine, expected in zip(one[kind], losses):
        assert [mine[0], mine[2]] == pytest.approx(expected, rel=5e-5)


def test_recomputed_activations_give_the_same_gradients_from_less_memory(one, two):
    for modes in [one["recomputed"], *two["recomputed"]]:
        gaps, kept = zip(*(modes[mode] for mode in ("none", "selective", "full")), strict=True)
        # an MoE layer as one node of the graph adds up the gradients of router and experts before the rest: rounding
        assert gaps[0] == gaps[2] == 0.0 and gaps[1] < 5e-6
        assert kept[0] > 1.1 * kept[1] and kept[1] > 1.4 * kept[2], kept  # the weights are in all three


def test_the_load_balancing_loss_is_that_of_switch_transformers(checkpoint, one):
    """Independent source: transformers' router logits, and the formula of arXiv 2101.03961 written out, layer by layer."""
    import torch
    from transformers import AutoModelForCausalLM

    from tests.dist.learner_cases import fixed_batch

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
    batch, total, logits = fixed_batch(), 0.0, []
    for s in range(len(batch)):
        row = batch.select([s])
        out = model(row.tokens[None], output_router_logits=True)
        log_probs = torch.log_softmax(out.logits[0, :-1].float(), -1).gather(1, row.tokens[1:, None])[:, 0]
        total = total - (row.token_weights[1:] * log_probs).sum()
        logits.append(torch.stack(out.router_logits))
    scores = torch.cat(logits, dim=1).softmax(-1)  # [layers, tokens, E]
    layers, tokens, experts = scores.shape
    chosen = torch.zeros_like(scores).scatter_(2, scores.topk(2).indices, 1.0)
    aux = (experts * chosen.sum(1) / (2 * tokens) * scores.sum(1) / tokens).sum()
    (total + AUX * aux).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert one["balanced"][0][2] == pytest.approx(norm.item(), rel=5e-5)


@pytest.mark.parametrize("name", BALANCED)
def test_the_load_balancing_loss_is_that_of_the_whole_row(request, one, name):
    """Padding, which differs between layouts, has no say in it."""
    ranks = request.getfixturevalue("two" if BALANCED[name][0] == 2 else "four")
    assert_near(ranks[f"balanced {name}"], one["balanced"], 2e-5)


def test_a_frozen_router_keeps_its_weights(one):
    free, frozen = one["routers"]
    assert frozen["routers"] == 0.0 < free["routers"] and frozen["others"] > 0.0


def test_the_spread_of_the_log_ratio_is_split_into_weights_and_routing(one):
    untouched, output_layer, routers = one["spread"]
    std = {name: f"routing/log_ratio_std_{name}" for name in ("live", "replayed", "difference")}
    assert untouched[std["live"]] == untouched[std["replayed"]] == 0.0
    assert output_layer[std["live"]] == output_layer[std["replayed"]] > 0.0 == output_layer[std["difference"]]
    assert output_layer["routing/update_changed"] == 0.0 < routers["routing/update_changed"]
    assert routers[std["difference"]] > 0.0
    assert 0.0 < routers["routing/log_ratio_seq_std_live"] < routers[std["live"]]


@pytest.mark.parametrize("name", SPREAD)
def test_the_spread_of_the_log_ratio_is_that_of_one_process(one, two, name):
    for rank in two[f"spread {name}"]:
        for mine, expected in zip(rank, one["spread"], strict=True):
            measured = {name: value for name, value in expected.items() if "log_ratio" in name or "inverse" in name}
            assert {name: mine.get(name) for name in measured} == pytest.approx(measured, rel=1e-3, abs=1e-6)
