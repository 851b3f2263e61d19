"""The te layer provider on a stand-in of the release's signatures (`te_stand_in.py` says what that can show), against torch.

Megarl's attention, Megarl's experts' shards, conversion and weight names, and all of Megatron's wrappers are the real ones.
"""

from __future__ import annotations

import pytest

from tests.dist.harness import run_in_turn
from tests.dist.test_family_layouts import world
from tests.families import all_cases

MODULE, CASES = "tests.dist.te_cases", all_cases()
# dense and MoE layers; sinks, biases of experts and one tensor for all; latent attention, shared experts, a buffer; biases
# and a gate; one norm over all heads
SAMPLED = {
    1: [("qwen3_moe-mixed-yarn", {}), ("gpt_oss", {}), ("deepseek_v3", {}), ("qwen2_moe", {}), ("olmoe", {})],
    2: [("qwen3_moe", {"tp": 2, "etp": 2}), ("deepseek_v3", {"tp": 2}), ("gpt_oss", {"ep": 2}), ("qwen3_moe", {"pp": 2})],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A function: the checkpoint of a case, written once."""
    root = tmp_path_factory.mktemp("families")

    def write(name: str) -> str:
        if not (root / name).exists():
            CASES[name].write(root / name)
        return str(root / name)

    return write


def hold(where: str, results: list[dict], log_probs: float = 1e-5, gradients: float = 1e-4) -> None:
    """What `agree` must have found on every rank; gradients are relative."""
    for rank, found in enumerate(results):
        at = f"{where} rank {rank}"
        assert found["bits"] and found["shapes"] and found["names"], at
        assert found["log_probs"] <= log_probs, at
        assert {name: gap for name, gap in found["gradients"].items() if gap > gradients} == {}, at
        assert found["norms"][1] == pytest.approx(found["norms"][0], rel=gradients / 10), at


@pytest.mark.parametrize("nproc", SAMPLED)
def test_same_numbers_names_and_bits_as_torch(nproc, folder, tmp_path):
    steps = {
        f"{name} {degrees}": ("agree", dict(path=folder(name), out=str(tmp_path / str(i)), degrees=degrees))
        for i, (name, degrees) in enumerate(SAMPLED[nproc])
    }
    if nproc == 2:
        degrees = {"ep": 2, "tp": 2}
        steps["shards"] = ("cross_load", dict(path=folder("qwen3_moe-mixed-yarn"), folder=str(tmp_path), degrees=degrees))
    results = run_in_turn(MODULE, nproc, steps)
    for ranks in ([results.pop("shards")] if nproc == 2 else []):
        for found in ranks:  # the steps after a checkpoint, in the provider that wrote it and in the other
            for steps_after in found.values():
                assert steps_after[2:] == pytest.approx(steps_after[:2], rel=1e-5)
    for where, ranks in results.items():
        hold(where, ranks)
    if nproc == 1:  # the names are Transformer Engine's and Megatron's own
        names = {name for ranks in results.values() for found in ranks for name in found["own"]}
        layer = "decoder.layers.1."
        assert {f"{layer}self_attention.linear_qkv.layer_norm_weight", f"{layer}mlp.linear_fc1.layer_norm_weight"} <= names
        assert {f"{layer}mlp.experts.linear_fc{i}.{kind}7" for i in (1, 2) for kind in ("weight", "bias")} <= names
        assert not any("weight1" in name.split(".")[-1] and "experts.weight" in name for name in names)
        kinds = {kind for ranks in results.values() for found in ranks for kind in found["kinds"]}
        assert {"TELayerNormColumnParallelLinear", "TERowParallelLinear", "TECore", "TEExperts", "TEDown", "TEMoE"} <= kinds


def test_fp8_settings_renamed_arguments_and_refusals(folder):
    mixed, latent = folder("qwen3_moe-mixed-yarn"), folder("deepseek_v3")
    steps = {
        "tensorwise": ("fp8", dict(path=mixed, fp8="tensorwise", fp8_skip_first=1, fp8_skip_last=1)),
        "delayed": ("fp8", dict(path=latent, fp8="delayed", fp8_history=8, fp8_margin=1)),
        "renamed": ("renamed", dict(path=mixed)),
        "refusals": ("refusals", dict(path=mixed)),
    }
    results = {name: ranks[0] for name, ranks in run_in_turn(MODULE, 1, steps).items()}
    for recipe, inside in (("tensorwise", {"1", "2"}), ("delayed", {"0", "1", "2", "3"})):
        found = results[recipe]
        # every linear of the layers in FP8 and no other; padding, and nothing else, is 0 in all of them
        assert {name.split(".")[2] for name in found["in_fp8"]} == inside and not set(found["in_fp8"]) & set(found["outside"])
        assert {name.split(".")[2] for name in found["outside"]} == {"0", "1", "2", "3"} - inside
        assert found["padding"] > 0 and found["rows"] % 16 == 0 and found["zero_rows"] == [] and not found["suspended"]
    (tensorwise,), (delayed,) = results["tensorwise"]["recipes"], results["delayed"]["recipes"]
    assert tensorwise.items() >= {"name": "Float8CurrentScaling", "fp8_format": "Format.HYBRID"}.items()
    expected = {"name": "DelayedScaling", "margin": "1", "amax_history_len": "8", "amax_compute_algo": "max"}
    assert delayed.items() >= expected.items()

    failures = results["renamed"]
    assert failures.pop("none") == ""
    for name, failure in failures.items():
        assert "argument" in failure or "KeyError" in failure, f"{name}: {failure}"

    float64, float32, mxfp8, skipped, sizes, unknown, doctor = results["refusals"]
    assert "float64" in float64 and "model.layers: torch" in float64
    assert "model.dtype: bfloat16" in float32
    assert "mxfp8" in mxfp8 and "10.0 or higher" in mxfp8 and "model.fp8: blockwise" in mxfp8
    assert "model.fp8: tensorwise" in skipped
    assert "16 x 128" in sizes and "model.fp8: tensorwise" in sizes
    assert "knows tensorwise, mxfp8, delayed" in unknown
    assert "blockwise, tensorwise, delayed" in doctor and "no mxfp8" in doctor
    assert all("\n" not in line for line in results["refusals"])


@pytest.mark.slow
@pytest.mark.parametrize("nproc", [1, 2, 4, 8])
def test_every_family_and_layout(nproc, folder, tmp_path):
    pairs = [(name, {}) for name in CASES] if nproc == 1 else []
    pairs += [(name, d) for name, case in CASES.items() for d in case.layouts if world(d) == nproc]
    steps = {
        f"{name} {degrees}": ("agree", dict(path=folder(name), out=str(tmp_path / str(i)), degrees=degrees))
        for i, (name, degrees) in enumerate(pairs)
    }
    for where, ranks in run_in_turn(MODULE, nproc, steps, timeout=3000).items():
        hold(where, ranks)
