"""A checkpoint survives every layout: same logits, same bits back, on gloo processes."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import save_file

from tests.dist.checkpoints import make
from tests.dist.convert_cases import tokens
from tests.dist.harness import RanksFailed, run_in_turn, run_ranks

CASES = "tests.dist.convert_cases"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """name -> (folder, file with the logits of transformers' eager attention)"""
    root, out = tmp_path_factory.mktemp("checkpoints"), {}
    kinds = {
        "moe": ("qwen3_moe", {"norm_topk_prob": True}),
        "mixed": ("qwen3_moe", {"norm_topk_prob": True, "mlp_only_layers": [1]}),
        "tied": ("qwen3", {"tie_word_embeddings": True}),
    }
    for name, (kind, changes) in kinds.items():
        model = make(root / name, kind, **changes)
        with torch.no_grad():
            save_file({"logits": model(tokens(131)).logits[0].contiguous()}, root / f"{name}.logits")
        out[name] = (str(root / name), str(root / f"{name}.logits"))
    return out


ROUND_TRIPS = {
    2: [
        ("moe", dict(ep=2)),
        ("mixed", dict(tp=2)),
        ("moe", dict(tp=2, etp=2)),
        ("mixed", dict(pp=2)),
        ("mixed", dict(pp=2, vpp=2)),
        ("tied", dict(pp=2)),
        ("tied", dict(tp=2)),
    ],
    4: [("moe", dict(tp=2, ep=2)), ("mixed", dict(pp=2, ep=2)), ("mixed", dict(tp=2, pp=2))],
}


@pytest.mark.parametrize("nproc", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_round_trips(nproc, checkpoints, tmp_path):
    cases = {}
    for name, degrees in ROUND_TRIPS[nproc]:
        path, expected = checkpoints[name]
        expected, case = None if "pp" in degrees else expected, f"{name} {degrees}"
        cases[case] = ("round_trip", dict(path=path, out=str(tmp_path / case), degrees=degrees, expected_logits=expected))
    for case, ranks in run_in_turn(CASES, nproc, cases).items():
        for rank, result in enumerate(ranks):
            where = f"{case} rank {rank}"
            assert result["streamed_equal"], where
            assert result["exported_equal"], where
            assert result["padding"] == [0.0] * len(result["padding"]), where
            assert cases[case][1]["expected_logits"] is None or result["logits_gap"] <= 1e-5, where
        assert '"dtype": "float32"' in (tmp_path / case / "config.json").read_text()


def test_order_megatron_format_failures_and_memory(checkpoints, tmp_path):
    """One launch for four properties: starting two ranks costs more than all of them."""
    moe = checkpoints["moe"][0]
    (tmp_path / "file").write_text("x")
    make(tmp_path / "wide", "qwen3_moe", hidden_size=512, moe_intermediate_size=1360, num_hidden_layers=8)
    arguments = {
        "names": dict(path=checkpoints["mixed"][0], degrees=dict(pp=2)),
        "there_and_back": dict(path=moe, folder=str(tmp_path), there=dict(ep=2), back=dict(tp=2, etp=2)),
        "export_into": dict(path=moe, out=str(tmp_path / "file" / "out"), degrees=dict(ep=2)),
        "time_stream": dict(path=str(tmp_path / "wide"), degrees=dict(ep=2), repeats=2),
    }
    found = run_in_turn(CASES, 2, {name: (name, given) for name, given in arguments.items()})
    layer = 8 * 3 * 512 * 1360 * 4 / 2**20
    for rank, (names, identical, error, stream) in enumerate(zip(*found.values(), strict=True)):
        assert names == found["names"][0] and len(names) == len(set(names))
        assert identical, f"rank {rank}: through Megatron's format and another layout the weights changed"
        # every rank learns that rank 0 could not write
        assert error[0] == "BadInput" and "cannot be written" in error[1]
        # two layers beside the model are allowed, a second model (8 layers) is not
        assert stream["growth_mib"] < 2.5 * layer


def test_harness_shows_the_failing_rank_and_leaves_no_process(tmp_path):
    with pytest.raises(RanksFailed, match="(?s)rank 1 ended with code 1.*bad luck on rank 1"):
        run_ranks(f"{CASES}:fail_on_rank_1", 2, str(tmp_path))
    for rank in range(2):
        pid = int((tmp_path / f"pid-{rank}").read_text())
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
