"""A folder is there with all its files as they were written, or it is not."""

from __future__ import annotations

import pytest

from megarl import manifest


@pytest.fixture
def folder(tmp_path):
    partial = tmp_path / ".partial"
    (partial / "sub").mkdir(parents=True)
    (partial / "sub" / "a").write_bytes(b"abc")
    (partial / "b").write_bytes(b"")
    files = manifest.entries(partial, ["sub/a", "b"])
    manifest.publish(partial, tmp_path / "final", files)
    return tmp_path / "final"


def test_what_is_published_is_listed_with_sizes_and_checksums(folder):
    assert manifest.listed(folder) == {
        "sub/a": {
            "bytes": 3,
            "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
        },  # FIPS 180-2
        "b": {"bytes": 0, "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
    }
    assert manifest.problem(folder, manifest.listed(folder)) is None
    assert [path.name for path in folder.parent.iterdir()] == ["final"]


def test_each_kind_of_damage_is_named(folder):
    files = manifest.listed(folder)
    (folder / "sub" / "a").write_bytes(b"abd")
    assert manifest.problem(folder, files) == "sub/a has another checksum than it was written with"
    assert manifest.problem(folder, files, checksums=False) is None
    (folder / "sub" / "a").write_bytes(b"ab")
    assert manifest.problem(folder, files, checksums=False) == "sub/a has 2 bytes instead of 3"
    (folder / "sub" / "a").unlink()
    assert manifest.problem(folder, files) == "sub/a: No such file or directory"


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"files": {"a": 1}}', '{"files": {"/etc/passwd": {"bytes": 1, "sha256": ""}}}']
)
def test_a_manifest_that_is_none_is_said_to_be_none(folder, text):
    (folder / manifest.MANIFEST).write_text(text)
    assert isinstance(manifest.listed(folder), str)


def test_what_stood_there_is_replaced_and_stays_when_the_new_one_fails(folder):
    files = manifest.listed(folder)
    for name in ("one", "two"):
        (folder.parent / name).mkdir()
    manifest.publish(folder.parent / "one", folder, {})
    assert manifest.listed(folder) == {}
    with pytest.raises(OSError):
        manifest.publish(folder.parent / "two", folder, files)  # a folder of its files is not there
    assert manifest.listed(folder) == {}
