"""`megarl` whose ranks are forks of a launcher that has imported everything, so that a start costs a second or two instead
of six to twenty: python -m tests.faults.warm_program sft|train CONFIG ... For soaks; all but the imports is the real thing.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import struct
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

PR_SET_MM, PR_SET_MM_MAP, NO_FILE = 35, 14, 0xFFFFFFFF
BOTH = ["reasoning_gym", "transformers.models.auto.tokenization_auto", "transformers.tokenization_utils_tokenizers",
        "transformers.models.qwen2.tokenization_qwen2", "transformers.masking_utils"]  # fmt: skip
ENGINE = ["vllm.entrypoints.llm", "vllm.v1.worker.cpu_worker", "vllm.model_executor.models.qwen3_moe"]
PARTS = {"sft": ["megarl.trainers.sft", *BOTH], "train": ["megarl.trainers.rl", *BOTH, *ENGINE]}
_kept: list[Any] = []  # what the kernel reads an environment from


class Fork:
    """A rank: as much of subprocess.Popen as the launcher uses."""

    def __init__(
        self, command: Sequence[str], env: dict[str, str], stdout: Any, preexec_fn: Callable[[], None], **_rest: Any
    ) -> None:
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                code = _rank(command, env, stdout.fileno(), preexec_fn)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)

    def wait(self) -> int:
        if not hasattr(self, "code"):
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.code

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def _rank(command: Sequence[str], env: dict[str, str], log: int, prepare: Callable[[], None]) -> int:
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.clear()
    os.environ.update(env)
    _show_environment(env)
    prepare()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)
    tempfile.tempdir = None  # of the launcher
    sys.argv = ["megarl", *command[3:]]
    from megarl.cli import main

    try:
        main()
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 0


def _show_environment(env: dict[str, str]) -> None:
    """In /proc, by which the launcher's guard, the watchdog and the tests know a rank. Raises OSError."""
    block = b"".join(f"{name}={value}\0".encode() for name, value in env.items())
    memory = ctypes.create_string_buffer(block)
    _kept.append(memory)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.sbrk.restype = ctypes.c_void_p
    fields = [int(word) for word in Path("/proc/self/stat").read_text().rpartition(")")[2].split()[1:]]
    code, stack, data, heap, arguments = fields[22:24], fields[24:25], fields[41:43], fields[43:44], fields[44:46]
    start = ctypes.addressof(memory)
    places = [*code, *data, *heap, libc.sbrk(0), *stack, *arguments, start, start + len(block)]
    layout = struct.pack("11QQII", *places, 0, 0, NO_FILE)
    if libc.prctl(PR_SET_MM, PR_SET_MM_MAP, layout, ctypes.c_ulong(len(layout)), 0):
        raise OSError(ctypes.get_errno(), "PR_SET_MM_MAP: the environment in /proc cannot be changed")


def _popen(command: Sequence[str], **options: Any) -> Any:
    return Fork(command, **options) if list(command[1:3]) == ["-m", "megarl"] else subprocess.Popen(command, **options)


def main() -> None:
    from megarl import cli, launcher, platform
    from megarl.platform import vllm_patches

    platform.setup()
    if sys.argv[1] == "train":
        for key, value in vllm_patches.environment().items():
            os.environ.setdefault(key, value)
    for name in PARTS[sys.argv[1]]:
        importlib.import_module(name)
    threads = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    threads = [name for name in threads[1:] if name != "jemalloc_bg_thd"]  # pyarrow's, whose allocator knows forks
    if threads:
        raise SystemExit(f"threads {', '.join(threads)}: a fork would have their locks and not them")
    launcher.subprocess = SimpleNamespace(Popen=_popen, PIPE=subprocess.PIPE, DEVNULL=subprocess.DEVNULL)
    cli.main()


if __name__ == "__main__":
    main()
