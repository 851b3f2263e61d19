"""What is set in Transformer Engine itself, for want of an argument in Megatron-core 0.16.1."""

from __future__ import annotations

BLOCK_OPERANDS = ("fp8_quant_fwd_inp", "fp8_quant_fwd_weight", "fp8_quant_bwd_grad")


def scale_blocks(power_of_two: bool) -> None:
    """Whether scales of the blockwise recipe are powers of two, in every recipe made from now on.

    Megatron makes the recipe without saying; Transformer Engine then goes by an environment variable that it reads when
    it is imported, before any configuration is known.
    """
    from transformer_engine.common import recipe

    for operand in BLOCK_OPERANDS:
        setattr(recipe.Float8BlockScaling, operand, recipe.QParams(power_2_scale=power_of_two))
