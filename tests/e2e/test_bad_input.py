"""Bad input: exit code 2, one line on stderr that names the key or file, and every file as it was."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import pytest

from tests.dist.harness import run_in_turn
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


def test_an_existing_run_needs_resume(trained: Project) -> None:
    for command, part in (("sft", "sft"), ("train", "rl")):
        line = refused(trained, command, trained.config)
        assert str(trained.run / part) in line and "resume=auto" in line


def test_missing_sft_result(project: Project) -> None:
    line = refused(project, "train", project.config, *ONE_RANK)
    assert str(project.run / "sft/hf") in line and "megarl sft" in line


def test_damaged_weights(project: Project) -> None:
    (file := project.model / "model.safetensors").write_bytes(file.read_bytes()[:-1000])
    line = refused(project, "sft", project.config, *ONE_RANK)
    assert "model.safetensors" in line and str(project.model) in line


GOOD = {"prompt": "1 + 1 = ", "answer": "2"}


def test_a_row_without_an_answer(warm: Project, tmp_path: Path) -> None:
    project = Project.create(tmp_path, model=warm.model)
    shutil.copytree(warm.run / "sft/hf", project.run / "sft/hf")
    (project.run / "config.yaml").write_text("of the run before: must stay as it is")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(f'{json.dumps(GOOD)}\n{{"prompt": "1 + 2 = "}}\n')
    line = refused(project, "train", project.config, *data(rows), "reward.type=exact_match", *ONE_RANK)
    assert f"{rows}:2: no answer" in line


def data(rows: Path) -> list[str]:
    return [f"rl.data=[{{type: jsonl, path: {rows}}}]"]


# What one rank says to more of it, in one process: the way from there to the user is that of the commands above.


@pytest.fixture(scope="module")
def said(trained: Project, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Project, str]]:
    """name -> (its project, the rank's refusal); all files as they were."""
    root, cases, projects = tmp_path_factory.mktemp("refused"), {}, {}

    def case(name: str, part: str, *overrides: str, rollouts: Path | None = None) -> Project:
        (root / name).mkdir()
        shutil.copytree(trained.model, root / name / "model")
        project = projects[name] = Project.create(root / name)
        arguments = {"part": part, "config": str(project.config), "overrides": [*overrides, *ONE_RANK]}
        cases[name] = ("refusal", arguments | {"rollouts": rollouts and str(rollouts)})
        return project

    file = case("family", "sft").model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "gpt2"}))
    (case("no weights", "sft").model / "model.safetensors").unlink()
    (case("no template", "rl", "rl.init_from=model").model / "chat_template.jinja").unlink()
    rows = {"malformed": "{broken]", "too long": json.dumps(GOOD | {"prompt": "9" * 80})}
    for name, row in rows.items():
        file = root / f"{name}.jsonl"
        file.write_text(row + "\n")
        case(name, "rl", "rl.init_from=model", "reward.type=exact_match", *data(file))
    case("too few steps", "rl", "rl.steps=7", rollouts=trained.run / "rl/rollouts")
    before = files(root)
    lines = run_in_turn("tests.e2e.cases", 1, cases)
    assert files(root) == before
    return {name: (projects[name], lines[name][0]) for name in cases}


@pytest.mark.parametrize(
    "name, parts",
    [
        ("family", ["config.json", "'gpt2'", "qwen3_moe"]),
        ("no weights", ["{model}", "model.safetensors"]),
        ("no template", ["{model}", "model.chat_template"]),
        ("malformed", ["malformed.jsonl:1"]),
        ("too long", ["too long.jsonl: none of 1 prompts"]),
        ("too few steps", ["step_000007.jsonl", "set rl.steps to 6"]),
    ],
)
def test_what_a_rank_refuses(said: dict[str, tuple[Project, str]], name: str, parts: list[str]) -> None:
    project, line = said[name]
    assert [part for part in parts if part.format(model=project.model) not in line] == [], line
    assert "\n" not in line
