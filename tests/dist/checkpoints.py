"""Small transformers checkpoints, all weights random: with all norms at 1 a swapped norm would go unseen."""

from __future__ import annotations

from pathlib import Path

import torch

SHAPE = dict(
    vocab_size=131,  # odd, so that tp pads it
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=24,
    max_position_embeddings=64,
)
MOE = dict(moe_intermediate_size=32, num_experts=8, num_experts_per_tok=2)


def make(folder: Path, family: str = "qwen3_moe", seed: int = 3, scorer: bool = False, **changes):
    """Writes a float32 checkpoint (weights and config.json) and returns the transformers model, in eager attention.

    `scorer`: a reward model instead of a language model; its padding token is 0.
    """
    import transformers
    from transformers import Qwen3Config, Qwen3MoeConfig

    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 30_000.0}, "rms_norm_eps": 1e-5}
    if family == "qwen3_moe":
        config = Qwen3MoeConfig(**(SHAPE | MOE | rope | changes))
    else:
        config = Qwen3Config(**(SHAPE | rope | changes))
    config._attn_implementation = "eager"
    if scorer:
        config.num_labels, config.pad_token_id = 1, 0
    name = "Qwen3Moe" if family == "qwen3_moe" else "Qwen3"
    kind = "ForSequenceClassification" if scorer else "ForCausalLM"
    model = getattr(transformers, name + kind)(config).float().eval()
    torch.manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.1)
    model.save_pretrained(folder)
    return model
