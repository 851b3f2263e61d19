"""Every family under tensor, expert and pipeline parallelism: logits of transformers, the same bits back."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import save_file

from tests.dist.convert_cases import tokens
from tests.dist.harness import run_in_turn
from tests.families import all_cases

CASES = all_cases()


def world(degrees: dict[str, int]) -> int:
    """The smallest that holds the layout: ep counts inside tp x dp."""
    tp, pp, ep, etp = (degrees.get(name, 1) for name in ("tp", "pp", "ep", "etp"))
    return pp * math.lcm(tp, ep * etp)


PAIRS = [(name, degrees) for name, case in CASES.items() for degrees in case.layouts]
REFUSALS = [(name, *refusal) for name, case in CASES.items() for refusal in case.refuses]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """name -> (folder, file with transformers' logits)"""
    root, out = tmp_path_factory.mktemp("families"), {}
    for name in {name for name, *_ in PAIRS + REFUSALS}:
        model = CASES[name].write(root / name)
        with torch.no_grad():
            save_file({"logits": model(tokens(131)).logits[0].contiguous()}, root / f"{name}.logits")
        out[name] = (str(root / name), str(root / f"{name}.logits"))
    return out


@pytest.mark.parametrize("nproc", sorted({world(degrees) for _, degrees in PAIRS}))
def test_logits_and_bits(nproc, checkpoints, tmp_path):
    cases = {}
    for name, degrees in PAIRS:
        if world(degrees) == nproc:
            path, expected = checkpoints[name]
            case = f"{name} {degrees}"
            arguments = dict(path=path, out=str(tmp_path / case), degrees=degrees, expected_logits=expected)
            cases[case] = ("round_trip", arguments)
    for case, ranks in run_in_turn("tests.dist.convert_cases", nproc, cases).items():
        for rank, result in enumerate(ranks):
            where = f"{case} rank {rank}"
            assert result["streamed_equal"] and result["exported_equal"], where
            assert result["padding"] == [0.0] * len(result["padding"]), where
            assert result["logits_gap"] <= 1e-5, where


@pytest.mark.skipif(not REFUSALS, reason="every layout of every family can be")
def test_layouts_that_cannot_be_are_refused(checkpoints):
    for nproc in sorted({world(degrees) for _, degrees, _ in REFUSALS}):
        refusals = {f"{name} {degrees}": (name, degrees, part) for name, degrees, part in REFUSALS if world(degrees) == nproc}
        cases = {
            case: ("refusal", dict(path=checkpoints[name][0], degrees=degrees))
            for case, (name, degrees, _) in refusals.items()
        }
        for case, ranks in run_in_turn("tests.dist.convert_cases", nproc, cases).items():
            for kind, message in ranks:
                assert kind == "BadInput" and refusals[case][2] in message and "\n" not in message, f"{case}: {message}"
