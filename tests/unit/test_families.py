"""Every family on one process: logits and gradients of transformers, the same bits back, the same config.json."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from megarl.config import Config, Model
from megarl.config.schema import Parallel
from megarl.convert import family, load_hf, read_spec, save_hf, stream_gradients, stream_hf
from megarl.convert.hf_io import read_config
from megarl.parallel import Mesh
from tests.dist.convert_cases import TOKENS, hidden_states, logits, same, tokens
from tests.families import all_cases

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
    from megarl.models.layers.lm_head import output_weight

    reference = CASES[name].write(tmp_path / "in")
    (chunk,), spec = loaded(tmp_path / "in", mesh)
    upstream = torch.randn(TOKENS, spec.vocab_size, generator=torch.Generator().manual_seed(7))
    (reference(tokens(spec.vocab_size)).logits[0] * upstream).sum().backward()
    (hidden_states(chunk, spec)[0] @ output_weight(chunk).t() * upstream).sum().backward()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.copy_(parameter.grad)
        for parameter in chunk.parameters():
            parameter.main_grad = parameter.grad
    reference.save_pretrained(tmp_path / "gradients")  # under the names of a checkpoint
    expected = load_file(tmp_path / "gradients" / "model.safetensors")
    found = {name: gradient.clone() for name, gradient in stream_gradients([chunk], spec, mesh)}
    assert set(found) == {name for name in expected if "e_score_correction_bias" not in name}
    for name, gradient in found.items():
        assert expected[name].any() or ".experts." in name, name  # an expert may have no token
        assert (gradient - expected[name]).norm() <= 1e-4 * expected[name].norm(), name


def test_the_selection_bias_is_float32_whatever_the_model_is(mesh, tmp_path):
    from megarl.learner.policy import Policy

    CASES["glm4_moe"].write(tmp_path / "in")
    cfg = Config(model=Model(path=str(tmp_path / "in"), dtype="bfloat16"))
    policy = Policy.from_hf(tmp_path / "in", cfg, mesh)
    held = dict(stream_hf(policy.modules, policy.spec, mesh))
    for name, tensor in load_file(tmp_path / "in" / "model.safetensors").items():
        is_bias = name.endswith("e_score_correction_bias")
        assert torch.equal(held[name], tensor if is_bias else tensor.bfloat16()), name
