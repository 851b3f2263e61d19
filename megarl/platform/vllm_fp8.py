"""vLLM's block-wise FP8 layers: which of its kernels read weights as they are loaded, and kernels for any CPU.

vLLM's own CPU kernels need a chip with AMX and leave activations in bfloat16. Those in here run on every CPU and round
activations as well, in groups of 1 x 128 as vLLM does on a GPU: what comes out are a GPU's numbers up to the order of
additions. They multiply dequantised numbers in float32; layers, parameters and loading are vLLM's.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megarl import platform

BLOCK = 128
LEAST = 1e-10  # of an amax, in vLLM's per_token_group_quant_fp8
# kernels that read codes and factors as a checkpoint has them: of linear layers, of experts
READ_AS_LOADED = {"AnyCPUBlockKernel", "CutlassFp8BlockScaledMMKernel", "TritonFp8BlockScaledMMKernel"} | {
    "AnyCPUExperts",
    "TritonExperts",
}


def environment() -> dict[str, str]:
    """What vLLM must find in os.environ when it builds FP8 layers."""
    # DeepGEMM would round the weights anew, to scales of powers of two
    return {"VLLM_USE_DEEP_GEMM": "0"}


def precisions() -> list[torch.dtype]:
    """What vLLM computes beside FP8 layers in; on a CPU `install` comes first."""
    from vllm.model_executor.layers.quantization.fp8 import Fp8Config

    return Fp8Config.get_supported_act_dtypes()


def unknown(module: nn.Module, parameters: set[str]) -> str | None:
    """Why codes and factors cannot be written into a layer's parameters; None: its kernel reads them as a checkpoint has
    them."""
    kernel = kernel_of(module)
    known = {base.__name__ for base in type(kernel).__mro__} & READ_AS_LOADED
    if not known:
        return f"its FP8 kernel is {type(kernel).__name__}"
    for name in parameters:
        dtype = torch.float32 if name.endswith("_scale_inv") else torch.float8_e4m3fn
        if getattr(module, name).dtype != dtype:
            return f"its {name} is {getattr(module, name).dtype}"
    return None


def blocks(rows: slice) -> slice:
    """The blocks that rows are in."""
    return slice(rows.start // BLOCK, -(-rows.stop // BLOCK))


def kernel_of(module: nn.Module) -> Any:
    """What a linear layer, or a layer's experts, in FP8 computes with."""
    method = module.quant_method
    return method.fp8_linear if hasattr(method, "fp8_linear") else method.moe_kernel.fused_experts


def renew(module: nn.Module) -> None:
    """Compute with the codes and factors that were written into a layer."""
    if platform.name() == "cpu":
        kernel_of(module).numbers = None


def install() -> None:
    """Give vLLM's FP8 layers the kernels in here. Idempotent; call after importing vllm, on a CPU."""
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe
    from vllm.model_executor.layers.quantization.fp8 import Fp8Config
    from vllm.platforms import PlatformEnum

    kernel, kernels = _linear_kernel(), linear._POSSIBLE_FP8_BLOCK_KERNELS[PlatformEnum.CPU]
    if kernel not in kernels:
        kernels.insert(0, kernel)
        cpu_moe.CPUExpertsFp8 = _experts_kernel(cpu_moe.CPUExpertsFp8)
        cpu_moe.prepare_fp8_moe_layer_for_cpu = lambda w13, w2: (w13, w2)  # which packs them for AMX
        Fp8Config.get_supported_act_dtypes = classmethod(lambda cls: [torch.bfloat16, torch.float32])


def dequantised(codes: Tensor, factors: Tensor) -> Tensor:
    """[.., N, K] float32 of codes and their blocks' factors [.., ceil(N / 128), ceil(K / 128)]."""
    rows, columns = codes.shape[-2:]
    wide = factors.repeat_interleave(BLOCK, dim=-2)[..., :rows, :].repeat_interleave(BLOCK, dim=-1)[..., :columns]
    return codes.float() * wide


def rounded(x: Tensor) -> Tensor:
    """[n, K] float32: what the codes of activations stand for, with a scale for each 1 x 128."""
    groups = F.pad(x.float(), (0, -x.shape[1] % BLOCK)).view(len(x), -1, BLOCK)
    largest = torch.finfo(torch.float8_e4m3fn).max
    scales = groups.abs().amax(dim=-1, keepdim=True).clamp_(min=LEAST) / largest
    codes = (groups / scales).clamp_(-largest, largest).to(torch.float8_e4m3fn)
    return (codes.float() * scales).view(len(x), -1)[:, : x.shape[1]]


@functools.cache
def _linear_kernel() -> type:
    from vllm.model_executor.kernels.linear.scaled_mm.BlockScaledMMLinearKernel import Fp8BlockScaledMMLinearKernel

    class AnyCPUBlockKernel(Fp8BlockScaledMMLinearKernel):
        numbers: Tensor | None = None  # the weights that the codes stand for

        @classmethod
        def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
            return True, None

        @classmethod
        def can_implement(cls, config: Any) -> tuple[bool, str | None]:
            shape = config.weight_quant_key.scale.group_shape
            return (shape.row, shape.col) == (BLOCK, BLOCK), f"blocks are {shape}"

        def process_weights_after_loading(self, layer: nn.Module) -> None:
            self.numbers = None

        def apply_weights(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None, **_: Any) -> Tensor:
            if self.numbers is None:
                self.numbers = dequantised(layer.weight.data, layer.weight_scale_inv.data)
            out = F.linear(rounded(x.reshape(-1, x.shape[-1])), self.numbers).to(self.config.out_dtype)
            return (out if bias is None else out + bias).view(*x.shape[:-1], -1)

        def apply_block_scaled_mm(self, A: Tensor, B: Tensor, As: Tensor, Bs: Tensor) -> Tensor:
            raise NotImplementedError("apply_weights does it all")

    return AnyCPUBlockKernel


def _experts_kernel(plain: type) -> type:
    class AnyCPUExperts(plain):
        numbers: tuple[Tensor, Tensor] | None = None  # the weights that the codes stand for

        @staticmethod
        def _supports_current_device() -> bool:
            return True

        @staticmethod
        def _supports_routing_method(*_: Any) -> bool:
            return True

        def apply(
            self,
            output: Tensor,
            hidden_states: Tensor,
            w1: Tensor,
            w2: Tensor,
            topk_weights: Tensor,
            topk_ids: Tensor,
            expert_map: Tensor | None,
            apply_router_weight_on_input: bool,
            **_: Any,
        ) -> None:
            """As vLLM's Triton experts: what is between two products is in the model's precision."""
            if apply_router_weight_on_input:
                raise NotImplementedError("FP8 experts with router weights on the input")
            if self.numbers is None:
                self.numbers = dequantised(w1.data, self.w1_scale), dequantised(w2.data, self.w2_scale)
            gate_ups, downs = self.numbers
            own = (topk_ids if expert_map is None else expert_map[topk_ids]).long()
            results = hidden_states.new_zeros(*own.shape, hidden_states.shape[1])
            inputs = rounded(hidden_states)
            for expert in own.unique().tolist():
                if expert < 0:  # another rank's
                    continue
                tokens, slots = (own == expert).nonzero(as_tuple=True)
                gate, up = F.linear(inputs[tokens], gate_ups[expert]).to(hidden_states.dtype).chunk(2, dim=-1)
                out = F.linear(rounded(F.silu(gate) * up), downs[expert])
                out = out * topk_weights[tokens, slots, None]
                results[tokens, slots] = out.to(results.dtype)
            output.copy_(results.sum(dim=1))

    return AnyCPUExperts
