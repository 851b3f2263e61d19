"""A SLURM cluster for the tests of this folder; where there can be none they skip, or fail with MEGARL_NEED_CLUSTER set."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import hosts, slurm

NEED = "MEGARL_NEED_CLUSTER"  # set where a skip would hide something


def need(missing: str) -> None:
    if missing and os.environ.get(NEED):
        pytest.fail(f"{NEED} is set, and {missing}")
    if missing:
        pytest.skip(missing)


@pytest.fixture(scope="session")
def cluster() -> Iterator[slurm.Cluster]:
    """Two nodes, n0 and n1; nothing of it is left afterwards."""
    need(slurm.missing())
    with tempfile.TemporaryDirectory(prefix="megarl-slurm-") as folder:
        with slurm.Cluster(Path(folder) / "cluster") as started:
            yield started
        assert started.processes() == [], "a process of the cluster is still running"


@pytest.fixture
def two_hosts(tmp_path: Path) -> Iterator[hosts.Hosts]:
    """Two hosts on one switch; no process and no namespace is left afterwards."""
    need(hosts.missing())
    with hosts.Hosts(tmp_path) as made:
        yield made
    assert made.processes() == [] and made.namespaces() == []
