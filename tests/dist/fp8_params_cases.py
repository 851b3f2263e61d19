"""Run by the ranks of `test_fp8_params_layouts.py`: FP8 parameters of the te provider on the stand-in."""

from __future__ import annotations

import contextlib
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.dist import te_stand_in

te_stand_in.install(capability=100)

from megarl import platform  # noqa: E402
from megarl.checkpoint import Checkpointer  # noqa: E402
from megarl.config.schema import Config, Model, Optimizer, Parallel  # noqa: E402
from megarl.convert import save_hf, stream_hf  # noqa: E402
from megarl.data.packing import micro_batches  # noqa: E402
from megarl.learner.optimizer import main_weight  # noqa: E402
from megarl.learner.policy import Policy  # noqa: E402
from megarl.parallel import Mesh  # noqa: E402
from megarl.platform import features  # noqa: E402
from tests.dist.convert_cases import same  # noqa: E402
from tests.dist.learner_cases import fixed_batch, negative_log_likelihood  # noqa: E402
from tests.dist.provider_cases import torn_down  # noqa: E402

from megatron.core.distributed import param_and_grad_buffer as buffers  # isort: skip  # noqa: E402

features.transformer_engine_problem = lambda: None  # there is no CUDA device


def alone(plain: Any) -> Any:
    return lambda *args, async_op, **how: plain(*args, **how)


# gloo makes one buffer of what Megatron gathers at once, of the first one's dtype: bytes and bfloat16 one by one then
buffers.dist_all_gather_func = alone(buffers.dist_all_gather_func)
buffers.dist_reduce_scatter_func = alone(buffers.dist_reduce_scatter_func)
buffers._coalescing_manager = lambda *_, **__: contextlib.nullcontext(types.SimpleNamespace(wait=lambda: None))
STEPS = 2


class Run:
    """A policy that takes steps; what it has found so far."""

    def __init__(self, path: str, saved: str, degrees: dict[str, Any], **model: Any) -> None:
        cfg = Config(model=Model(path=path, layers="te", dtype="bfloat16", **model), parallel=Parallel(**degrees))
        self.mesh = Mesh.build(cfg.parallel)
        optimizer = Optimizer(lr=1e-2, weight_decay=0.1, clip_grad=0.0)
        self.policy = Policy.from_hf(path, cfg, self.mesh, optimizer=optimizer, total_steps=10)
        self.packed = micro_batches(fixed_batch(), 400, self.policy.layout)
        self.checkpointer = Checkpointer(Path(saved), self.mesh, keep=1)
        self.checkpointer.register("policy", self.policy)
        self.norms: list[float] = []

    def log_probs(self) -> list[Tensor]:
        return [x.clone() for x in self.policy.log_probs(self.packed)[0]]

    def step(self) -> None:
        self.norms.append(self.policy.train_step(self.packed, negative_log_likelihood).grad_norm)

    def streamed(self) -> dict[str, Tensor]:
        return {name: x.clone() for name, x in stream_hf(self.policy.modules, self.policy.spec, self.mesh)}

    def quantised(self) -> list[Tensor]:
        return [p for module in self.policy.modules for p in module.parameters() if platform.is_quantised(p)]

    def codes(self) -> list[Tensor]:
        return [p.codes.clone() for p in self.quantised()]

    def holds_main(self) -> bool:
        """Every weight is what this rank's part of its main weight rounds to, by columns too."""
        self.policy.modules  # noqa: B018 - waits for a gather
        for parameter in self.quantised():
            found = main_weight(self.policy.optimizer, parameter)
            if not torch.equal(parameter.columns, parameter.codes.t()):
                return False
            if found is None:
                continue
            whole = platform.plain(parameter).float().view(-1)
            whole[found[1]] = found[0].bfloat16().float()
            again = parameter.get_metadata()["quantizer"](whole.view(parameter.shape).bfloat16())
            if not torch.equal(platform.plain(again).view(-1)[found[1]], platform.plain(parameter).view(-1)[found[1]]):
                return False
        return True


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def agree(path: str, saved: str, recipe: str, degrees: dict[str, Any]) -> dict[str, Any]:
    """A run with FP8 parameters beside one whose products round bfloat16 ones; checkpoints of both in each other."""
    plain = Run(path, f"{saved}/plain", degrees, fp8=recipe)
    start, folder = plain.log_probs(), plain.streamed()
    plain.step(), plain.checkpointer.save(1)
    middle = plain.log_probs()
    for _ in range(STEPS):
        plain.step()
    end, norms = plain.log_probs(), plain.norms
    torn_down()

    run = Run(path, f"{saved}/fp8", degrees, fp8=recipe, fp8_params=True)
    mains = [(p, main_weight(run.policy.optimizer, p)) for p in run.quantised()]
    streamed = run.streamed()
    out: dict[str, Any] = {
        "quantised": len(run.quantised()),
        "initial": any(p.get_high_precision_init_val() is not None for p in run.quantised()),
        "start": equal(run.log_probs(), start) and run.holds_main(),
        # main weights have more than 4 bits of mantissa, weights have not
        "exact": [bool((m[0].bfloat16() != platform.plain(p).view(-1)[m[1]]).any()) for p, m in mains if m is not None],
        "rounded": sum(not torch.equal(streamed[name], folder[name]) for name in folder),
    }
    run.step(), run.checkpointer.save(1)
    codes = run.codes()
    out["middle"] = equal(run.log_probs(), middle)
    save_hf(f"{saved}/export", run.policy.modules, run.policy.spec, run.mesh, extra_from=path)
    exported = run.streamed()
    for _ in range(STEPS):
        run.step()
    out |= {"end": equal(run.log_probs(), end), "norms": [run.norms, norms], "main": run.holds_main()}
    after = run.codes()
    torn_down()

    resumed = Run(path, f"{saved}/fp8", degrees, fp8=recipe, fp8_params=True)
    assert resumed.checkpointer.load_latest() == 1
    out["resumed"] = equal(resumed.codes(), codes) and resumed.holds_main()
    for _ in range(STEPS):
        resumed.step()
    out["resumed end"] = equal(resumed.codes(), after)
    torn_down()

    for name, own, other, model in (
        ("plain into fp8", "plain", middle, dict(fp8_params=True)),
        ("fp8 into plain", "fp8", middle, {}),
    ):
        crossed = Run(path, f"{saved}/{own}", degrees, fp8=recipe, **model)
        assert crossed.checkpointer.load_latest() == 1
        out[name] = equal(crossed.log_probs(), other)
        for _ in range(STEPS):
            crossed.step()
        out[f"{name} end"] = equal(crossed.log_probs(), end)
        torn_down()

    read = Run(f"{saved}/export", f"{saved}/none", degrees, fp8="none")
    out["export"] = same(read.streamed(), exported)
    torn_down()
    return out
