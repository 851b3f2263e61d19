"""What each rank runs for the tests of FP8 rollout: a learner, an engine with FP8 layers, and the syncs between them."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

from megarl import platform
from megarl.config.schema import Config, Model, Parallel, Rollout
from megarl.errors import BadInput, RunFailed
from tests.dist.vllm_cases import CONTEXT

SHAPE = dict(
    hidden_size=256, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=128, num_experts=4, moe_intermediate_size=128
)
Q, DOWN = (f"model.layers.1.{name}.weight" for name in ("self_attn.q_proj", "mlp.experts.3.down_proj"))


def sync(path: str, dtype: str = "float32", model: dict[str, Any] = {}, rollout: dict[str, Any] = {}, head: float = 1.0,
         **degrees) -> dict:  # fmt: skip
    """Syncs a learner into an engine with FP8 layers, whole, broken in several ways, and by vLLM's own reload.

    `model`: further settings of the learner. Layer 0 stays plain on both sides. `head`: what the logits are multiplied by.
    """
    platform.setup()
    from megarl.convert import stream_hf
    from megarl.learner.policy import Policy
    from megarl.learner.probes import probe_log_probs
    from megarl.models.fp8 import Product, recipe_of
    from megarl.parallel import Mesh
    from megarl.rollout.fp8_weights import Fp8Weights
    from megarl.rollout.vllm_engine import VLLMEngine
    from megarl.rollout.weight_sync import (
        WeightSync,
        check_checksums,
        check_sync,
        default_threshold,
        make_probes,
        measure_gap,
    )

    parallel, settings = Parallel(**degrees), Model(path=path, dtype=dtype, fp8_skip_first=1, **model)
    mesh = Mesh.build(parallel)
    policy = Policy.from_hf(path, Config(model=settings, parallel=parallel), mesh)
    policy.modules[0].output_layer.weight.data.mul_(head)
    wanted = Rollout(max_context=CONTEXT, fp8="blockwise", **rollout)
    fp8 = Fp8Weights.of(policy.spec, settings, wanted)
    start = functools.partial(VLLMEngine, path, wanted, seed=3, mesh=mesh, load=False, fp8=fp8)
    refused = _refusal(start)
    engine = start(dtype)
    weight_sync = WeightSync(policy.spec, parallel, mesh, engine)
    probes = make_probes(policy.spec.vocab_size, 3, engine.probe_length)

    def check() -> list[float] | str:
        engine.reset_prefix_cache()  # what an earlier check left
        expected = probe_log_probs(policy, probes, fp8)
        try:
            gap = check_sync(weight_sync, policy.modules, probes, expected, default_threshold(dtype, fp8=True))
        except RunFailed as error:
            return str(error)
        return [gap.mean, gap.max, gap.median]

    def sums() -> str:
        try:
            check_checksums(weight_sync, policy.modules)
        except RunFailed as error:
            return str(error)
        return "equal"

    def broken(change: Any) -> list[Any]:
        weights = dict(weight_sync.stream(policy.modules))
        change(weights)
        engine.load_weights(weights.items(), 6)
        found = [check(), sums()]
        engine.load_weights(weight_sync.stream(policy.modules), 7)
        return found

    out: dict[str, Any] = {"refused": refused}
    out |= {"rounding": _rounding(engine.vllm_config), "as_loaded": _as_loaded()}
    report = weight_sync.run(policy.modules, policy_version=5)
    out |= {"bytes": weight_sync.plan.bytes, "written": report.traffic.written, "reload": engine.reload_reason}
    out |= {"synced": check(), "sums": sums(), "codes": _same_codes(stream_hf, policy, mesh, engine, Product, recipe_of)}
    engine.reset_prefix_cache()
    scores, plain = engine.score(probes), probe_log_probs(policy, probes)
    out["same_start"] = _same_start(probe_log_probs(policy, probes, fp8), scores)
    out["plain_learner"] = [measure_gap(engine, probes, plain, mesh).mean, _same_start(plain, scores)]
    out["factors"] = broken(lambda weights: weights[f"{DOWN}_scale_inv"].mul_(4))
    out["codes_moved"] = broken(lambda weights: weights.update({Q: weights[Q].view(torch.uint8).roll(1, 0).view(weights[Q].dtype)}))
    for chunk in policy.modules:
        for parameter in chunk.parameters():
            parameter.data.mul_(1.1)
    out["stale"] = [check(), sums()]
    weight_sync.run(policy.modules, 6)
    engine.reset_prefix_cache()
    scores = engine.score(probes)
    engine._direct, engine.reload_reason = None, "it is asked for"
    whole = WeightSync(policy.spec, parallel, mesh, engine)
    whole.run(policy.modules, 7)
    out["reloaded"] = max(float(np.abs(a - b).max()) for a, b in zip(engine.score(probes), scores, strict=True))
    return out


def _same_start(learner: list[np.ndarray], engine: list[np.ndarray]) -> int:
    """Tokens that agree to 1e-4 from a probe's second on, up to its first that does not, of all probes together.

    A last bit may make a neighbouring code, and attention hands that on to every token after it, but to none before.
    """
    different = [np.abs(a[1:] - b[1:]) > 1e-4 for a, b in zip(learner, engine, strict=True)]
    return sum(int(flags.argmax()) if flags.any() else len(flags) for flags in different)


def _same_codes(stream_hf: Any, policy: Any, mesh: Any, engine: Any, product: Any, recipe_of: Any) -> dict[str, int]:
    """Of how many tensors the engine has the numbers that the learner's products in FP8 multiply with."""
    from megarl.models.fp8 import Quantised, dequantize

    model = Model(path="", fp8="blockwise", fp8_power_of_two=engine.fp8.power_of_two)
    operand, found = product(recipe_of(model)).operand, {"same": 0, "other": 0}
    for name, tensor in stream_hf(policy.modules, policy.spec, mesh):
        hosted = engine.hosted_weight(name)
        if hosted is None or name not in engine.fp8.coded:
            continue
        (box, codes), (_, factors) = hosted, engine.hosted_weight(f"{name}_scale_inv")
        own = operand(tensor, "weight", False)
        own = dequantize(own) if isinstance(own, Quantised) else own
        same = torch.equal(own[box].float(), dequantize(Quantised(codes, factors, (128, 128))))
        found["same" if same else "other"] += 1
    return found


def _rounding(vllm_config: Any) -> list[bool]:
    """Whether activations are rounded as by vLLM's quantiser; and those below 1/512, which it scales as on no GPU."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
    from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape, scaled_dequantize

    from megarl.platform import vllm_fp8

    x = torch.randn(40, 384, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 4, 40)[:, None]
    with set_current_vllm_config(vllm_config):
        codes, scales = QuantFP8(False, GroupShape(1, 128)).forward_native(x)
    small = x * 1e-6
    near = (vllm_fp8.rounded(small) - small).abs() <= small.abs() / 16 + small.abs().amax(1, keepdim=True) / 448 / 512
    return [torch.equal(vllm_fp8.rounded(x), scaled_dequantize(codes, scales, GroupShape(1, 128))), bool(near.all())]


def _as_loaded() -> dict[str, bool]:
    """Whether vLLM's kernels for GPUs that codes are written for in place leave parameters as they are loaded."""
    from vllm.model_executor.kernels.linear.scaled_mm import cutlass, triton
    from vllm.model_executor.kernels.linear.scaled_mm.BlockScaledMMLinearKernel import Fp8BlockScaledMMLinearKernel
    from vllm.model_executor.layers.fused_moe.oracle import fp8
    from vllm.model_executor.layers.quantization.utils.fp8_utils import process_fp8_weight_block_strategy

    from megarl.platform import vllm_fp8

    weights = [torch.zeros(2, 256, 128).to(torch.float8_e4m3fn), torch.zeros(2, 128, 128).to(torch.float8_e4m3fn)]
    factors = [torch.ones(2, 2, 1), torch.ones(2, 1, 1)]
    layer = torch.nn.Module()
    layer.weight_block_size = [128, 128]
    found = fp8.convert_to_fp8_moe_kernel_format(fp8.Fp8MoeBackend.TRITON, layer, *weights, *factors, None, None)
    kernels = [cutlass.CutlassFp8BlockScaledMMKernel, triton.TritonFp8BlockScaledMMKernel]
    experts = fp8.backend_to_kernel_cls(fp8.Fp8MoeBackend.TRITON)
    named = {kernel.__name__ for kernel in [*kernels, *experts]}
    prepare = Fp8BlockScaledMMLinearKernel.process_weights_after_loading
    prepared = process_fp8_weight_block_strategy(weights[0][0], factors[0][0])
    return {
        "named": named == {name for name in vllm_fp8.READ_AS_LOADED if not name.startswith("AnyCPU")},
        "linears": all(kernel.process_weights_after_loading is prepare for kernel in kernels),
        "prepared": all(torch.equal(a.float(), b[0].float()) for a, b in zip(prepared, (weights[0], factors[0]))),
        "experts": all(a is b for a, b in zip(found, [*weights, *factors], strict=True)),
    }


def _refusal(start: Any) -> str:
    """What is said where vLLM has FP8 layers beside half precision only, as on a GPU."""
    from megarl.platform import vllm_fp8

    here, vllm_fp8.precisions = vllm_fp8.precisions, lambda: [torch.bfloat16, torch.half]
    try:
        start("float32")
    except BadInput as error:
        return str(error)
    finally:
        vllm_fp8.precisions = here
    return "started"
