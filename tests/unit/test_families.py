"""Every family on one process: logits and gradients of transformers, the same bits back, the same config.json."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megarl.config import Config, Model
from megarl.config.schema import Parallel
from megarl.convert import family, load_hf, read_spec, save_hf, stream_hf
from megarl.convert.hf_io import read_config
from megarl.errors import BadInput
from megarl.parallel import Mesh
from tests.dist.convert_cases import gradient_gaps, logits, same, tokens, write_gradients
from tests.families import SHAPE, all_cases

CASES = all_cases()


@pytest.fixture(scope="module")
def mesh():
    import torch.distributed as dist

    yield Mesh.build(Parallel())
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def loaded(folder, mesh):
    """(chunks, spec) of a checkpoint."""
    from megarl.models.build import build_model

    spec = read_spec(folder)
    chunks = build_model(spec, Model(path=str(folder)), mesh, Parallel())
    for parameter in chunks[0].parameters():
        torch.nn.init.constant_(parameter, float("nan"))  # what load_hf leaves out is seen
    load_hf(folder, chunks, spec, mesh)
    return chunks, spec


@pytest.mark.parametrize("name", CASES)
def test_logits_bits_and_config(name, mesh, tmp_path):
    reference = CASES[name].write(tmp_path / "in")
    chunks, spec = loaded(tmp_path / "in", mesh)
    with torch.no_grad():
        expected = reference(tokens(spec.vocab_size)).logits[0]
    assert expected.abs().max() > 0.5
    assert (logits(chunks, spec, mesh) - expected).abs().max() <= 1e-5

    before = load_file(tmp_path / "in" / "model.safetensors")
    save_hf(tmp_path / "out", chunks, spec, mesh)
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert set(after) == set(before)
    assert same(after, before)
    written = family(spec.family).write_config(spec)
    assert read_spec(tmp_path / "out") == spec  # the config.json written from the spec
    again = type(reference).from_pretrained(tmp_path / "out", attn_implementation="eager")
    with torch.no_grad():
        assert torch.equal(again(tokens(spec.vocab_size)).logits[0], expected)
    assert written["model_type"] == read_config(tmp_path / "in")["model_type"]


@pytest.mark.parametrize("name", CASES)
def test_gradients(name, mesh, tmp_path):
    """Of every weight, those of transformers to float32's rounding."""
    reference = CASES[name].write(tmp_path / "in")
    chunks, spec = loaded(tmp_path / "in", mesh)
    write_gradients(reference, tmp_path / "gradients")
    for weight, gap in gradient_gaps(chunks, spec, mesh, tmp_path / "gradients").items():
        assert gap <= 1e-4, weight


def test_the_selection_bias_is_float32_whatever_the_model_is(mesh, tmp_path):
    from megarl.learner.policy import Policy

    CASES["glm4_moe"].write(tmp_path / "in")
    cfg = Config(model=Model(path=str(tmp_path / "in"), dtype="bfloat16"))
    policy = Policy.from_hf(tmp_path / "in", cfg, mesh)
    held = dict(stream_hf(policy.modules, policy.spec, mesh))
    for name, tensor in load_file(tmp_path / "in" / "model.safetensors").items():
        is_bias = name.endswith("e_score_correction_bias")
        assert torch.equal(held[name], tensor if is_bias else tensor.bfloat16()), name
    save_hf(tmp_path / "out", policy.modules, policy.spec, mesh, dtype="bfloat16")
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert tensor.dtype == (torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16), name


def spec_of(config):
    return family(config["model_type"]).read_config(config)


@pytest.mark.parametrize("name", sorted({case.config for case in CASES.values()}))
def test_absent_keys_mean_what_transformers_assumes(name):
    """Of the model that transformers' class is without any settings, every key may be left out or is asked for by name."""
    import transformers

    settings = {"num_experts_per_tok": 6} if name == "DeepseekV2Config" else {}  # the class has none
    full = getattr(transformers, name)(**settings).to_dict()
    spec, asked_for = spec_of(full), 0
    rope = ("rope_parameters", "partial_rotary_factor")  # which say the same twice
    for gone in [*((key,) for key in full if key != "model_type"), rope]:
        try:
            found = spec_of({key: kept for key, kept in full.items() if key not in gone})
        except BadInput as error:
            assert "is missing; add it" in str(error)
            asked_for += 1
        else:
            # what is set aside is no part of the model; without the key nothing is
            assert gone[0] in settings or replace(found, mtp_layers=spec.mtp_layers) == spec, gone
    assert asked_for < len(full) / 2


def published(model):
    return json.loads((Path(__file__).parents[2] / "configs" / "models" / model / "config.json").read_text())


# As published, without what is harmless: names, tokens, training.
PUBLISHED = {
    "Qwen/Qwen1.5-MoE-A2.7B": {
        "model_type": "qwen2_moe", "attention_dropout": 0.0, "decoder_sparse_step": 1, "hidden_act": "silu",
        "hidden_size": 2048, "intermediate_size": 5632, "max_position_embeddings": 8192, "max_window_layers": 21,
        "moe_intermediate_size": 1408, "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 60,
        "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 16, "output_router_logits": False,
        "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": 5632, "sliding_window": 32768, "tie_word_embeddings": False,
        "use_sliding_window": False, "vocab_size": 151936,
    },
    "meta-llama/Llama-3.1-8B": {
        "model_type": "llama", "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu", "hidden_size": 4096,
        "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "rope_theta": 500000.0, "tie_word_embeddings": False, "vocab_size": 128256,
    },
    "mistralai/Mixtral-8x7B-v0.1": published("mixtral-8x7b"),
    "allenai/OLMoE-1B-7B-0924": {
        "model_type": "olmoe", "attention_bias": False, "attention_dropout": 0.0, "clip_qkv": None, "hidden_act": "silu",
        "hidden_size": 2048, "intermediate_size": 1024, "max_position_embeddings": 4096, "norm_topk_prob": False,
        "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 16,
        "num_key_value_heads": 16, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0,
        "router_aux_loss_coef": 0.01, "tie_word_embeddings": False, "vocab_size": 50304,
    },
    "deepseek-ai/DeepSeek-V2": {
        "model_type": "deepseek_v2", "attention_bias": False, "attention_dropout": 0.0, "aux_loss_alpha": 0.001,
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"}, "ep_size": 1, "first_k_dense_replace": 1,
        "hidden_act": "silu", "hidden_size": 5120, "intermediate_size": 12288, "kv_lora_rank": 512,
        "max_position_embeddings": 163840, "moe_intermediate_size": 1536, "moe_layer_freq": 1, "n_group": 8,
        "n_routed_experts": 160, "n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 128,
        "num_experts_per_tok": 6, "num_hidden_layers": 60, "num_key_value_heads": 128, "pretraining_tp": 1,
        "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
        "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
                         "original_max_position_embeddings": 4096, "type": "yarn"},
        "rope_theta": 10000, "routed_scaling_factor": 16.0, "scoring_func": "softmax", "seq_aux": True,
        "tie_word_embeddings": False, "topk_group": 3, "topk_method": "group_limited_greedy", "v_head_dim": 128,
        "vocab_size": 102400,
    },
    "deepseek-ai/DeepSeek-V3": published("deepseek-v3"),
    "zai-org/GLM-4.5": published("glm-4.5"),
    "zai-org/GLM-4.5-Air": published("glm-4.5-air"),
    "Qwen/Qwen3-235B-A22B": published("qwen3-235b-a22b"),
    "openai/gpt-oss-120b": published("gpt-oss-120b"),
}  # fmt: skip
BILLIONS = {  # parameters as their makers state them, without further-token prediction
    "Qwen/Qwen1.5-MoE-A2.7B": 14.3, "meta-llama/Llama-3.1-8B": 8.0, "mistralai/Mixtral-8x7B-v0.1": 46.7,
    "allenai/OLMoE-1B-7B-0924": 6.9, "deepseek-ai/DeepSeek-V2": 236, "deepseek-ai/DeepSeek-V3": 671,
    "zai-org/GLM-4.5": 355, "zai-org/GLM-4.5-Air": 106, "Qwen/Qwen3-235B-A22B": 235, "openai/gpt-oss-120b": 116.8,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_read_in_both_forms(name):
    """transformers 4 form as published and transformers 5 form are one model, of the size its makers state."""
    from transformers import CONFIG_MAPPING

    config = PUBLISHED[name]
    spec = spec_of(config)
    kind = CONFIG_MAPPING[config["model_type"]]
    again = kind(**{key: value for key, value in config.items() if key not in ("model_type", "auto_map")}).to_dict()
    assert "rope_parameters" in again
    assert spec_of(again) == spec
    assert spec_of(family(spec.family).write_config(spec)) == spec
    numbers = sum(math.prod(size) for size in family(spec.family).hf_shapes(spec).values())
    assert numbers / 1e9 == pytest.approx(BILLIONS[name], rel=0.01)


@pytest.mark.parametrize("name", CASES)
def test_bytes_through_every_shard(name, tmp_path):
    """What `megarl verify conversion` does to weights too large for a model: no process group, no model."""
    from megarl.convert.load import layout_problem, open_weights
    from megarl.verify.conversion import round_trip
    from megarl.verify.layouts.names import parse

    CASES[name].write(tmp_path)
    spec = read_spec(tmp_path)
    reader, before = open_weights(tmp_path, spec), load_file(tmp_path / "model.safetensors")
    layouts = [parse(layout) for layout in ("one", "tp2", "ep2", "etp2")]
    for layout in layouts:
        if not layout_problem(spec, layout.parallel()):
            assert round_trip(reader, spec, layout) == (len(before), sum(tensor.nbytes for tensor in before.values()))


def test_a_layout_that_cuts_a_key_value_head_is_refused():
    from megarl.convert.load import layout_problem

    spec = replace(spec_of(PUBLISHED["allenai/OLMoE-1B-7B-0924"]), num_heads=12, num_kv_heads=6)
    assert layout_problem(spec, Parallel(tp=4)) == "6 key/value heads over tp = 4 do not divide"
    assert layout_problem(spec, Parallel(tp=12)) is None


def test_what_layouts_know_without_torch_is_what_the_tables_say():
    """`config.families` repeats of the tables what a layout is checked with before anything is imported."""
    from megarl.config import families
    from megarl.convert import FAMILIES

    assert families.FAMILIES.keys() == FAMILIES.keys() == {read["model_type"] for read in map(_settings, CASES.values())}
    for case in CASES.values():
        config = _settings(case)
        spec, known = spec_of(config), families.normalised(config)
        assert families.is_moe(config) == spec.is_moe
        assert families.has_dense_mlp(config) == (len(spec.moe_layers) < spec.num_layers)
        if spec.is_moe:
            assert (known["num_experts"], known["moe_intermediate_size"]) == (spec.num_experts, spec.moe_intermediate_size)
        assert (spec.family in families.EXPERT_BIASES) == spec.expert_bias


def _settings(case):
    import transformers

    return getattr(transformers, case.config)(**(SHAPE | case.settings)).to_dict()
