"""gpt-oss as published: its config.json, and its experts in MXFP4."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from megarl.convert import family, load_hf, read_spec, save_hf
from megarl.convert.reader import HFReader
from megarl.errors import BadInput
from megarl.models.spec import Rope
from tests.families import all_cases

# gpt-oss-20b
V4 = {
    "architectures": ["GptOssForCausalLM"], "attention_bias": True, "attention_dropout": 0.0, "eos_token_id": 200002,
    "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2880, "initial_context_length": 4096,
    "initializer_range": 0.02, "intermediate_size": 2880, "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072, "model_type": "gpt_oss", "num_attention_heads": 64, "num_experts_per_tok": 4,
    "num_hidden_layers": 24, "num_key_value_heads": 8, "num_local_experts": 32, "output_router_logits": False,
    "pad_token_id": 199999, "rms_norm_eps": 1e-05, "rope_scaling": {
        "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096, "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0,
    "tie_word_embeddings": False, "transformers_version": "4.55.0.dev0", "use_cache": True, "vocab_size": 201088,
}  # fmt: skip
QUANTISED = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"],
}


def spec_of(config):
    return family("gpt_oss").read_config(config)


def by_transformers(config):
    from transformers import GptOssConfig

    return GptOssConfig(**{k: v for k, v in config.items() if k != "transformers_version"}).to_dict()


def test_published_configuration(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(V4 | {"quantization_config": QUANTISED}))
    spec = read_spec(tmp_path)
    assert spec.rope == Rope(150_000.0, 64, "yarn", factor=32.0, original_context=4096, truncate=False)
    assert (spec.num_experts, spec.top_k, spec.moe_intermediate_size, spec.num_kv_heads) == (32, 4, 2880, 8)
    assert spec.windows == (128, 0) * 12 and spec.moe_layers == tuple(range(24))
    assert spec.qkv_bias and spec.output_bias and spec.sinks and spec.router_bias and spec.expert_bias
    assert spec_of(by_transformers(V4)) == spec
    assert spec_of(family("gpt_oss").write_config(spec)) == spec
    assert spec_of(by_transformers(family("gpt_oss").write_config(spec))) == spec


def test_absent_keys_mean_what_transformers_assumes():
    optional = ("num_local_experts", "experts_per_token", "num_experts_per_tok", "head_dim", "rms_norm_eps", "rope_theta")
    optional += ("rope_scaling", "layer_types", "sliding_window", "attention_bias", "tie_word_embeddings", "swiglu_limit")
    bare = {k: v for k, v in V4.items() if k not in optional}
    assert spec_of(bare) == spec_of(by_transformers(bare))


REFUSED = {
    "swiglu_limit": 6.0,
    "swiglu_alpha": 1.0,
    "layer_types": ["chunked_attention"] * 24,
    "sliding_window": 0,
    "experts_per_token": 2,
    "initial_context_length": 8192,
    "attention_dropout": 0.1,
    "hidden_act": "gelu",
    "attention_chunk_size": 8,
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_changes_the_numbers_is_refused_by_name(key):
    with pytest.raises(BadInput, match=key) as caught:
        spec_of(V4 | {key: REFUSED[key]})
    assert "\n" not in str(caught.value)


@pytest.fixture
def quantised(tmp_path):
    """A checkpoint folder with experts of random codes, and the same as plain floats by transformers."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    all_cases()["gpt_oss"].write(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    floats, stored = {}, {}
    for name, tensor in tensors.items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            floats[name] = stored[name] = tensor.bfloat16()
            continue
        count, columns, rows = tensor.shape
        blocks = torch.randint(0, 256, (count, rows, columns // 32, 16), generator=generator).byte()
        scales = torch.randint(119, 126, blocks.shape[:3], generator=generator).byte()
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        floats[name] = convert_moe_packed_tensors(blocks, scales).contiguous()
        assert floats[name].shape == tensor.shape
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": QUANTISED}))
    return tmp_path, floats


def test_mxfp4_is_read_as_transformers_does_and_exported_as_floats(quantised, tmp_path):
    import torch.distributed as dist
    from megatron.core import parallel_state
    from transformers import AutoModelForCausalLM

    from megarl.config.schema import Model, Parallel
    from megarl.models.build import build_model
    from megarl.parallel import Mesh

    folder, floats = quantised
    name = "model.layers.1.mlp.experts.gate_up_proj"
    part = (slice(2, 5), slice(17, 50), slice(3, 40))
    assert torch.equal(HFReader(folder).read(name, part), floats[name][part].float())

    mesh, spec = Mesh.build(Parallel()), read_spec(folder)
    chunks = build_model(spec, Model(path=str(folder), dtype="bfloat16"), mesh, Parallel())
    load_hf(folder, chunks, spec, mesh)
    save_hf(tmp_path / "out", chunks, spec, mesh, extra_from=folder)
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == floats.keys()
    assert all(written[name].dtype == torch.bfloat16 and torch.equal(written[name], floats[name]) for name in floats)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert torch.equal(again[name].float(), floats[name].float())
