"""Every family on one process: logits of transformers, the same bits back, the same config.json."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from megarl.config.schema import Model, Parallel
from megarl.convert import family, load_hf, read_spec, save_hf
from megarl.convert.hf_io import read_config
from megarl.parallel import Mesh
from tests.dist.convert_cases import logits, same, tokens
from tests.families import all_cases

CASES = all_cases()


@pytest.fixture(scope="module")
def mesh():
    import torch.distributed as dist

    yield Mesh.build(Parallel())
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


@pytest.mark.parametrize("name", CASES)
def test_logits_bits_and_config(name, mesh, tmp_path):
    from megarl.models.build import build_model

    reference = CASES[name].write(tmp_path / "in")
    spec = read_spec(tmp_path / "in")
    chunks = build_model(spec, Model(path=str(tmp_path / "in")), mesh, Parallel())
    for parameter in chunks[0].parameters():
        torch.nn.init.constant_(parameter, float("nan"))  # what load_hf leaves out is seen
    load_hf(tmp_path / "in", chunks, spec, mesh)
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
