"""tools/setup.sh refuses what cannot work before it downloads, sees damage, and costs nothing when nothing is to do."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIST = ROOT / "tools" / "requirements-cpu.txt"

spec = importlib.util.spec_from_file_location("prove", ROOT / "tools" / "prove.py")
prove = importlib.util.module_from_spec(spec)
spec.loader.exec_module(prove)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A checkout without an environment, and a folder for commands that go first in PATH."""
    shutil.copytree(ROOT / "tools", tmp_path / "clone" / "tools", ignore=shutil.ignore_patterns("bench"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path / "clone")
    (tmp_path / "clone" / "bin").mkdir()
    return tmp_path / "clone"


def setup(clone: Path, **commands: str) -> subprocess.CompletedProcess[str]:
    for name, script in commands.items():
        (clone / "bin" / name).write_text(f"#!/bin/bash\n{script}\n")
        (clone / "bin" / name).chmod(0o755)
    env = os.environ | {"PATH": f"{clone / 'bin'}:{os.environ['PATH']}"}
    return subprocess.run([clone / "tools" / "setup.sh"], env=env, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("commands", "words"),
    [
        ({"uname": '[ "$1" = -s ] && echo Darwin || echo arm64'}, ["Darwin arm64", "Linux x86_64"]),
        ({"grep": "exit 1"}, ["AVX2", "newer machine"]),
        ({"df": "printf 'h\\nfs 9000000 0 5500000 0 /\\n'"}, ["5 GB free", "6 GB"]),
    ],
)
def test_refusals_come_first_in_one_line(clone: Path, commands: dict[str, str], words: list[str]) -> None:
    done = setup(clone, **commands)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert all(word in done.stderr for word in words), done.stderr
    assert not (clone / ".venv").exists()


def test_a_second_run_returns_at_once() -> None:
    command = [ROOT / "tools" / "setup.sh"]
    subprocess.run(command, check=True, capture_output=True)
    started = time.monotonic()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert time.monotonic() - started < 3 and done.stdout == "setup: .venv is complete\n"


def test_the_list_is_the_closure_of_what_is_installed() -> None:
    lines = [line for line in LIST.read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.+-]+", line) for line in lines)
    assert lines == sorted(lines, key=str.lower) and len(lines) == len({line.split("==")[0].lower() for line in lines})
    assert not {"apex", "torchvision", "torchaudio", "torchcodec"} & {line.split("==")[0].lower() for line in lines}
    assert prove.broken(str(LIST)) == []
    assert prove.unknown_conflicts() == []


def test_apex_is_in_no_list() -> None:
    for file in (LIST, ROOT / "pyproject.toml"):
        assert not re.search(r"^[\s\"]*apex\b", file.read_text(), re.MULTILINE)


def test_damage_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "thing-1.0.dist-info"
    info.mkdir()
    (tmp_path / "thing.py").write_text("x = 1\n")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: thing\nVersion: 1.0+cpu\n")
    (info / "RECORD").write_text("thing.py,,6\nthing-1.0.dist-info/METADATA,,\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert prove.is_whole("thing", "1.0") and not prove.is_whole("thing", "1.1") and not prove.is_whole("nothing", "1")
    (tmp_path / "thing.py").write_text("x")
    assert not prove.is_whole("thing", "1.0")
    (tmp_path / "thing.py").unlink()
    assert not prove.is_whole("thing", "1.0")
    (info / "RECORD").unlink()
    assert not prove.is_whole("thing", "1.0")
    monkeypatch.setattr(prove.metadata, "distributions", lambda: [prove.metadata.distribution("thing")])
    prove.forget_recordless()
    assert not info.exists()
