"""The command line: exit codes, one-line errors, help with an example, and a run folder that is whole or not there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

SOURCE = {"type": "reasoning_gym", "task": "chain_sum"}


def megarl(*args: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, "-m", "megarl", *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=clean | (env or {}), timeout=120)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    config = {
        "run_dir": str(tmp_path / "run"),
        "model": {"path": str(tmp_path / "model"), "generate": {"seed": 1}},
        "sft": {"data": [SOURCE]},
        "rl": {"data": [SOURCE]},
        "eval": {"data": [SOURCE]},
    }
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def one_line(done: subprocess.CompletedProcess[str], code: int) -> str:
    assert done.returncode == code, done.stderr
    assert done.stdout == "" and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


@pytest.mark.parametrize(
    "command",
    ["", "sft", "reward-model", "train", "eval", "convert", "report", "config", "doctor"]
    + ["verify sync", "verify routing", "verify layouts"],
)
def test_help_has_an_example(command: str) -> None:
    done = megarl(*command.split(), "--help")
    assert done.returncode == 0 and (not command or f"megarl {command}" in done.stdout.split("Example:")[1])


def test_help_is_fast() -> None:
    fastest = min(_seconds("--help") for _ in range(3))
    assert fastest < 1.0


def _seconds(*args: str) -> float:
    before = os.times()
    megarl(*args)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def test_bad_input_is_exit_code_2_and_leaves_nothing(project: Path) -> None:
    config = str(project / "p.yaml")
    before = sorted(project.rglob("*"))
    assert "no such command 'trian'" in one_line(megarl("trian"), 2).lower()
    assert "CONFIG" in one_line(megarl("train"), 2)
    assert "no such file" in one_line(megarl("train", "nowhere.yaml"), 2)
    assert "rl.stepz" in one_line(megarl("train", config, "rl.stepz=1"), 2)
    assert "(or --nproc) to 2" in one_line(megarl("train", config, "parallel.ep=2", "--nproc", "3"), 2)
    assert "another run_dir" in one_line(megarl("sft", config, f"run_dir={config}/x"), 2)
    assert "MASTER_PORT" in one_line(megarl("sft", config, env={"MASTER_PORT": "99999"}), 2)
    assert "no such folder" in one_line(megarl("report", str(project / "none")), 2)
    assert "set hf or megatron" in one_line(megarl("convert", str(project), str(project / "out"), "--to", "onnx"), 2)
    assert "no such folder" in one_line(megarl("eval", config, "--checkpoint", str(project / "none")), 2)
    assert sorted(project.rglob("*")) == before


def test_an_existing_run_is_refused_without_resume(project: Path) -> None:
    (project / "run" / "rl").mkdir(parents=True)
    (project / "run" / "rl" / "metrics.jsonl").write_text("{}\n")
    before = sorted(project.rglob("*"))
    assert "resume=auto" in one_line(megarl("train", str(project / "p.yaml")), 2)
    assert sorted(project.rglob("*")) == before


def test_config_prints_what_loads_back(project: Path) -> None:
    done = megarl("config", str(project / "p.yaml"), "rl.steps=7")
    assert done.returncode == 0 and "[override] Rollout steps" in done.stdout
    assert yaml.safe_load(done.stdout)["rl"]["steps"] == 7


def test_unexpected_errors_are_one_line_and_a_traceback_in_a_file() -> None:
    code = "import megarl.config as c, megarl.cli; c.resolve = lambda *a: 1 / 0; megarl.cli.main()"
    done = subprocess.run([sys.executable, "-c", code, "config", "x.yaml"], capture_output=True, text=True)
    line = one_line(done, 1)
    assert "ZeroDivisionError" in line
    log = Path(line.split("traceback: ")[1].rstrip(")\n"))
    assert "in show_config" in log.read_text()
    log.unlink()


def test_a_run_folder_is_made_whole_and_can_be_discarded(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megarl.config import load_config, prepare_run_dir

    config = load_config(project / "p.yaml")
    run = prepare_run_dir(config, "sft")
    assert load_config(project / "run" / "config.yaml") == config and run.path == project / "run" / "sft"
    prepare_run_dir(config, "rl").discard()
    assert sorted(p.name for p in (project / "run").iterdir()) == ["config.yaml", "sft"]
    run.discard()
    assert not (project / "run").exists()


def test_discarding_spares_results_and_gives_the_old_config_back(project: Path) -> None:
    from megarl.config import load_config, prepare_run_dir

    first = load_config(project / "p.yaml")
    run = prepare_run_dir(first, "sft")
    (run.path / "metrics.jsonl").write_text('{"step": 1}\n')
    run.discard()  # bad input that was met after the first step
    assert (run.path / "metrics.jsonl").exists()
    prepare_run_dir(load_config(project / "p.yaml", ["seed=7"]), "rl").discard()
    assert load_config(project / "run" / "config.yaml") == first
    assert sorted(p.name for p in (project / "run").iterdir()) == ["config.yaml", "sft"]


def test_doctor_passes_here_and_warns_of_the_other_apex(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megarl.platform import features
    from megarl.verify.doctor import examine

    lines, healthy = examine()
    assert healthy and any("never install it from there" in line for line in lines)
    assert all(any(line.startswith(package.name) for line in lines) for package in features.PACKAGES)
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise RuntimeError('an unrelated package')")
    monkeypatch.syspath_prepend(tmp_path)
    assert features.apex() == "other" and any("WARNING: another package named apex" in line for line in examine()[0])
    (tmp_path / "apex" / "optimizers").mkdir()
    (tmp_path / "apex" / "optimizers" / "fused_adam.py").write_text("")
    assert features.apex() == "nvidia"


def test_doctor_fails_when_something_required_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from megarl.platform import features
    from megarl.verify.doctor import examine

    absent = features.Package("megatron-core", ("no-such-distribution",), True, "no learner")
    monkeypatch.setattr(features, "PACKAGES", (absent,))
    lines, healthy = examine()
    assert not healthy and any("MISSING, required: no learner" in line for line in lines)


def test_verify_layouts_refuses_another_type_and_to_be_a_rank(project: Path) -> None:
    line = one_line(megarl("verify", "layouts", str(project / "p.yaml"), "--dtype", "float16"), 2)
    assert "--dtype float16: set one of float64, float32" in line
    line = one_line(megarl("verify", "layouts", str(project / "p.yaml"), env={"RANK": "0"}), 2)
    assert "starts its own ranks" in line
