"""`megarl plan`: what it says of what does not fit, its search, its page, and bad input."""

from __future__ import annotations

import re
import sys

import pytest
import yaml

from megarl import cli, platform
from megarl.errors import BadInput

platform.setup()

from megarl.config import load_config  # noqa: E402
from megarl.plan.command import make_plan, run  # noqa: E402
from megarl.plan.hardware import CHIPS, named  # noqa: E402
from megarl.plan.memory import estimate, plan_memory  # noqa: E402
from megarl.plan.search import refuse, search, smallest_world  # noqa: E402
from megarl.plan.seconds import PHASES  # noqa: E402
from megarl.plan.shape import Workload  # noqa: E402
from megarl.plan.shown import render_table  # noqa: E402

LARGE = dict(
    family="qwen3_moe", hidden_size=4096, num_layers=16, num_heads=32, num_kv_heads=4, head_dim=128, num_experts=64, top_k=8,
    moe_intermediate_size=1536, context=8192, tokenizer={"vocab_size": 512},
)  # fmt: skip
PROJECT = {
    "model": {"path": "nowhere", "dtype": "bfloat16", "generate": LARGE},
    "parallel": {"ep": 8, "recompute": "full"},
    "rl": {"data": [{"type": "jsonl", "path": "x.jsonl"}], "max_prompt_tokens": 1024, "micro_batch_tokens": 8192},
    "rollout": {"max_response_tokens": 4096, "max_context": 5120, "tensor_parallel": 8},
}
H100 = named("h100")


@pytest.fixture
def project(tmp_path):
    path = tmp_path / "project.yaml"
    path.write_text(yaml.safe_dump(PROJECT))
    return path


def config(project, *overrides):
    return load_config(project, overrides, require="model")


def call(monkeypatch, capsys, *arguments):
    """Exit code, output and error of `megarl plan`."""
    monkeypatch.setattr(sys, "argv", ["megarl", "plan", *map(str, arguments)])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(SystemExit) as ended:
        cli.main()
    found = capsys.readouterr()
    return ended.value.code, found.out, found.err


def test_what_does_not_fit_says_the_smallest_number_that_would_and_that_number_fits(project):
    cfg = config(project, "parallel.ep=1", "rollout.tensor_parallel=2")
    with pytest.raises(BadInput) as refused:
        refuse(plan_memory(cfg, 2, H100))
    text = str(refused.value)
    assert "\n" not in text and text.startswith("does not fit on 2 x h100: ")
    count, overrides = re.search(r"smallest number of h100 that would do is (\d+), with (.*)$", text).groups()
    assert int(count) > 2
    assert plan_memory(config(project, *overrides.split()), int(count), H100).problem is None
    fewer = smallest_world(cfg, H100, None, None)[0]
    assert fewer == int(count)
    assert not search(cfg, fewer // 2, H100, most=1)


def test_a_single_change_that_helps_is_named_and_helps(project):
    cfg = config(project, "parallel.recompute=none", "rl.micro_batch_tokens=32768")
    plan = plan_memory(cfg, 8, H100)
    assert plan.problem is not None and "activations" in plan.problem
    with pytest.raises(BadInput, match=r"on these 8 ranks it fits with parallel\.recompute=(selective|full)") as refused:
        refuse(plan)
    change = re.search(r"fits with (\S+);", str(refused.value))[1]
    assert plan_memory(config(project, "rl.micro_batch_tokens=32768", change), 8, H100).problem is None


def test_vllm_without_room_for_a_sequence_does_not_fit(project):
    plan = plan_memory(config(project, "rollout.gpu_memory_utilization=0.3"), 8, H100)
    assert plan.problem is None
    plan = plan_memory(config(project, "rollout.gpu_memory_utilization=0.06"), 8, H100)
    assert "rollout.gpu_memory_utilization = 0.06" in plan.problem
    with pytest.raises(BadInput, match=r"it fits with rollout\.gpu_memory_utilization="):
        refuse(plan)


def test_a_plan_fits_until_the_reserve_takes_what_it_needs(project):
    cfg = config(project)
    plan = plan_memory(cfg, 8, H100)
    need = max(plan.need(phase) for phase in PHASES)
    for more, fits in ((1 << 20, True), (-(1 << 20), False)):
        assert (plan_memory(cfg, 8, H100, reserve=H100.memory_bytes - need - more).problem is None) == fits


def test_the_estimate_of_the_search_is_close_to_the_modules(project):
    for overrides in (("parallel.ep=8",), ("parallel.ep=4", "parallel.tp=2"), ("parallel.pp=4", "parallel.ep=2")):
        cfg = config(project, *overrides)
        plan = plan_memory(cfg, 8, H100)
        assert estimate(cfg, 8, H100) == pytest.approx(plan.need("update") / plan.capacity, rel=0.05)


def test_a_search_gives_layouts_that_fit_the_fastest_first(project):
    cfg = config(project)
    found = search(cfg, 8, H100, most=3)
    assert len(found) == 3 and [one.total for one in found] == sorted(one.total for one in found)
    for one in found:
        again = config(project, *one.overrides.split())
        assert again.parallel == one.cfg.parallel and again.rollout == one.cfg.rollout
        assert plan_memory(again, 8, H100).problem is None
        assert "GiB in" in one.why and "update" in one.why


def test_the_table_and_the_page_have_every_phase_and_owner(project, tmp_path):
    said, html = [], tmp_path / "plan.html"
    plan = make_plan(config(project), 8, H100)
    run(plan, project, html, said.append)
    page = html.read_text()
    for word in (*PHASES, "policy_gradients", "engine_kv_cache", "sync_buffers", "reduce-scatter"):
        assert word in said[0], word
        assert word.replace("_", " ") in page or word in page, word
    assert page.count("<figure") == 3 and "http" not in page.replace("http-equiv", "")
    table = render_table(plan, "project.yaml")
    assert max(map(len, table.splitlines()[1:])) <= 130
    total = next(line for line in table.splitlines() if "together" in line)
    assert f"{plan.memory.need('update') / 2**30:.2f}" in total


def test_lengths_change_seconds_and_not_the_fullest_row(project):
    short, long = (make_plan(config(project), 8, H100, response=n) for n in (200, 3000))
    assert short.times["rollout"].seconds < long.times["rollout"].seconds
    assert short.memory.need("sync") == long.memory.need("sync")
    with pytest.raises(BadInput, match="--response-tokens 9000: above rollout.max_response_tokens = 4096"):
        make_plan(config(project), 8, H100, response=9000)


def test_bad_input_is_one_line_and_exit_code_2(project, monkeypatch, capsys):
    for arguments, said in (
        ((project, "--gpu", "h1000"), f"--gpu h1000: no such chip; give one of {', '.join(CHIPS)}"),
        ((project, "--gpus", "7"), "7"),
        ((project, "parallel.eep=2"), "did you mean parallel.ep?"),
        ((project, "--reserve", "900"), "--reserve 900"),
        (("nowhere.yaml",), "nowhere.yaml: no such file"),
        ((), "CONFIG is missing"),
        ((project, "--html", "/nowhere/at/all.html"), "--html /nowhere/at/all.html: cannot be written"),
    ):
        code, _, error = call(monkeypatch, capsys, *arguments)
        assert code == 2 and said in error and error.count("\n") == 1, (arguments, error)


def test_a_plan_of_no_rl_step_is_refused(tmp_path):
    path = tmp_path / "sft.yaml"
    path.write_text(yaml.safe_dump({"model": PROJECT["model"]}))
    with pytest.raises(BadInput, match="rl: missing"):
        make_plan(load_config(path, require="model"), None, H100)


def test_the_command_ends_well_for_what_fits(project, monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, project, "--gpus", "8")
    assert code == 0 and "together" in out and "a step" in out


def test_the_fullest_row_is_full(project):
    from megarl.plan.memory import fullest_row, spec_of_config

    cfg = config(project)
    row = fullest_row(cfg, spec_of_config(cfg), Workload.of(cfg))
    assert 0.8 * 8192 < row.tokens <= 8192 and 0 < row.scored < row.tokens
