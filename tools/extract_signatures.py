"""Writes down what megarl and Megatron-core rely on of a package that cannot be imported here: names, signatures, shapes.

Example: pip download --no-deps transformer-engine==2.11.0 -d /tmp/te && unzip -q /tmp/te/*.whl -d /tmp/te/source
         python tools/extract_signatures.py transformer-engine /tmp/te/source

reads the sources, without running them, and writes `tests/signatures/transformer-engine.json`, which
`tests/unit/test_signatures.py` holds the callers against. NVIDIA Apex is a checkout of github.com/NVIDIA/apex.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "signatures"


@dataclass(frozen=True)
class Wanted:
    """The public names of one pinned release; of a class the methods that are called."""

    version: str
    names: dict[str, tuple[str, ...]] = field(default_factory=dict)


TE, PT = "transformer_engine", "transformer_engine.pytorch"
QUANTISED = ("Float8Tensor", "Float8BlockwiseQTensor", "mxfp8_tensor.MXFP8Tensor")
WANTED = {
    "transformer-engine": Wanted(
        "2.11.0",
        {
            f"{PT}.Linear": ("__init__", "forward"),
            f"{PT}.LayerNormLinear": ("__init__", "forward"),
            f"{PT}.GroupedLinear": ("__init__", "forward"),
            f"{PT}.RMSNorm": ("__init__",),
            f"{PT}.ops.basic.rmsnorm.RMSNorm": ("__init__",),
            f"{PT}.LayerNorm": ("__init__",),
            f"{PT}.ops.Sequential": ("__init__",),
            f"{PT}.ops.FusibleOperation": (),
            f"{PT}.module.base.TransformerEngineBaseModule": ("set_extra_state", "get_extra_state", "init_fp8_metadata"),
            f"{PT}.DotProductAttention": ("__init__", "forward", "set_context_parallel_group"),
            f"{PT}.Fp8Padding": ("__init__", "forward"),
            f"{PT}.Fp8Unpadding": ("__init__", "forward"),
            f"{PT}.fp8_autocast": (),
            f"{PT}.fp8_model_init": (),
            f"{PT}.is_fp8_available": (),
            f"{PT}.is_mxfp8_available": (),
            f"{PT}.is_fp8_block_scaling_available": (),
            f"{PT}.fp8.fp8_autocast": (),
            f"{PT}.fp8.FP8GlobalStateManager": ("is_fp8_enabled", "reset"),
            f"{PT}.quantization.get_align_size_for_quantization": (),
            f"{PT}.distributed.checkpoint": (),
            f"{PT}.distributed.activation_recompute_forward": (),
            f"{PT}.distributed.CudaRNGStatesTracker": ("__init__", "reset", "set_states", "add"),
            f"{PT}.tensor.QuantizedTensor": ("dequantize", "quantize_", "detach", "get_metadata", "make_like"),
            **{f"{PT}.tensor.{kind}": ("dequantize", "quantize_", "detach") for kind in QUANTISED},
            **{f"{PT}.tensor.{kind}Storage": ("__new__", "get_metadata") for kind in QUANTISED[:2]},
            f"{PT}.tensor.MXFP8TensorStorage": ("__new__", "get_metadata"),
            f"{PT}.tensor.utils.replace_raw_data": (),
            f"{PT}.tensor.utils.cast_master_weights_to_fp8": (),
            f"{PT}.tensor.utils.post_all_gather_processing": (),
            f"{PT}.router.fused_topk_with_score_function": (),
            f"{PT}.router.fused_compute_score_for_moe_aux_loss": (),
            f"{PT}.router.fused_moe_aux_loss": (),
            f"{PT}.optimizers.FusedAdam": ("__init__", "step"),
            f"{TE}.common.recipe.Format": (),
            f"{TE}.common.recipe.DelayedScaling": ("__init__",),
            f"{TE}.common.recipe.Float8CurrentScaling": ("__init__",),
            f"{TE}.common.recipe.Float8BlockScaling": ("__init__",),
            f"{TE}.common.recipe.QParams": ("__init__",),
            f"{TE}.common.recipe.MXFP8BlockScaling": ("__init__",),
        },
    ),
    # built from source; its releases are dates and nothing on the Python index is Apex
    "apex": Wanted(
        "github.com/NVIDIA/apex",
        {"apex.optimizers.FusedAdam": ("__init__", "step"), "apex.normalization.FusedRMSNorm": ("__init__",)},
    ),
}


def table(package: str, source: Path) -> dict[str, Any]:
    """What `WANTED` asks for of a package whose modules lie under `source`. Raises KeyError for a name that is gone."""
    wanted = WANTED[package]
    names = {name: _described(source, name, methods) for name, methods in wanted.names.items()}
    return {"package": package, "version": wanted.version, "names": names}


def _described(source: Path, name: str, methods: tuple[str, ...]) -> dict[str, Any]:
    path, node = _find(source, name)
    found: dict[str, Any] = {
        "file": str(path.relative_to(source)),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    if isinstance(node, ast.FunctionDef):
        return found | {"signature": _signature(node)}
    bodies = {item.name: item for item in node.body if isinstance(item, ast.FunctionDef)}
    for method in methods:
        if method in bodies:
            found[method] = _signature(bodies[method])
        elif method == "__init__":  # of a dataclass; pydantic's take what they do not know and drop it
            found[method] = ", ".join(["self", *_fields(path, node)])
            found["drops_unknown"] = "from pydantic.dataclasses import dataclass" in path.read_text()
        else:
            raise KeyError(f"{name}.{method}: is not in {path}")
    plain = [t.id for item in node.body if isinstance(item, ast.Assign) for t in item.targets if isinstance(t, ast.Name)]
    if plain:
        found["attributes"] = plain  # of the class: an enumeration's members
    parameters = _parameters(bodies["__init__"]) if "__init__" in bodies else {}
    return found | ({"parameters": parameters} if parameters else {})


def _find(source: Path, name: str) -> tuple[Path, Any]:
    """Where a public name is defined, following the packages' own imports."""
    module, _, own = name.rpartition(".")
    path = _file(source, module)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == own:
            return path, node
        if isinstance(node, ast.ImportFrom) and any((alias.asname or alias.name) == own for alias in node.names):
            original = next(alias.name for alias in node.names if (alias.asname or alias.name) == own)
            return _find(source, f"{_absolute(source, path, node)}.{original}")
    raise KeyError(f"{name}: is not in {path}")


def _file(source: Path, module: str) -> Path:
    path = source / module.replace(".", "/")
    for candidate in (path / "__init__.py", path.with_suffix(".py")):
        if candidate.is_file():
            return candidate
    raise KeyError(f"{module}: there is no such module under {source}")


def _absolute(source: Path, path: Path, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    folder = path.parent
    for _ in range(node.level - 1):
        folder = folder.parent
    return ".".join([*folder.relative_to(source).parts, *filter(None, [node.module])])


def _signature(node: ast.FunctionDef) -> str:
    """Arguments and defaults, without annotations."""
    arguments = node.args
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg):
        if argument is not None:
            argument.annotation = None
    return ast.unparse(arguments)


def _fields(path: Path, node: ast.ClassDef) -> list[str]:
    """A dataclass's fields with their defaults, after those of its bases in the same file."""
    classes = {item.name: item for item in ast.parse(path.read_text()).body if isinstance(item, ast.ClassDef)}
    out = [f for base in node.bases if ast.unparse(base) in classes for f in _fields(path, classes[ast.unparse(base)])]
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            out.append(item.target.id + ("" if item.value is None else f"={_short(item.value)}"))
    return out


def _short(value: ast.expr) -> str:
    return ast.unparse(value) if isinstance(value, ast.Constant | ast.Attribute | ast.Name) else "..."


def _parameters(init: ast.FunctionDef) -> dict[str, str]:
    """Registered parameter -> its shape, in the words of the constructor."""
    assigned = {ast.unparse(t): n.value for n in ast.walk(init) if isinstance(n, ast.Assign) for t in n.targets}
    shapes = {}
    for call in ast.walk(init):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "self.register_parameter":
            name, value = call.args[:2]
            shapes[_named(name, assigned, init)] = _shape(value, assigned)
    return shapes


def _named(name: ast.expr, assigned: dict[str, ast.expr], init: ast.FunctionDef) -> str:
    """A constant; `weight{i}` of an f-string; of a list that is filled elsewhere: what it is filled with by default."""
    if isinstance(name, ast.Constant):
        return str(name.value)
    if isinstance(name, ast.JoinedStr):
        return ast.unparse(name)[2:-1]
    owner = ast.unparse(name.value) if isinstance(name, ast.Subscript) else ast.unparse(name)
    lists = [n.value for n in ast.walk(init) if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == owner]
    constants = [item.value for n in lists if isinstance(n, ast.List) for item in n.elts if isinstance(item, ast.Constant)]
    return constants[0] if constants else owner


def _shape(value: ast.expr, assigned: dict[str, ast.expr], depth: int = 4) -> str:
    for node in ast.walk(value):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.empty", "torch.zeros"):
            return ", ".join(ast.unparse(argument) for argument in node.args)
    for node in ast.walk(value):
        if depth and isinstance(node, ast.Name) and node.id in assigned and assigned[node.id] is not value:
            found = _shape(assigned[node.id], assigned, depth - 1)
            if found:
                return found
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", choices=sorted(WANTED))
    parser.add_argument("source", type=Path, help="the folder above the package's modules")
    parser.add_argument("--out", type=Path, default=FOLDER)
    arguments = parser.parse_args()
    path = arguments.out / f"{arguments.package}.json"
    path.write_text(json.dumps(table(arguments.package, arguments.source), indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
