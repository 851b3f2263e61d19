"""Folders that are whole or not there: what is in them is listed with sizes and checksums, last of all, and renamed into
place when it is on the disk."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"  # {"files": {name: {"bytes": size, "sha256": digest}}}

Entries = dict[str, dict[str, Any]]


def entries(folder: Path, names: Iterable[str]) -> Entries:
    """Sizes and checksums of files of `folder` (names relative to it), each of which is put on the disk first.

    Raises OSError.
    """
    out: Entries = {}
    for name in names:
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            out[name] = {"bytes": os.fstat(file.fileno()).st_size, "sha256": digest}
    return out


def write_synced(path: Path, text: str) -> None:
    """Write a file and put it on the disk. Raises OSError."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def publish(partial: Path, final: Path, files: Entries) -> None:
    """Make `partial`, with its manifest, current as `final`, in one rename; whatever stood there is removed after it.

    Raises OSError, and leaves `final` alone then, when anything could not be put on the disk.
    """
    write_synced(partial / MANIFEST, json.dumps({"files": files}, indent=1))
    for folder in {(partial / name).parent for name in files} | {partial}:
        sync_folder(folder)
    old = final.with_name(f".replaced_{final.name}")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    partial.rename(final)
    sync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Put the names of a folder's files on the disk. Raises OSError."""
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def listed(folder: Path) -> Entries | str | None:
    """The files that the folder's manifest lists; what is wrong with it; None when there is no manifest."""
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, entry in found.items():
            inside = (folder / name).resolve().is_relative_to(folder.resolve())
            if not (inside and isinstance(entry["bytes"], int) and isinstance(entry["sha256"], str)):
                return f"{MANIFEST}: {name} is not an entry of it"
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__}: {error})"
    return found


def problem(folder: Path, files: Entries, checksums: bool = True) -> str | None:
    """The first of `files` that is missing or not as it was written; None: all are. Without `checksums`, by size alone."""
    for name, entry in files.items():
        try:
            size = (folder / name).stat().st_size
            if size != entry["bytes"]:
                return f"{name} has {size} bytes instead of {entry['bytes']}"
            if checksums:
                with (folder / name).open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                        return f"{name} has another checksum than it was written with"
        except OSError as error:
            return f"{name}: {error.strerror}"
    return None
