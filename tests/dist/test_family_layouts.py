"""Every family under tensor, expert and pipeline parallelism: logits of transformers, the same bits back."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import save_file

from tests.dist.convert_cases import tokens, write_gradients
from tests.dist.harness import run_in_turn
from tests.families import all_cases

CASES = all_cases()
MODULE = "tests.dist.convert_cases"


def world(degrees: dict[str, int]) -> int:
    """The smallest that holds the layout: ep counts inside tp x dp."""
    tp, pp, ep, etp = (degrees.get(name, 1) for name in ("tp", "pp", "ep", "etp"))
    return pp * math.lcm(tp, ep * etp)


PAIRS = [(name, degrees) for name, case in CASES.items() for degrees in case.layouts]
# one layout of each family, another for the next family; all of them are slow
SAMPLE = [(name, case.layouts[i % len(case.layouts)]) for i, (name, case) in enumerate(CASES.items()) if case.layouts]
REFUSALS = [(name, *refusal) for name, case in CASES.items() for refusal in case.refuses]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """name -> (folder, file with transformers' logits); its gradients are in a folder beside."""
    root, out = tmp_path_factory.mktemp("families"), {}
    for name in {name for name, *_ in PAIRS + REFUSALS}:
        model = CASES[name].write(root / name)
        with torch.no_grad():
            save_file({"logits": model(tokens(131)).logits[0].contiguous()}, root / f"{name}.logits")
        write_gradients(model, root / f"{name}-gradients")
        out[name] = (str(root / name), str(root / f"{name}.logits"))
    return out


RUNS = [pytest.param(SAMPLE, nproc, id=f"sample-{nproc}") for nproc in sorted({world(d) for _, d in SAMPLE})]
RUNS += [
    pytest.param(PAIRS, nproc, id=f"all-{nproc}", marks=pytest.mark.slow) for nproc in sorted({world(d) for _, d in PAIRS})
]


@pytest.mark.parametrize("pairs, nproc", RUNS)
def test_logits_and_bits(pairs, nproc, checkpoints, tmp_path):
    steps = {}
    for name, degrees in pairs:
        if world(degrees) == nproc:
            path, expected = checkpoints[name]
            where = f"{name} {degrees}"
            arguments = dict(path=path, out=str(tmp_path / str(len(steps))), degrees=degrees, expected_logits=expected)
            if degrees.keys() == {"tp"}:
                arguments["expected_gradients"] = f"{path}-gradients"
            steps[where] = ("round_trip", arguments)
    for where, ranks in run_in_turn(MODULE, nproc, steps).items():
        for rank, result in enumerate(ranks):
            assert result["streamed_equal"] and result["exported_equal"], f"{where} rank {rank}"
            assert result["padding"] == [0.0] * len(result["padding"]), f"{where} rank {rank}"
            assert result["logits_gap"] <= 1e-5, f"{where} rank {rank}"
            for weight, gap in result["gradient_gaps"].items():
                assert gap <= 1e-4, f"{where} rank {rank} {weight}"


@pytest.mark.parametrize("nproc", sorted({world(degrees) for _, degrees, _ in REFUSALS}))
def test_layouts_that_cannot_be_are_refused(nproc, checkpoints):
    parts, steps = {}, {}
    for name, degrees, part in REFUSALS:
        if world(degrees) == nproc:
            where = f"{name} {degrees}"
            parts[where], steps[where] = part, ("refusal", dict(path=checkpoints[name][0], degrees=degrees))
    for where, ranks in run_in_turn(MODULE, nproc, steps).items():
        for kind, message in ranks:
            assert kind == "BadInput" and parts[where] in message and "\n" not in message, f"{where}: {message}"
