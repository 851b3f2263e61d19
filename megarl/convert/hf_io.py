"""Hugging Face folders on disk: their JSON files, what lies beside the weights, and how a new one appears whole."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megarl.errors import BadInput

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PROVENANCE = "megarl_generate.json"  # the settings a checkpoint was generated from
MANIFEST = ".megarl_convert.json"  # in a temporary folder: what it will be
LARGEST_JSON = 256 << 20  # bytes
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")


def check_inside(folder: Path, path: Path) -> None:
    """Raises BadInput when a link leads from a checkpoint folder's file to somewhere else.

    A snapshot of the Hugging Face cache may lead to the blobs beside it.
    """
    try:
        root, target = folder.resolve(), path.resolve()
    except (OSError, ValueError, RuntimeError) as error:  # a loop of links, or a name that no file can have
        raise BadInput(f"{str(path)!r}: no such file ({one_line(error)}); download the checkpoint again") from None
    root = root.parent.parent if root.parent.name == "snapshots" else root
    if not target.is_relative_to(root):
        raise BadInput(f"{path}: leads to {target}, out of its folder; put the file itself there")


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The object in a JSON file. Raises BadInput when it is missing, malformed or larger than any such file."""
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise BadInput(f"{path}: {path.stat().st_size} bytes, more than {LARGEST_JSON}; {what}")
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; {what}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not readable as JSON ({one_line(error)}); {what}") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path}: must be a JSON object; {what}")
    return value


def read_config(path: str | Path) -> dict[str, Any]:
    """The config.json of a checkpoint folder. Raises BadInput."""
    return read_json(Path(path) / "config.json", "give the folder of a Hugging Face checkpoint")


def pad_token_id(path: str | Path) -> int | None:
    """The padding token of a checkpoint folder: of config.json, the generation config, or the tokenizer; None: none.

    transformers reads a reward model's score at the last token that is not this one.
    """
    folder = Path(path)
    for name in ("config.json", "generation_config.json"):
        if (folder / name).exists():
            found = read_json(folder / name, "restore the checkpoint").get("pad_token_id")
            if found is not None:
                return found
    if not (folder / "tokenizer_config.json").exists():
        return None
    token = read_json(folder / "tokenizer_config.json", "restore the tokenizer").get("pad_token")
    token = token["content"] if isinstance(token, dict) else token
    if token is None or not (folder / "tokenizer.json").exists():
        return None
    tokenizer = read_json(folder / "tokenizer.json", "restore the tokenizer")
    known = {entry["content"]: entry["id"] for entry in tokenizer.get("added_tokens") or []}
    return known.get(token)


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


@contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Holds the place `path` against other processes; a process that dies lets go of it.

    Raises BadInput when another one holds it, naming it, or the place cannot be written.
    """
    lock = Path(path).parent / f".{Path(path).name}.lock"
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        while True:
            file = lock.open("a+")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "another process"
                file.close()
                raise BadInput(f"{path}: {holder} writes there ({lock}); wait for its end or give another folder") from None
            if lock.exists() and os.path.samestat(lock.stat(), os.fstat(file.fileno())):
                break
            file.close()  # its last holder removed it between our two calls
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
    except OSError as error:
        raise BadInput(f"{path}: cannot be written ({error.strerror}); give a folder you can write to") from None
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        file.close()


@contextmanager
def new_folder(path: str | Path, settings: dict[str, Any] | None = None) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place when the block ends well and vanishes otherwise.

    Whatever stood at `path` is replaced in one rename. With `settings`, what describes the work completely, the
    temporary folder of a failed or killed attempt stays, and an attempt with the same settings finds it as it was.
    Raises BadInput when the place cannot be written or another process writes there.
    """
    target = Path(path)
    temporary, old = (target.parent / f".{target.name}.{kind}" for kind in ("new", "old"))
    with locked(target):
        try:
            if not (settings and (temporary / MANIFEST).exists() and _manifest(temporary) == settings):
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir()
                if settings:
                    write_json(temporary / MANIFEST, settings)
            shutil.rmtree(old, ignore_errors=True)
        except OSError as error:
            raise BadInput(f"{target}: cannot be written ({error.strerror}); give a folder you can write to") from None
        resumable = settings is not None
        try:
            yield temporary
            (temporary / MANIFEST).unlink(missing_ok=True)
            if target.exists():
                target.rename(old)
            temporary.rename(target)
        except BaseException as error:
            resumable = resumable and not isinstance(error, BadInput)
            if old.exists() and not target.exists():
                old.rename(target)
            raise
        finally:
            if not resumable:
                shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


def _manifest(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return None


def fingerprint(folder: Path) -> dict[str, list[int]]:
    """Size and time of change of the files a conversion reads, by name."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files}


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def copy_side_files(source: str | Path, folder: Path) -> None:
    """What a checkpoint folder holds besides weights: config.json, tokenizer, generation config, templates, code.

    Folders in it too, but hidden ones. Nothing of it is run.
    """
    for entry in sorted(Path(source).iterdir()):
        check_inside(Path(source), entry)
        if entry.is_dir() and not entry.name.startswith("."):
            (folder / entry.name).mkdir()
            copy_side_files(entry, folder / entry.name)
            if not any((folder / entry.name).iterdir()):
                (folder / entry.name).rmdir()
        elif entry.is_file() and not entry.name.endswith((*WEIGHTS, ".index.json", PROVENANCE)):
            shutil.copyfile(entry, folder / entry.name)
