"""A run that stops and resumes, on the same or another layout, is the run that did not stop."""

from __future__ import annotations

import pytest

from tests.dist.checkpoint_cases import DAMAGE
from tests.dist.checkpoints import make
from tests.dist.harness import run_in_turn

LAYOUTS = {"ep2": dict(ep=2), "tp2": dict(tp=2), "pp2": dict(pp=2)}
MORE = {
    # optimizer state sharded over the ranks, and on every rank: Megatron copies the former for itself, the latter not
    "stepped_during_a_save": dict(distributed_optimizer=False),
    "failing_on_one_rank": dict(ep=2),
    "damaged_newest": dict(ep=2),
    "one_that_never_stepped": dict(ep=2),
}


def continued(nproc, model, folder, layouts, first=None, more={}):
    """layout -> what each of `nproc` ranks found; `first` is trained and saved before the others resume.

    `more`: further cases for the same ranks.
    """
    cases = {
        name: ("two_steps_each_side", dict(path=model, folder=folder, parallel=parallel, resume=name != first))
        for name, parallel in layouts.items()
    }
    return run_in_turn("tests.dist.checkpoint_cases", nproc, cases | more)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model, folder = str(tmp_path_factory.mktemp("model")), str(tmp_path_factory.mktemp("checkpoints"))
    make(model)
    more = {
        name: (name, dict(path=model, folder=str(tmp_path_factory.mktemp("more") / name), parallel=parallel))
        for name, parallel in MORE.items()
    }
    noted = dict(path=model, folder=str(tmp_path_factory.mktemp("noted")))
    more["noting"] = ("notes_of", noted | dict(parallel=dict(ep=2), first=True))
    more["noted"] = ("notes_of", noted | dict(parallel=dict(tp=2), first=False))
    return model, folder, continued(2, model, folder, {"saved": dict(ep=2)} | LAYOUTS, first="saved", more=more)


def test_same_layout_is_bit_identical(saved):
    assert saved[2]["ep2"] == saved[2]["saved"]


@pytest.mark.parametrize("name", ["tp2", "pp2"])
def test_other_layouts_continue_the_same_run(saved, name):
    for rank in saved[2][name]:
        assert rank == pytest.approx(saved[2]["saved"][0], rel=5e-5)


def test_one_process_that_starts_later_continues_the_same_run(saved):
    model, folder, ranks = saved
    assert continued(1, model, folder, {"one": {}})["one"][0] == pytest.approx(ranks["saved"][0], rel=5e-5)


def test_a_step_taken_during_a_save_is_not_in_it(saved):
    for rank in saved[2]["stepped_during_a_save"]:
        assert rank["unfinished"] == []
        assert rank["restored"] == rank["saved"] != rank["stepped"]


def test_ranks_with_the_same_weights_share_the_writing(saved):
    least, most = saved[2]["stepped_during_a_save"][0]["written"]
    assert most < 1.3 * least


def test_a_save_that_fails_on_one_rank_ends_the_run_on_all_and_leaves_the_last_one(saved):
    for rank in saved[2]["failing_on_one_rank"]:
        for how in ("waiting", "behind"):
            assert (
                rank[how].startswith("the checkpoint of step 2 cannot be written to ") and "File too large" in rank[how]
            )
            assert "step_000001 is whole and stays" in rank[how]
        assert rank["left"] == ["step_000001"]
        assert rank["then"] == ["step_000001", "step_000003"]


SAID = {
    "truncated": "shards/__1_0.distcp has",
    "flipped": "shards/__0_0.distcp has another checksum",
    "metadata": "shards/.metadata has another checksum",
    "missing": "shards/__1_0.distcp: No such file",
    "state": "no state.json",
    "manifest": "manifest.json cannot be read",
    "outside": "manifest.json: ../step_000001/state.json is not an entry of it",
    "empty": "no state.json",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_each_kind_of_damage_is_found_by_every_rank(saved, damage):
    for rank in saved[2]["damaged_newest"]:
        assert rank[damage].startswith(SAID[damage])


def test_a_damaged_checkpoint_is_not_converted(saved):
    for rank in saved[2]["damaged_newest"]:
        assert "step_000002: damaged: shards/__0_0.distcp has another checksum" in rank["converted"]


def test_the_last_whole_checkpoint_is_found_behind_a_damaged_one(saved):
    for step, same, notes in (rank["newest"] for rank in saved[2]["damaged_newest"]):
        assert (step, same, len(notes)) == (1, True, 1)
        assert notes[0].startswith("warning: ") and "step_000002 is damaged and passed over: shards/__0_0" in notes[0]


def test_without_a_whole_checkpoint_nothing_is_restored(saved):
    for step, _, notes in (rank["both"] for rank in saved[2]["damaged_newest"]):
        assert step is None and "no checkpoint is whole" in notes[0]
        assert "step_000001 is damaged" in notes[0] and "step_000002 is damaged" in notes[0]


def test_a_checkpoint_without_a_manifest_is_restored_with_a_note(saved):
    for step, same, notes in (rank["unlisted"] for rank in saved[2]["damaged_newest"]):
        assert (step, same, len(notes)) == (2, False, 1) and "has no manifest.json" in notes[0]


def test_retention_counts_whole_checkpoints_only(saved):
    for rank in saved[2]["damaged_newest"]:
        assert rank["newest"][0] == 1 and rank["newest then"] == ["step_000002"]  # the damaged one is replaced
        assert rank["later"][0] == 1 and rank["later then"] == [
            "step_000003"
        ]  # its number is higher, its files are not there


def test_a_checkpoint_of_an_optimizer_that_has_not_stepped(saved):
    for rank in saved[2]["one_that_never_stepped"]:
        assert rank["saved"] == rank["undisturbed"] == rank["restored"]


def test_what_is_not_the_checkpoints_is_said(saved):
    for notes in saved[2]["noted"]:
        layout, settings, versions = notes
        assert layout.startswith("note: the layout was dp 2, tp 1, ep 2 and is dp 1, tp 2, ep 1: ")
        assert settings.endswith("another one: rl.steps 5 -> 6")  # not run_dir
        assert ": torch 1.0 -> " in versions and "vllm" not in versions
