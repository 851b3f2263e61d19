"""Bad input: exit code 2, one line on stderr that names the key or file, and every file as it was."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.program import Project

ONE_RANK = ("parallel.ep=1", "parallel.nproc=1")


def files(folder: Path) -> dict[str, bytes | None]:
    """Everything under `folder` and what it holds."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def refused(project: Project, *args: object, **env: str) -> str:
    """Runs a command that must be refused, and returns the line it says."""
    before = files(project.folder)
    done = project.megarl(*args, **env)
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1, done.stderr
    assert "Traceback" not in done.stdout
    assert files(project.folder) == before
    assert project.processes() == []
    return done.stderr


@pytest.fixture
def project(warm: Project, tmp_path: Path) -> Project:
    """A project with a model of its own, which a test may damage, and no run yet."""
    shutil.copytree(warm.model, tmp_path / "model")
    return Project.create(tmp_path)


def test_what_is_seen_before_a_rank_starts(project: Project, tmp_path: Path) -> None:
    config = project.config
    assert "rl.stepz" in (line := refused(project, "train", config, "rl.stepz=1")) and "rl.steps?" in line
    line = refused(project, "train", config, "parallel.ep=3", "parallel.nproc=3")
    assert "parallel.ep = 3" in line and "8 experts" in line
    line = refused(project, "sft", config, "--nproc", "3")
    assert "world size 3" in line and "ep=2" in line
    assert "project.yaml/run" in refused(project, "sft", config, f"run_dir={config}/run")
    assert "/proc/run" in refused(project, "sft", config, "run_dir=/proc/run")
    line = refused(project, "sft", config, "sft.data=[{type: jsonl, path: nowhere.jsonl}]")
    assert "sft.data" in line and "nowhere.jsonl" in line
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"MASTER_PORT = {port}" in refused(project, "sft", config, MASTER_PORT=port)


def test_unsupported_family(project: Project) -> None:
    file = project.model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "llama"}))
    line = refused(project, "sft", project.config)
    assert str(file) in line and "'llama'" in line and "qwen3_moe" in line


def test_an_existing_run_needs_resume(trained: Project) -> None:
    for command, part in (("sft", "sft"), ("train", "rl")):
        line = refused(trained, command, trained.config)
        assert str(trained.run / part) in line and "resume=auto" in line


def test_missing_sft_result(project: Project) -> None:
    line = refused(project, "train", project.config, *ONE_RANK)
    assert str(project.run / "sft/hf") in line and "megarl sft" in line


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_bytes(file.read_bytes()[:-1000])])
def test_damaged_weights(project: Project, damage: Callable[[Path], object]) -> None:
    damage(project.model / "model.safetensors")
    line = refused(project, "sft", project.config, *ONE_RANK)
    assert "model.safetensors" in line and str(project.model) in line


def test_tokenizer_without_chat_template(project: Project) -> None:
    (project.model / "chat_template.jinja").unlink()
    line = refused(project, "train", project.config, "rl.init_from=model", *ONE_RANK)
    assert str(project.model) in line and "model.chat_template" in line


GOOD = {"prompt": "1 + 1 = ", "answer": "2"}


@pytest.mark.parametrize(
    "rows, settings, said",
    [
        ([json.dumps(GOOD), "{broken"], (), "rows.jsonl:2"),
        (
            [json.dumps(GOOD), json.dumps({"prompt": "1 + 2 = "})],
            ("reward.type=exact_match",),
            "rows.jsonl:2: no answer",
        ),
        ([json.dumps(GOOD | {"prompt": "9" * 80})], ("reward.type=exact_match",), "rows.jsonl: none of 1 prompts"),
    ],
    ids=["malformed", "no-answer", "too-long"],
)
def test_data(warm: Project, tmp_path: Path, rows: list[str], settings: tuple[str, ...], said: str) -> None:
    project = Project.create(tmp_path, model=warm.model)
    shutil.copytree(warm.run / "sft/hf", project.run / "sft/hf")
    (project.run / "config.yaml").write_text("of the run before: must stay as it is")
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    data = f"rl.data=[{{type: jsonl, path: {tmp_path}/rows.jsonl}}]"
    line = refused(project, "train", project.config, data, *settings, *ONE_RANK)
    assert str(tmp_path) in line and said in line


def test_rollouts_of_too_few_steps(trained: Project, branch: Project) -> None:
    rollouts = trained.run / "rl/rollouts"
    line = refused(branch, "train", branch.config, "rl.steps=7", "--from-rollouts", rollouts, *ONE_RANK)
    assert str(rollouts / "step_000007.jsonl") in line and "set rl.steps to 6" in line
