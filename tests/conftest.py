"""One tiny project, trained once by the real commands; the tests look at what it left."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.program import Project


@pytest.fixture(autouse=True)
def own_loss_scale() -> Iterator[None]:
    """Megatron's scale of auxiliary losses, of all models in a process, has the shape of whoever set it first."""
    yield
    if "megatron.core.transformer.moe.moe_utils" in sys.modules:
        sys.modules["megatron.core.transformer.moe.moe_utils"].MoEAuxLossAutoScaler.main_loss_backward_scale = None


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The project after `megarl sft`."""
    project = Project.create(tmp_path_factory.mktemp("e2e"))
    done = project.megarl("sft", project.config, "checkpoint.every=0")
    assert done.returncode == 0, done.stderr
    return project


@pytest.fixture(scope="session")
def trained(warm: Project) -> Project:
    """The project after `megarl sft` and `megarl train`."""
    done = warm.megarl("train", warm.config)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return warm


@pytest.fixture
def branch(warm: Project, tmp_path: Path) -> Iterator[Project]:
    """A project of its own that starts from the same SFT result."""
    project = Project.create(tmp_path, model=warm.model)
    shutil.copytree(warm.run / "sft", project.run / "sft")
    yield project
    assert project.processes() == [], "a process of the job is still running"
