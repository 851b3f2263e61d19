"""`tools/gpu_smoke.sh` without a GPU: its refusal, and the files it writes of a real pytest run."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megarl.config.schema import Generate
from megarl.models.generate import spec_of
from tests.gpu import chips

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("gpu_smoke", ROOT / "tools" / "gpu_smoke.py")
smoke = importlib.util.module_from_spec(spec)
spec.loader.exec_module(smoke)

RUN = """
import pytest

def test_good(record_property):
    record_property("tokens a second", "1,234")
    record_property("odd | name", "a | b")

def test_bad():
    assert 1 == 2, "one | is not two"

@pytest.mark.skip(reason="needs 2 GPUs, there is 1")
def test_more(): ...

@pytest.fixture
def broken():
    raise OSError("no device")

def test_broken(broken): ...
"""


@pytest.fixture(scope="module")
def junit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smoke")
    (folder / "test_some.py").write_text(RUN)
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--junit-xml", "junit.xml", "test_some.py"]
    env = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    assert subprocess.run(command, cwd=folder, env=env, capture_output=True, timeout=60).returncode == 1
    return folder / "junit.xml"


def test_rows_are_pytests(junit):
    rows = smoke.read_rows(junit)
    assert [(row["test"], row["outcome"]) for row in rows] == [
        ("test_some.test_good", "passed"),
        ("test_some.test_bad", "failed"),
        ("test_some.test_more", "skipped"),
        ("test_some.test_broken", "error"),
    ]
    good, bad, more, broken = rows
    assert good["figures"] == {"tokens a second": "1,234", "odd | name": "a | b"} and good["reason"] == ""
    assert "one | is not two" in bad["reason"] and more["reason"] == "needs 2 GPUs, there is 1"
    assert "no device" in broken["reason"] and all(row["seconds"] >= 0 for row in rows)


def test_files_hold_machine_versions_and_every_test(junit, tmp_path):
    rows, found = smoke.read_rows(junit), smoke.machine()
    assert found["versions"]["torch"] == torch.__version__ and found["versions"]["apex"] is None
    smoke.write(tmp_path / "new", rows, found, "tools/gpu_smoke.sh -k some")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["gpu_smoke.json", "gpu_smoke.md"]
    assert json.loads((tmp_path / "new" / "gpu_smoke.json").read_text()) == {"machine": found, "tests": rows}
    page = (tmp_path / "new" / "gpu_smoke.md").read_text()
    counts = "1 passed, 1 failed, 1 skipped, 1 error."
    for text in ("`tools/gpu_smoke.sh -k some`", found["date"], counts, "| apex | not there |"):
        assert text in page
    results = [line for line in page.splitlines() if line.startswith("| test_some.")]
    assert len(results) == 4 and "tokens a second: 1,234; odd \\| name: a \\| b" in results[0]
    assert all(line.replace("\\|", "").count("|") == 5 for line in results)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_what_is_missing(tmp_path, capsys):
    assert smoke.main([str(tmp_path / "results")]) == 2 and not (tmp_path / "results").exists()
    said = capsys.readouterr()
    assert said.out == "" and said.err == f"error: {smoke.missing()}\n"
    assert f"torch {torch.__version__}" in said.err and "CUDA" in said.err


def test_without_torch_too(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('not here')")
    env = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([ROOT / "tools" / "gpu_smoke.sh"], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert "torch cannot be imported" in done.stderr and "set PYTHON" in done.stderr


def test_what_it_runs_exists_and_the_spines_test_is_first():
    assert smoke.TESTS[0] == smoke.QUICKSTART and "tests/gpu" in smoke.TESTS
    for test in smoke.TESTS:
        path, _, function = test.partition("::")
        assert function.partition("[")[0] in (ROOT / path).read_text() if function else (ROOT / path).exists()


@pytest.mark.parametrize(
    ("name", "tera"),
    [("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989.4),
     ("NVIDIA B200", 2250), ("NVIDIA GeForce RTX 4090", None)],
)  # fmt: skip
def test_peaks_go_by_the_devices_name(name, tera):
    assert chips.peak(name) == (None if tera is None else tera * 1e12)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_flops_are_those_that_pytorch_counts(family):
    """Of transformers' model of the same shape. It computes all scores, causal ones are half."""
    from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

    length, shape = 48, Generate(family=family, num_layers=3)
    model_spec = spec_of(shape)
    kind = Qwen3MoeConfig if family == "qwen3_moe" else Qwen3Config
    config = kind(
        hidden_size=128, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2, head_dim=32,
        intermediate_size=256, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64, norm_topk_prob=True,
        vocab_size=model_spec.vocab_size, decoder_sparse_step=1, mlp_only_layers=[], attn_implementation="eager",
    )  # fmt: skip
    config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(length)[None] % model_spec.vocab_size)
    routers = 2 * length * 128 * 8 * 3 if family == "qwen3_moe" else 0
    full_scores = 2 * length * 3 * 8 * 32 * length  # the other half
    assert counter.get_total_flops() - routers == length * chips.forward_flops(model_spec, length) + full_scores
