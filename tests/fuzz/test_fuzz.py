"""A sample of the cases of `tools/fuzz.py`, and examples of hypothesis: each works or is refused in one line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, seed, settings
from hypothesis import strategies as st

from megarl.platform.safe_loading import check_shards
from tests.fuzz import targets
from tests.fuzz.targets import TARGETS, attempt, case

CASES = 200
SLOW = {"tokenizer.json", "tokenizer_config.json", "config files", "overrides", "chat template"}  # a fifth of the cases


@pytest.fixture(scope="module", autouse=True)
def folder():
    yield
    shutil.rmtree(targets.home())


@pytest.mark.parametrize("name", TARGETS)
def test_spoilt_files_work_or_are_refused(name: str) -> None:
    said = {attempt(name, case(name, number)) == "works" for number in range(CASES // 5 if name in SLOW else CASES)}
    assert said == {True, False}, "cases that all work, or are all refused, try nothing"


BYTES = [
    "safetensors header",
    "checkpoint .metadata",
    "checkpoint common.pt",
    "answers of reward workers",
    "recorded rollouts",
]


@pytest.mark.parametrize("name", BYTES)
def test_any_bytes(name: str) -> None:
    @seed(8)
    @settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(start=st.integers(0, 400), put=st.binary(max_size=80), cut=st.integers(0, 80))
    @example(start=0, put=b"", cut=1 << 20)
    def check(start: int, put: bytes, cut: int) -> None:
        valid = case(name, 0)
        attempt(name, valid[:start] + put + valid[start + cut :])

    check()


def test_a_pickle_that_acts_is_refused_before_it_does(tmp_path: Path) -> None:
    for name, data in (
        ("checkpoint .metadata", targets.evil_metadata()),
        ("checkpoint common.pt", targets.evil_common()),
    ):
        assert "refused" in attempt(name, data) or "names pathlib" in attempt(name, data)
    assert not (targets.home() / "pickle-was-run").exists()
    with pytest.raises(targets.BadInput, match="complete checkpoint"):
        check_shards(tmp_path)
