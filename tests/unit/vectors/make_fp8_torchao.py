"""Writes `fp8_torchao.safetensors`: matrices as torchao quantises them. Not run by the tests.

    pip install --no-deps --target /tmp/torchao torchao==0.18.0
    PYTHONPATH=/tmp/torchao:. .venv/bin/python tests/unit/vectors/make_fp8_torchao.py

Of each case the codes and what a code is multiplied with; the matrices themselves are `matrix(case)`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FILE = Path(__file__).with_name("fp8_torchao.safetensors")
SHAPES = {
    "tensorwise": (48, 80),
    "tensorwise e5m2": (48, 80),
    "tensorwise power of two": (48, 80),
    "rows 1 x 128": (40, 256),
    "columns 128 x 1": (128, 128),
    "blocks 128 x 128": (256, 256),
    "mxfp8": (48, 96),
}


def matrix(case: str) -> Tensor:
    """Normal numbers whose rows differ by powers of two, and a row that is 0; the same on every machine."""
    draw = np.random.RandomState(list(SHAPES).index(case))
    rows, columns = SHAPES[case]
    numbers = draw.standard_normal((rows, columns)).astype(np.float32)
    numbers = np.ldexp(numbers, draw.randint(-8, 8, (rows, 1))).astype(np.float32)
    numbers[5] = 0
    return torch.from_numpy(numbers)


def main() -> None:
    from safetensors.torch import save_file
    from torchao.float8.float8_utils import tensor_to_scale, to_fp8_saturated
    from torchao.prototype.blockwise_fp8_training import kernels
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import to_mx

    out: dict[str, Tensor] = {}

    def add(case: str, codes: Tensor, factors: Tensor) -> None:
        out[f"{case}/codes"] = codes.contiguous().view(torch.uint8)
        out[f"{case}/factors"] = factors.contiguous().float()

    for case, dtype in (("tensorwise", torch.float8_e4m3fn), ("tensorwise e5m2", torch.float8_e5m2)):
        scale = tensor_to_scale(matrix(case), dtype)
        add(case, to_fp8_saturated(matrix(case) * scale, dtype), 1 / scale.view(1, 1))
    case = "tensorwise power of two"
    scale = tensor_to_scale(matrix(case), torch.float8_e4m3fn, round_scales_to_power_of_2=True)
    add(case, to_fp8_saturated(matrix(case) * scale, torch.float8_e4m3fn), 1 / scale.view(1, 1))
    add("rows 1 x 128", *kernels.torch_blockwise_scale_act_quant_lhs(matrix("rows 1 x 128")))
    add("columns 128 x 1", *kernels.torch_blockwise_scale_act_quant_rhs(matrix("columns 128 x 1")))
    add("blocks 128 x 128", *kernels.torch_blockwise_scale_weight_quant(matrix("blocks 128 x 128")))
    exponents, codes = to_mx(matrix("mxfp8"), torch.float8_e4m3fn, 32, ScaleCalculationMode.RCEIL)
    add("mxfp8", codes, exponents.float())
    save_file(out, FILE)


if __name__ == "__main__":
    main()
