"""`FP8Params`: weights of a model that are FP8 tensors of Transformer Engine (`model.fp8_params`).

After a step Megatron's distributed optimizer rounds its float32 main weights to the parameters' nominal bfloat16 and that to
FP8 (Transformer Engine's `cast_master_weights_to_fp8`), with the scales that the layers' products would make of bfloat16
weights: products see the same numbers as without. What is kept exact are the main weights alone. (While a model is built,
Transformer Engine keeps what its weights were initialised with on the host, in bfloat16: Megatron makes main weights of that.)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megarl import platform
from megarl.convert import load_hf
from megarl.learner.optimizer import main_weight, renew_weights
from megarl.models.spec import ModelSpec
from megarl.parallel import Mesh

platform.setup()

from megatron.core.fp8_utils import post_all_gather_processing  # noqa: E402


class FP8Params:
    """The quantised parameters of a policy's modules; of most models none, and then every method is a plain one."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.parameters = [p for module in modules for p in module.parameters() if platform.is_quantised(p)]

    def forget_initial(self) -> None:
        """Drop what the weights were initialised with, which is on the host, once there are main weights."""
        platform.forget_initial(self.parameters)

    @torch.no_grad()
    def load_hf(self, path: str | Path, modules: list[Any], spec: ModelSpec, mesh: Mesh, optimizer: Any | None) -> None:
        """`convert.load_hf`, and the optimizer's main weights are the folder's, not what they were rounded to."""
        exact: list[tuple[Tensor, Tensor]] = []  # parts of main weights, and their numbers

        def keep(parameter: Tensor, numbers: Tensor) -> None:
            found = None if optimizer is None else main_weight(optimizer, parameter)
            if found is not None:
                exact.append((found[0], numbers.view(-1)[found[1]].clone()))

        load_hf(path, modules, spec, mesh, keep)
        if optimizer is not None:
            optimizer.reload_model_params()
        for main, numbers in exact:
            main.copy_(numbers)

    def finish_gather(self) -> None:
        """What follows a gather of codes, their copy by columns: Megatron leaves it out when it is forced to gather early."""
        if self.parameters:
            post_all_gather_processing(self.parameters)

    def renew(self, optimizer: Any | None, chunks: list[Any]) -> None:
        """The weights anew from the main weights, as after a step. Collective.

        A checkpoint holds the numbers that weights stood for, and rounding these need not give the codes they came from.
        """
        if self.parameters and optimizer is not None:
            renew_weights(optimizer, chunks)
            self.finish_gather()
