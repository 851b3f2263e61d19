"""What a model and a layout cost on paper: against published figures, counts by hand, and what must hold for any layout."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megarl import platform
from megarl.config import load_config
from megarl.config.schema import Generate
from megarl.errors import BadInput
from megarl.models.generate import spec_of
from megarl.plan.hardware import CHIPS, named
from megarl.plan.seconds import PHASES, _Decode, phase_seconds, rollout, send_seconds, step_seconds, update
from megarl.plan.shape import ModelShape, Rows, Workload, causal_pairs
from megarl.plan.volume import (
    Volume,
    checkpoint_bytes,
    forward_volumes,
    layout_of,
    sync_plan,
    sync_volume,
    total,
    update_volumes,
)

platform.setup()
ROOT = Path(__file__).parents[2]
MODELS = ROOT / "configs" / "models"
SHAPE = dict(hidden_size=64, num_layers=4, num_heads=8, num_kv_heads=2, head_dim=16, intermediate_size=96)
EXPERTS = dict(num_experts=8, top_k=2, moe_intermediate_size=32)
SMALL = ModelShape.of(replace(spec_of(Generate(**SHAPE, **EXPERTS)), vocab_size=128, moe_layers=(0, 1, 3)))

ROWS = Rows(micro_batches=4, tokens=512, sequences=4, pairs=4 * 1000)


def config(**parallel):
    text = " ".join(f"{key}: {value}," for key, value in parallel.items())
    return f"""
model: {{path: none-yet, dtype: bfloat16}}
parallel: {{{text}}}
rl: {{data: [{{type: jsonl, path: x}}], prompts_per_step: 16, samples_per_prompt: 8, micro_batch_tokens: 1024}}
rollout: {{max_response_tokens: 256}}
"""


@pytest.fixture
def layout(tmp_path):
    def build(world, rows=ROWS, shape=SMALL, overrides=(), **parallel):
        file = tmp_path / "config.yaml"
        file.write_text(config(**parallel))
        return layout_of(load_config(file, list(overrides)), shape, world, rows)

    return build


# -- the model -----------------------------------------------------------------------------------------------------

# billions of parameters, all and active, as their makers state them; whether the active ones count the input embedding
PUBLISHED = {
    "qwen3-30b-a3b": (30.5, 3.3, True),
    "qwen3-235b-a22b": (235, 22, True),
    "deepseek-v3": (671, 37, True),
    "glm-4.5": (355, 32, False),
    "glm-4.5-air": (106, 12, False),
    "mixtral-8x7b": (46.7, 12.9, True),
    "gpt-oss-120b": (116.8, 5.13, False),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_operations_of_a_token_are_twice_the_published_active_parameters(name):
    shape = ModelShape.from_folder(MODELS / name)
    parameters, active, with_embedding = PUBLISHED[name]
    assert shape.parameters / 1e9 == pytest.approx(parameters, rel=0.01)
    counted = shape.forward_flops + (2 * shape.embedding if with_embedding else 0)
    assert counted / 2e9 == pytest.approx(active, rel=0.03 if name != "glm-4.5-air" else 0.07)  # "12B" of 12.8


def test_parameters_are_those_of_the_checkpoint():
    from megarl.convert import family

    for shape in (SMALL, ModelShape.of(spec_of(Generate(family="qwen3", tie_embeddings=True, **SHAPE)))):
        sizes = family(shape.spec.family).hf_shapes(shape.spec)
        assert shape.parameters == sum(map(math.prod, sizes.values()))
        assert shape.expert_parameters == sum(math.prod(size) for name, size in sizes.items() if ".experts." in name)


@pytest.mark.parametrize("tokens, window", [(7, 0), (7, 3), (3, 7), (9, 9)])
def test_pairs_are_those_of_a_causal_mask(tokens, window):
    seen = sum(min(query + 1, window or tokens) for query in range(tokens))
    assert causal_pairs(tokens, window) == seen


def test_cache_of_a_token_by_hand():
    assert ModelShape.from_folder(MODELS / "qwen3-30b-a3b").cache_bytes(2) == 48 * 2 * 4 * 128 * 2
    assert ModelShape.from_folder(MODELS / "deepseek-v3").cache_bytes(2) == 61 * (512 + 64) * 2  # DeepSeek-V2: 70 KB


def test_lengths_have_the_mean_that_was_asked_for_and_a_longest_one():
    work = Workload(8, 8, 100, 300, 900)
    lengths = work.lengths(512)
    assert sum(lengths) / 512 == pytest.approx(300, rel=1e-6) and list(lengths) == sorted(lengths)
    assert max(lengths) == 900 and min(lengths) >= 1
    rows = Rows.of(work, SMALL, dp=2)
    assert rows.micro_batches * rows.tokens * 2 == pytest.approx(work.tokens)
    assert rows.tokens <= work.micro_batch_tokens
    assert rows.micro_batches * rows.sequences * 2 == pytest.approx(64)


# -- volumes -------------------------------------------------------------------------------------------------------

T, H, B = 512, 64, 2  # tokens of a row, hidden size, bytes of bfloat16


def by(volumes, group):
    return {(v.what, v.operation): v.payload for v in volumes if v.group == group}


def test_nothing_is_sent_by_one_rank(layout):
    assert not forward_volumes(layout(1), 0) and not update_volumes(layout(1), 0)


def test_tensor_parallel_by_hand(layout):
    """Every layer gathers before and scatters after its attention and its dense MLP; experts that are whole do not."""
    one = layout(2, tp=2, ep=2)
    found = by(forward_volumes(one, 0), "tp")
    rows, layers, dense = 4, 4, 1
    assert found["attention", "all-gather"] == rows * layers * T * H * B == found["attention", "reduce-scatter"]
    assert found["mlp", "all-gather"] == rows * dense * T * H * B
    assert found["embedding", "reduce-scatter"] == rows * T * H * B == found["output layer", "all-gather"]
    assert found["log-probs", "all-reduce"] == rows * T * 4 * 4
    back = by(update_volumes(one, 0), "tp")  # forward, its gradient, and the input gathered once more
    assert back["attention", "all-gather"] == 3 * found["attention", "all-gather"]
    assert back["attention", "reduce-scatter"] == 2 * found["attention", "reduce-scatter"]
    again = by(update_volumes(layout(2, tp=2, ep=2, recompute="full"), 0), "tp")
    assert again["attention", "all-gather"] == 4 * found["attention", "all-gather"]
    assert again["output layer", "all-gather"] == back["output layer", "all-gather"]  # outside the layers


def test_dispatch_by_hand(layout):
    """Each of k copies of a token with its float32 gate to its expert, and the result back."""
    found = by(forward_volumes(layout(4, ep=4), 0), "ep")
    pairs, rows, moe = T * 2, 4, 3
    assert found["dispatch", "all-to-all"] == rows * moe * pairs * (H * B + 4)
    assert found["combine", "all-to-all"] == rows * moe * pairs * H * B
    wire = {v.what: v.wire for v in forward_volumes(layout(4, ep=4), 0)}
    assert wire["combine"] == found["combine", "all-to-all"] * 3 / 4
    halves = by(forward_volumes(layout(4, tp=2, ep=4), 0), "ep")  # a rank's share of a row is half as long
    assert halves["combine", "all-to-all"] == found["combine", "all-to-all"] / 2


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_without_expert_parallelism_nothing_is_dispatched(layout, dispatcher):
    sent = update_volumes(layout(8, tp=2, ep=1, etp=1, dispatcher=dispatcher), 0)
    assert not [v for v in sent if v.what in ("dispatch", "combine", "counts")]
    assert [v for v in update_volumes(layout(8, ep=2, dispatcher=dispatcher), 0) if v.what == "dispatch"]


def test_all_gather_dispatch_by_hand(layout):
    found = by(forward_volumes(layout(2, ep=2, dispatcher="allgather"), 0), "ep")
    rows, moe = 4, 3
    assert found["dispatch", "all-gather"] == rows * moe * 2 * T * (H * B + 8 * 4)
    assert found["combine", "reduce-scatter"] == rows * moe * 2 * T * H * B


def test_context_parallel_by_hand(layout):
    one = layout(2, cp=2)
    found = by(update_volumes(one, 0), "cp")
    assert found["keys and values", "all-gather"] == 4 * 4 * T * 2 * 2 * 16 * B  # rows, layers, 2 heads of 16, twice
    assert found["keys and values", "reduce-scatter"] == found["keys and values", "all-gather"]
    assert found["sequence ratio", "all-reduce"] == 4 * 4 * 12  # three numbers of 4 sequences in each of 4 rows


def test_pipeline_by_hand(layout):
    two = layout(2, pp=2)
    sends = [by(update_volumes(two, stage), "pp")["activations", "send"] for stage in (0, 1)]
    assert sends == [4 * T * H * B] * 2  # the first sends what it computed, the second the gradient of that
    chunks = layout(2, pp=2, vpp=2)
    sends = [by(update_volumes(chunks, stage), "pp")["activations", "send"] for stage in (0, 1)]
    assert sends == [3 * 4 * T * H * B] * 2  # chunks 0 1 | 2 3: two of three borders forward and one back, and so on


def test_data_parallel_by_hand(layout):
    found = by(update_volumes(layout(4, ep=2), 0), "dp") | {
        (f"expert {what}", operation): size for (what, operation), size in by(update_volumes(layout(4, ep=2), 0), "edp").items()
    }
    experts = SMALL.expert_parameters / 2
    dense = SMALL.parameters - SMALL.expert_parameters
    assert found["gradients", "reduce-scatter"] == 4 * dense
    assert found["parameters", "all-gather"] == 2 * dense
    assert found["expert gradients", "reduce-scatter"] == 4 * experts
    whole = by(update_volumes(layout(4, ep=2, distributed_optimizer="false"), 0), "dp")
    assert whole == {("gradients", "all-reduce"): 4 * dense}


def test_fp8_parameters_are_gathered_as_bytes_but_those_of_the_ends_and_of_mxfp8(layout):
    plain = layout(4, ep=2)
    ends, experts = SMALL.embedding + SMALL.head, SMALL.expert_parameters / 2
    dense = SMALL.parameters - SMALL.expert_parameters
    expected = {"blockwise": (dense + ends, experts), "mxfp8": (2 * dense, 2 * experts)}
    for recipe, (own, of_experts) in expected.items():
        model = plain.cfg.model.model_copy(update={"dtype": "bfloat16", "fp8": recipe, "fp8_params": True})
        volumes = update_volumes(replace(plain, cfg=plain.cfg.model_copy(update={"model": model})), 0)
        assert by(volumes, "dp")["parameters", "all-gather"] == own
        assert by(volumes, "edp")["parameters", "all-gather"] == of_experts


def test_volumes_double_with_the_tokens_and_not_with_the_rows(layout):
    rows = ROWS
    degrees = dict(tp=2, pp=2, cp=2, ep=2)
    once = update_volumes(layout(16, rows, **degrees), 1)
    twice = {(v.group, v.what, v.operation): v for v in update_volumes(layout(16, replace(rows, tokens=1024), **degrees), 1)}
    fixed = ("gradients", "parameters", "shared gradients", "sequence ratio", "counts")
    for v in once:
        factor = 1 if v.what in fixed else 2
        assert twice[v.group, v.what, v.operation].payload == factor * v.payload, v
    fewer = update_volumes(layout(16, Rows(2, 1024, 8, 8000), **degrees), 1)
    assert sum(v.payload for v in fewer if v.what != "counts") == pytest.approx(
        sum(v.payload for v in once if v.what != "counts")
    )


def test_latent_attention_gathers_latents(layout):
    shape = ModelShape.from_folder(MODELS / "deepseek-v3")
    found = by(forward_volumes(layout(4, shape=shape, tp=4, pp=1), 0), "tp")
    assert found["attention", "all-gather"] == 4 * 61 * T * (1536 + 512 + 64) * B
    assert found["attention", "reduce-scatter"] == 4 * 61 * T * 7168 * B


def test_sync_volume_is_the_plans_traffic(layout):
    one = layout(4, tp=2, pp=2, overrides=["rollout.tensor_parallel=2"])
    plan = sync_plan(one.cfg, SMALL.spec, 4)
    for rank in range(4):
        found = sync_volume(plan, rank, gpus_per_node=2)
        assert found.local + found.node + found.network == plan.traffic(rank).written
        assert found.bound <= found.node + found.network
    assert sync_volume(plan, 0, gpus_per_node=4).network == 0 < sync_volume(plan, 0, gpus_per_node=2).network


def test_engines_that_vllm_reloads_are_sent_everything(layout):
    """As `WeightSync` plans it: of latent attention and of gpt-oss every rank gets full tensors."""
    for name, whole in (("deepseek-v3", True), ("gpt-oss-120b", True), ("mixtral-8x7b", False)):
        spec = ModelShape.from_folder(MODELS / name).spec
        spec = replace(spec, num_layers=2, moe_layers=(1,), windows=spec.windows[:2])
        assert sync_plan(layout(2).cfg, spec, 2).whole == whole


def test_a_checkpoint_has_weights_main_weights_and_moments(layout):
    assert checkpoint_bytes(layout(1)) == SMALL.parameters * (2 + 4 + 8)


# -- seconds -------------------------------------------------------------------------------------------------------

H100 = CHIPS["h100"]


def test_rings_and_all_to_all_over_nodes():
    """64 ranks of 8 nodes: seven eighths of an all-to-all leave the node, through one adapter; a ring has eight."""
    inside = Volume("", "tp", "", "all-gather", 8, 1, 8e9, 0)
    assert send_seconds(inside, H100) == pytest.approx(7e9 / (450e9 * 0.7))
    across = Volume("", "dp", "", "all-gather", 64, 1, 64e9, 0)
    assert send_seconds(across, H100) == pytest.approx(63e9 / min(450e9 * 0.7, 8 * 50e9 * 0.7))
    strided = replace(across, ranks=8, stride=8, payload=8e9)  # one rank a node
    assert send_seconds(strided, H100) == pytest.approx(7e9 / (50e9 * 0.7))
    shuffle = Volume("", "ep", "", "all-to-all", 64, 1, 64e9, 0)
    assert send_seconds(shuffle, H100) == pytest.approx(56e9 / (50e9 * 0.7))


@pytest.fixture(scope="module")
def qwen():
    cfg = load_config(ROOT / "configs/recipes/qwen3-30b-a3b-gspo.yaml", [f"model.path={MODELS}/qwen3-30b-a3b"])
    spec = ModelShape.from_folder(MODELS / "qwen3-30b-a3b").spec
    return cfg, ModelShape.of(replace(spec, num_layers=8, moe_layers=tuple(range(8))))  # of 48, for speed


def test_an_update_takes_six_operations_a_parameter_and_eight_with_recomputation(qwen):
    """The classical count, where nothing else is in the way: no latency, no bandwidth, every share 1."""
    cfg, shape = qwen
    cfg = cfg.model_copy(update={"model": cfg.model.model_copy(update={"head_dtype": None})})
    shares = replace(H100.efficiency, products=1.0, experts=1.0, attention=1.0, balance=1.0)
    endless = ("memory_bandwidth", "link_bandwidth", "network_bandwidth", "host_bandwidth", "host_flops")
    ideal = replace(H100, efficiency=shares, link_latency=0, network_latency=0, **dict.fromkeys(endless, 1e30))
    work = replace(Workload.of(cfg), spread=0.01, prompt=20, response=50)  # short: no scores to speak of
    for recompute, layers, head in (("none", 6, 8), ("full", 8, 8)):  # log-probs compute their logits again anyhow
        one = cfg.model_copy(update={"parallel": cfg.parallel.model_copy(update={"recompute": recompute})})
        seconds = phase_seconds(one, shape, ideal, 8, work)["update"].seconds
        flops = (layers * (shape.forward_flops / 2 - shape.head) + head * shape.head) * work.tokens
        assert seconds == pytest.approx(flops / 8 / 989.4e12, rel=0.02)


def test_more_of_everything_takes_less_time(qwen):
    cfg, shape = qwen
    times = phase_seconds(cfg, shape, H100, 32)
    assert tuple(times) == PHASES and all(t.seconds > 0 for t in times.values())
    for name in ("memory_bandwidth", "link_bandwidth", "network_bandwidth", "host_bandwidth"):
        faster = phase_seconds(cfg, shape, replace(H100, **{name: 2 * getattr(H100, name)}), 32)
        assert all(faster[phase].seconds <= times[phase].seconds for phase in PHASES)
        assert step_seconds(faster) < step_seconds(times)
    wide = phase_seconds(cfg, shape, H100, 64)
    assert wide["update"].seconds < times["update"].seconds and wide["rollout"].seconds < times["rollout"].seconds
    assert step_seconds(times, checkpoint_every=10) == pytest.approx(step_seconds(times) + times["checkpoint"].seconds / 10)
    for time in times.values():
        assert time.seconds == pytest.approx(time.compute + time.memory + time.communication + time.idle)
        assert getattr(time, time.bound) == max(time.compute, time.memory, time.communication, time.idle)


def test_the_longest_response_and_the_bubble(qwen):
    cfg, shape = qwen
    work = replace(Workload.of(cfg), response=2000)
    even, spread = (phase_seconds(cfg, shape, H100, 32, replace(work, spread=s))["rollout"] for s in (0.01, 1.0))
    assert even.detail["tail"] < 0.05 * even.seconds < spread.detail["tail"]
    assert spread.detail["decode steps"] == 8192 > 3 * even.detail["decode steps"]
    narrow = rollout(cfg, shape, H100, 32, replace(work, spread=0.5), cache_tokens=10 * (512 + 2000))
    assert 8 <= narrow.detail["slots"] <= 20  # sequences grow while they run, so that some more than ten full ones fit
    assert narrow.seconds > 2 * rollout(cfg, shape, H100, 32, replace(work, spread=0.5)).seconds
    staged = cfg.model_copy(update={"parallel": cfg.parallel.model_copy(update={"pp": 4})})
    update = phase_seconds(staged, shape, H100, 32, work)["update"]
    assert 0 < update.detail["bubble"] == pytest.approx(update.idle)


# -- hardware ------------------------------------------------------------------------------------------------------


def test_of_gradients_that_are_reduced_during_the_backward_pass_only_the_last_bucket_is_waited_for(layout):
    waited = update(layout(4, ep=2), H100).detail["dp"]
    hidden = update(layout(4, ep=2, overlap_grad_reduce="true"), H100).detail["dp"]
    volumes = [v for v in update_volumes(layout(4, ep=2), 0) if v.group == "dp" and v.what == "gradients"]
    assert waited - hidden == pytest.approx(0.8 * sum(send_seconds(v, H100) for v in volumes))


def test_a_token_reads_the_experts_that_it_chose_and_many_read_all(layout):
    cfg = layout(1).cfg
    decode = _Decode(cfg, SMALL, H100)
    experts = SMALL.expert_parameters * decode.weight_item
    one, many = (decode._bytes(live, 0.0) for live in (1, 1e6))
    assert many - one == pytest.approx(experts * (1 - EXPERTS["top_k"] / EXPERTS["num_experts"]))


def test_a_file_of_hardware_is_read_back(tmp_path):
    CHIPS["cpu"].save(tmp_path / "here.json")
    assert named(str(tmp_path / "here.json")) == CHIPS["cpu"] and named("h100") is H100


@pytest.mark.parametrize(
    "change, said",
    [
        ({"memory_bandwidth": -1}, "memory_bandwidth = -1"),
        ({"efficiency": {"products": 1.5}}, "efficiency.products = 1.5"),
        ({"efficiency": 3}, "efficiency = 3"),
        ({"speed": 1}, "speed: unknown key"),
        ({"flops": {"bfloat16": 1e12}}, "float32"),
        ({"gpus_per_node": None}, "gpus_per_node"),
    ],
)
def test_a_bad_file_of_hardware_is_refused(tmp_path, change, said):
    (tmp_path / "bad.json").write_text(json.dumps(asdict(H100) | change))
    with pytest.raises(BadInput, match=said):
        named(str(tmp_path / "bad.json"))


def test_an_unknown_chip_is_refused(tmp_path):
    with pytest.raises(BadInput, match="give one of a100, h100"):
        named("h300")
    (tmp_path / "bad.json").write_text("[")
    for name in ("bad.json", "none.json"):
        with pytest.raises(BadInput, match="give a file"):
            named(str(tmp_path / name))
    partial = asdict(H100)
    del partial["link_bandwidth"]
    (tmp_path / "bad.json").write_text(json.dumps(partial))
    with pytest.raises(BadInput, match="link_bandwidth is missing"):
        named(str(tmp_path / "bad.json"))


def test_kinds_of_one_collective_are_added_up():
    one = Volume("update", "tp", "mlp", "all-gather", 2, 1, 10.0, 1)
    assert total([one, one, replace(one, ranks=1), replace(one, payload=0.0)]) == [replace(one, payload=20.0, calls=2)]


def test_the_machine_at_hand_is_measured(monkeypatch, tmp_path):
    """Figures of this processor, in a file that plans: what was reached is the peak, so shares are 1."""
    from megarl.plan import calibrate

    monkeypatch.setattr(calibrate, "SECONDS", 0.01)
    monkeypatch.setattr(calibrate, "SIDE", {"cpu": 256})
    monkeypatch.setattr(calibrate, "MOVED", {"cpu": 1 << 24})
    found = calibrate.calibrate()
    found.save(tmp_path / "here.json")
    assert named(str(tmp_path / "here.json")) == found and found.name == "cpu, 1 rank"
    assert 1e9 < found.flops["float32"] < 1e14 and 1e8 < found.memory_bandwidth < 1e13 and found.memory_bytes > 1e9
    assert found.efficiency.products == found.efficiency.memory == 1.0 and 0 < found.efficiency.experts <= 1
