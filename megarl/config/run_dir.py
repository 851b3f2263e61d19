"""The run folder: refused, or made whole, before anything starts."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megarl.config.load import dump_config
from megarl.config.schema import Config
from megarl.errors import BadInput


@dataclass(frozen=True)
class RunDir:
    """`RUN_DIR/<part>`, what `prepare_run_dir` had to make for it (outermost first) and the config it replaced."""

    path: Path
    created: tuple[Path, ...]
    replaced: bytes | None = None

    def discard(self) -> None:
        """Undo what was made: the job turned out not to be able to start, and must leave nothing half-written.

        Once there are results (metrics or a checkpoint) everything stays: an input can turn out bad in the middle.
        """
        results = (*self.path.glob("*.jsonl"), *self.path.glob("checkpoints/step_*"))
        if self.path in self.created and any(file.stat().st_size for file in results):
            return
        if self.replaced is not None:
            with suppress(OSError):
                _write(self.path.parent / "config.yaml", self.replaced)
        for path in self.created:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with suppress(OSError):
                    path.unlink()


def prepare_run_dir(config: Config, part: str) -> RunDir:
    """Make `RUN_DIR/<part>/logs` (part: sft, reward_model, rl, eval, verify) and write `RUN_DIR/config.yaml`.

    Raises `BadInput`, and writes nothing, when sft/, reward_model/ or rl/ already holds a run and `resume` is `never`,
    or when the folder cannot be written.
    """
    root = Path(config.run_dir)
    path = root / part
    missing: list[Path] = []
    replaced: bytes | None = None
    try:
        check_run_dir(config, part)
        chain = (*reversed(root.parents), root, path, path / "logs", root / "config.yaml")
        missing = [p for p in chain if not p.exists()]
        if (root / "config.yaml").exists():
            replaced = (root / "config.yaml").read_bytes()
        (path / "logs").mkdir(parents=True, exist_ok=True)
        _write(root / "config.yaml", dump_config(config).encode())
    except OSError as e:
        RunDir(path, tuple(missing), replaced).discard()
        raise BadInput(
            f"run_dir = {config.run_dir!r}: cannot be written ({e.strerror}: {e.filename}); set another run_dir"
        ) from None
    return RunDir(path, tuple(missing), replaced)


def check_run_dir(config: Config, part: str) -> None:
    """Raises `BadInput` when RUN_DIR/<part> already holds a run that is not to be continued."""
    path = Path(config.run_dir) / part
    # under torchrun another rank may have opened its log already
    if (
        part in ("sft", "reward_model", "rl")
        and config.resume == "never"
        and path.is_dir()
        and any(p.name != "logs" for p in path.iterdir())
    ):
        raise BadInput(
            f"run_dir = {config.run_dir!r}: {path} already holds a run; "
            "set resume=auto to continue it, or another run_dir"
        )


def _write(file: Path, content: bytes) -> None:
    """Replace `file` in one step."""
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=".config-")
    with os.fdopen(handle, "wb") as out:
        out.write(content)
    os.chmod(name, 0o644)
    os.replace(name, file)
