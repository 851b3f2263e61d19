"""A sync makes the engine's log-probs the learner's, in any layout; a broken one stops the run and says what differs."""

from __future__ import annotations

import pytest

from tests.dist.harness import run_ranks
from tests.dist.vllm_cases import make_checkpoint

SYNC = "tests.dist.vllm_cases:sync"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_checkpoint(str(tmp_path_factory.mktemp("sync") / "model"))


@pytest.fixture(scope="module")
def square(tmp_path_factory):
    """Experts are square, so that a transposed one fits."""
    return make_checkpoint(str(tmp_path_factory.mktemp("square") / "model"), moe_intermediate_size=64)


@pytest.fixture(scope="module")
def ranks(square):
    return run_ranks(SYNC, 2, square, timeout=300, ep=2, ways=True)


def test_an_engine_without_weights_is_refused(ranks):
    assert "these tensors differ: embed_tokens, input_layernorm in layers 0, 1, 2, 3" in ranks[0]["unsynced"]


def test_a_sync_brings_the_gap_under_the_threshold(ranks):
    for rank in ranks:
        assert rank["synced"][0] <= 1e-5
        assert rank["synced"][1] <= 1e-4
        assert rank["version"] == 5


def test_the_plan_counts_the_bytes_of_the_checkpoint(ranks, square):
    from safetensors.torch import load_file

    tensors = load_file(f"{square}/model.safetensors").values()
    assert ranks[0]["bytes"] == sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_a_rank_gets_what_it_lacks_and_nothing_else(ranks):
    """Half of every layer's experts, which the other expert-parallel rank holds."""
    experts = 4 * 8 * 3 * 64 * 64 * 4
    for rank in ranks:
        assert rank["traffic"] == {
            "local": rank["bytes"] - experts // 2,
            "received": experts // 2,
            "bound": experts // 2,
        }


def test_copies_stay_below_two_layers(ranks):
    for rank in ranks:
        assert rank["in_place"]
        for peak in (rank["peak_copies"], rank["windows"]["peak"], rank["messages"]["peak"]):
            assert 0 < peak <= 2 * rank["largest_layer"]


def test_parameters_that_moved_are_read_where_they_are(ranks):
    for rank in ranks:
        assert rank["moved"] == rank["synced"]


@pytest.mark.parametrize("way", ["windows", "messages", "reload"])
def test_other_ways_bring_the_same_weights(ranks, way):
    """By messages through memory that ranks share, without, and full tensors through vLLM's own reload: the log-probs are those of the first sync."""
    for rank in ranks:
        assert rank[way]["gap"] == rank["synced"]
        assert rank[way]["traffic"]["bound"] == rank["traffic"]["received"]
        assert ("full tensors through vLLM's reload, because it is asked for" in rank[way]["line"]) == (way == "reload")


def test_columns_of_a_matrix_are_packed_as_the_matrix_would_be(ranks):
    assert [rank["cut"] for rank in ranks] == ["accepted", "accepted"]


def test_parked_weights_are_read_where_they_are(ranks):
    """None of them is where it is computed with, before, in between and after the sync; its extra memory is as the ledger
    has it, and at most two layers."""
    for rank in ranks:
        parked = rank["parked"]
        assert parked["gap"] == rank["synced"] and parked["differing"] == []
        assert parked["left"] == 0 and parked["still"] and parked["same"]
        assert 0 < parked["needed"] <= 2 * rank["largest_layer"]
        assert parked["peak"] <= 2 * rank["largest_layer"]


def test_the_ledger_counts_what_a_sync_needs(ranks):
    """Against every tensor that came and went: all messages, and no more than the engine's packing beside them."""
    for rank in ranks:
        assert rank["needed"]["messages"] <= rank["messages"]["peak"] <= rank["needed"]["messages"] + rank["largest_layer"]
        assert rank["needed"]["messages"] <= 2 * rank["largest_layer"]


def test_the_planner_knows_what_a_sync_and_the_engine_need(ranks):
    for rank in ranks:
        assert rank["planned"]["messages"] == rank["needed"]["messages"] > 0
        assert rank["planned"]["weights"] == pytest.approx(rank["weights"], rel=2e-3)  # routers' counters are left out


def test_what_goes_wrong_on_the_way_is_named(ranks):
    for number, rank in enumerate(ranks):
        assert "the prefix cache is stale" in rank["stale_cache"]
        assert "the stream ended without model.layers.1.self_attn.q_norm.weight" in rank["skipped"]
        assert "no rule of the qwen3_moe table names the parameter decoder.final_layernorm.extra" in rank["unexpected"]
        assert f"decoder.final_layernorm.weight has the shape (3,) on rank {number}" in rank["misshapen"]


@pytest.mark.parametrize(
    "broken, names",
    [
        ("swapped", [f"experts.{e}.{m}_proj" for m in ("gate", "up", "down") for e in (3, 5)]),
        ("halves", ["layers.0.mlp.experts.4.gate_proj.weight", "layers.0.mlp.experts.4.up_proj.weight"]),
        ("transposed", ["layers.3.mlp.experts.1.down_proj.weight"]),
        ("norm", ["layers.2.post_attention_layernorm.weight"]),
        ("values", ["layers.0.self_attn.v_proj.weight"]),
    ],
)
def test_checksums_name_every_tensor(ranks, broken, names):
    for rank in ranks:
        assert rank["sums"]["synced"] == "equal"
        found = rank["sums"][broken]
        assert found.count(" on rank 0") == len(names) and all(name in found for name in names)


@pytest.mark.parametrize(
    "broken, named",
    [
        ("swapped", "these tensors differ: experts.gate_proj/up_proj in layer 2 (experts 3, 5)"),  # any square down fits
        ("swapped_down", "these tensors differ: experts.down_proj in layer 1 (experts 0, 7)"),
        ("halves", "these tensors differ: experts.gate_proj/up_proj in layer 0 (experts 4)"),
        ("transposed", "these tensors differ: experts.down_proj in layer 3 (experts 1)"),
        ("norm", "these tensors differ: post_attention_layernorm in layer 2"),
        ("values", "these tensors differ: self_attn.v_proj in layer 0"),
    ],
)
def test_a_broken_sync_names_the_tensors(ranks, broken, named):
    for rank in ranks:
        assert rank[broken].endswith(named)
        assert "\n" not in rank[broken]


def test_a_layer_the_engine_did_not_get_is_named(ranks):
    text = ranks[0]["layer"]
    for name in (
        "self_attn.q_proj in layer 3",
        "mlp.gate in layer 3",
        "experts.gate_proj/up_proj in layer 3",
    ):
        assert name in text
    assert "layer 2" not in text


def test_a_good_sync_after_a_broken_one_mends_it(ranks):
    assert ranks[0]["mended"] == ranks[0]["synced"]


def test_equal_weights_and_a_few_tokens_apart_are_a_routing_tie(ranks):
    assert ranks[0]["few_tokens"][0] > 1e-2


def test_equal_weights_and_most_tokens_apart_are_not(ranks):
    assert "all weights are equal" in ranks[0]["all_tokens"]


def test_weights_of_the_last_step_are_seen(ranks):
    assert "these tensors differ" in ranks[0]["stale"]


def test_a_stream_that_skips_a_layer_is_refused(ranks):
    for rank in ranks:
        assert (
            "where the plan has model.layers.2.input_layernorm.weight (input_layernorm, layer 2)"
            in rank["short_stream"]
        )


OTHER = {
    "mixed": dict(ep=2, dtype="bfloat16", learner="float32"),
    "experts": dict(ep=2, rollout=dict(tensor_parallel=2, expert_parallel=True)),
    "tensor": dict(tp=2, rollout=dict(tensor_parallel=2)),
    "bfloat16": dict(pp=2, dtype="bfloat16"),
    "lock-step": dict(tp=2, rollout=dict(data_parallel=2, expert_parallel=True)),
}
SLOW = ("mixed", "experts", "tensor", "bfloat16", "lock-step")  # syncs of these engines, right and wrong: test_rollout_layouts.py


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in OTHER])
def test_other_layouts(path, name):
    settings = OTHER[name]
    for rank in run_ranks(SYNC, 2, path, timeout=300, **settings):
        assert rank["synced"][0] <= (5e-2 if settings.get("dtype") == "bfloat16" else 1e-5)
        assert 0 < rank["peak_copies"] <= 2 * rank["largest_layer"]
        assert "experts.gate_proj/up_proj/down_proj in layer 2 (experts 3, 5)" in rank["swapped"]
        if "dtype" not in settings:
            assert rank["mended"] == rank["synced"]
            assert "experts.down_proj in layer 1 (experts 0, 7)" in rank["swapped_down"]


def test_a_tied_output_layer_follows_the_embedding(tmp_path):
    """And vLLM's reload, without the patch that packs it again, leaves it as it was: the patch is still needed."""
    path = make_checkpoint(str(tmp_path / "tied"), "qwen3", tie_embeddings=True)
    for rank in run_ranks("tests.dist.vllm_cases:sync_twice", 2, path, timeout=300, tp=2):
        for name in ("first", "second"):
            assert rank[name]["gap"] <= 1e-5
            assert rank[name]["differing"] == []
        assert rank["unpatched"]["differing"] == ["lm_head"]
