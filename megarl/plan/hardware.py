"""Chips and what connects them: peaks as their makers state them, and the shares of these that programs reach."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from megarl.errors import BadInput

TERA, GIGA, GIB = 1e12, 1e9, float(2**30)


@dataclass(frozen=True)
class Efficiency:
    """Shares of a peak that are reached, each between 0 and 1; on a machine at hand `megarl plan --calibrate` measures.

    The defaults are assumptions for GPUs, not measurements of this project: large BF16 products reach 60 to 75 % of the
    peak, layers with what lies between their products less.
    """

    products: float = 0.5  # of `flops`, by dense layers
    experts: float = 0.35  # of `flops`, by grouped products of experts, which are smaller and of unequal sizes
    attention: float = 0.4  # of `flops`, by attention scores
    memory: float = 0.7  # of `memory_bandwidth`
    link: float = 0.7  # of `link_bandwidth`
    network: float = 0.7  # of `network_bandwidth`
    balance: float = 0.8  # mean load of an expert-parallel rank over that of the fullest, which the others wait for


@dataclass(frozen=True)
class Hardware:
    """One chip and its share of a node. Bandwidths in bytes a second, in one direction; latencies in seconds.

    Example: `named("h100").flops["bfloat16"]` is 989.4e12.
    """

    name: str
    flops: dict[str, float]  # dense, by precision: float32, bfloat16, float8
    memory_bytes: float
    memory_bandwidth: float
    link_bandwidth: float  # of one GPU to the others of its node
    network_bandwidth: float  # of one GPU to other nodes
    gpus_per_node: int
    host_bandwidth: float  # of one GPU to its host's memory
    storage_bandwidth: float = 1 * GIGA  # of one GPU to a shared file system; an assumption
    link_latency: float = 10e-6  # of a collective inside a node; an assumption, as the three that follow
    network_latency: float = 50e-6  # of one over nodes
    decode_overhead: float = 5e-3  # of one engine step beside its kernels: scheduling, sampling, log-probs
    host_flops: float = 100 * GIGA  # of a GPU's share of the host's cores, for an optimizer that is stepped there
    efficiency: Efficiency = field(default_factory=Efficiency)

    def peak(self, dtype: str) -> float:
        """FLOP/s of a precision; of one that the chip has no product for, those of the next wider one."""
        for name in {"float8": ("float8", "bfloat16", "float32"), "bfloat16": ("bfloat16", "float32")}.get(dtype, ()):
            if name in self.flops:
                return self.flops[name]
        return self.flops["float32"]

    def save(self, path: str | Path) -> None:
        """As JSON that `load` reads."""
        Path(path).write_text(json.dumps(asdict(self), indent=2) + "\n")


# Dense peaks without sparsity; NVLink and network in one direction, half of what data sheets add up for both.
CHIPS = {
    "a100": Hardware(
        "a100",
        # NVIDIA A100 80GB SXM data sheet (2021): FP32 19.5, BF16 312 TFLOPS; 2,039 GB/s; NVLink 600 GB/s
        flops={"float32": 19.5 * TERA, "bfloat16": 312 * TERA},
        memory_bytes=80 * GIGA,
        memory_bandwidth=2039 * GIGA,
        link_bandwidth=300 * GIGA,
        network_bandwidth=25 * GIGA,  # DGX A100 data sheet: one 200 Gb/s adapter a GPU
        gpus_per_node=8,
        host_bandwidth=32 * GIGA,  # PCIe 4.0 x16
    ),
    "h100": Hardware(
        "h100",
        # NVIDIA H100 SXM data sheet (2023): FP32 67, BF16 1,979 and FP8 3,958 TFLOPS with sparsity, so half of these
        # dense; 80 GB at 3.35 TB/s; NVLink 900 GB/s
        flops={"float32": 67 * TERA, "bfloat16": 989.4 * TERA, "float8": 1979 * TERA},
        memory_bytes=80 * GIGA,
        memory_bandwidth=3350 * GIGA,
        link_bandwidth=450 * GIGA,
        network_bandwidth=50 * GIGA,  # DGX H100 data sheet: one 400 Gb/s adapter a GPU
        gpus_per_node=8,
        host_bandwidth=64 * GIGA,  # PCIe 5.0 x16
    ),
    "h200": Hardware(
        "h200",
        # NVIDIA H200 SXM data sheet (2024): products as the H100; 141 GB at 4.8 TB/s
        flops={"float32": 67 * TERA, "bfloat16": 989.4 * TERA, "float8": 1979 * TERA},
        memory_bytes=141 * GIGA,
        memory_bandwidth=4800 * GIGA,
        link_bandwidth=450 * GIGA,
        network_bandwidth=50 * GIGA,  # DGX H200 data sheet: one 400 Gb/s adapter a GPU
        gpus_per_node=8,
        host_bandwidth=64 * GIGA,
    ),
    "b200": Hardware(
        "b200",
        # NVIDIA DGX B200 data sheet (2024), of eight: FP8 72 PFLOPS and so BF16 36 with sparsity, half of these dense;
        # 1,440 GB at 64 TB/s; NVLink 14.4 TB/s. FP32: 75 TFLOPS (HGX B200, 600 of eight)
        flops={"float32": 75 * TERA, "bfloat16": 2250 * TERA, "float8": 4500 * TERA},
        memory_bytes=180 * GIGA,
        memory_bandwidth=8000 * GIGA,
        link_bandwidth=900 * GIGA,
        network_bandwidth=50 * GIGA,  # DGX B200 data sheet: one 400 Gb/s adapter a GPU
        gpus_per_node=8,
        host_bandwidth=64 * GIGA,
    ),
    "cpu": Hardware(
        "cpu",
        # no data sheet: one of two ranks on a two-core AMD EPYC, measured by `megarl plan --calibrate` with both at work,
        # 2026-11-29; what was reached, so that the shares are 1
        flops={"float32": 100 * GIGA, "bfloat16": 200 * GIGA},
        memory_bytes=12 * GIB,
        memory_bandwidth=27 * GIGA,
        link_bandwidth=2 * GIGA,  # gloo through the loopback interface
        network_bandwidth=2 * GIGA,
        gpus_per_node=2,
        host_bandwidth=27 * GIGA,
        storage_bandwidth=0.5 * GIGA,  # an assumption
        link_latency=500e-6,
        network_latency=500e-6,
        decode_overhead=10e-3,
        host_flops=20 * GIGA,
        efficiency=Efficiency(1.0, 0.8, 0.25, 1.0, 1.0, 1.0, 0.8),
    ),
}


def named(gpu: str) -> Hardware:
    """A chip by its name, or the hardware of a JSON file that `megarl plan --calibrate` wrote (a name with a dot or slash).

    Raises BadInput for another name, and for a file that is no such thing.
    """
    if gpu in CHIPS:
        return CHIPS[gpu]
    if "." not in gpu and "/" not in gpu:
        raise BadInput(f"--gpu {gpu}: no such chip; give one of {', '.join(CHIPS)}, or a file of megarl plan --calibrate")
    return load(gpu)


def load(path: str | Path) -> Hardware:
    """The hardware of a JSON file. Raises BadInput naming the first key that is missing, unknown or no such number."""
    try:
        data = json.loads(Path(path).read_text())
    except (OSError, ValueError) as e:
        raise BadInput(f"--gpu {path}: {str(e).splitlines()[0]}; give a file that megarl plan --calibrate wrote") from None
    if not isinstance(data, dict):
        raise BadInput(f"--gpu {path}: holds no `key: value` pairs; give a file that megarl plan --calibrate wrote")
    efficiency = data.get("efficiency", {})
    _check(path, "efficiency.", efficiency, Efficiency, least=1e-6, most=1.0)
    _check(path, "", {k: v for k, v in data.items() if k not in ("name", "flops", "efficiency")}, Hardware)
    flops = data.get("flops")
    if not isinstance(flops, dict) or not _positive(flops.get("float32")) or not all(map(_positive, flops.values())):
        raise BadInput(f"--gpu {path}: flops = {flops!r}; set FLOP/s by precision, float32 at least")
    missing = [f.name for f in fields(Hardware) if f.name not in data and f.name in _NEEDED]
    if missing:
        raise BadInput(f"--gpu {path}: {missing[0]} is missing; add it")
    return Hardware(**{**data, "efficiency": Efficiency(**efficiency)})


_NEEDED = (
    "name", "flops", "memory_bytes", "memory_bandwidth", "link_bandwidth", "network_bandwidth", "gpus_per_node",
    "host_bandwidth",
)  # fmt: skip


def _check(path: Any, prefix: str, data: Any, kind: type, least: float = 1e-12, most: float = float("inf")) -> None:
    if not isinstance(data, dict):
        raise BadInput(f"--gpu {path}: {prefix[:-1]} = {data!r}; set `key: value` pairs")
    known = {f.name for f in fields(kind)}
    for key, value in data.items():
        if key not in known:
            raise BadInput(f"--gpu {path}: {prefix}{key}: unknown key; set one of {', '.join(sorted(known))}")
        if not _positive(value) or not least <= value <= most:
            bound = f" of at most {most:g}" if most < float("inf") else ""
            raise BadInput(f"--gpu {path}: {prefix}{key} = {value!r}; set a number above 0{bound}")


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")
