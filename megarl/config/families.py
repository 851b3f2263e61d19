"""The model families by what a layout needs to know of their config.json, without torch. The tables are in `convert`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# model_type -> the keys with the number of experts and with the width of one; none: a dense model
FAMILIES: dict[str, tuple[str, str] | None] = {
    "qwen3_moe": ("num_experts", "moe_intermediate_size"),
    "qwen3": None,
    "qwen2_moe": ("num_experts", "moe_intermediate_size"),
    "qwen2": None,
    "mixtral": ("num_local_experts", "intermediate_size"),
    "olmoe": ("num_experts", "intermediate_size"),
    "llama": None,
    "deepseek_v3": ("n_routed_experts", "moe_intermediate_size"),
    "deepseek_v2": ("n_routed_experts", "moe_intermediate_size"),
    "glm4_moe": ("n_routed_experts", "moe_intermediate_size"),
    "gpt_oss": ("num_local_experts", "intermediate_size"),
}
EXPERT_BIASES = ("gpt_oss",)  # families whose experts have biases, which etp cannot share out


def is_moe(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a family with experts."""
    return FAMILIES[config["model_type"]] is not None


def normalised(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with the number and the width of its experts under `num_experts` and `moe_intermediate_size`."""
    out, keys = dict(config), FAMILIES[config["model_type"]]
    if keys is not None:
        experts, width = keys
        others = ("num_experts", "num_local_experts")  # transformers 5 writes the second for the first
        found = next((out[key] for key in (experts, *others) if out.get(key) is not None), None)
        out |= {"num_experts": found, "moe_intermediate_size": out.get(width)}
    return out


def has_dense_mlp(config: Mapping[str, Any]) -> bool:
    """Whether some layer has a dense MLP."""
    dense = ("mlp_only_layers", "first_k_dense_replace")
    return not is_moe(config) or any(map(config.get, dense)) or (config.get("decoder_sparse_step") or 1) != 1
