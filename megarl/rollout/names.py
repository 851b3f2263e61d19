"""What a Hugging Face tensor's name says: its layer, its family, its expert."""

from __future__ import annotations

import re

LAYER = re.compile(r"^model\.layers\.(\d+)\.")


def layer_of(hf_name: str) -> int | None:
    """The layer a Hugging Face tensor belongs to; none outside the layers."""
    match = LAYER.match(hf_name)
    return int(match[1]) if match else None


def family_of(hf_name: str) -> str:
    """What a tensor is, without its layer and expert: "experts.down_proj", "self_attn.q_proj", "embed_tokens"."""
    name = LAYER.sub("", hf_name).removeprefix("model.").removesuffix(".weight")
    return re.sub(r"^\w+\.experts\.\d+\.", "experts.", name)
