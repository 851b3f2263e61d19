"""What a checkpoint has to be for vLLM to compute with it as transformers and the learner do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megarl.convert import family
from megarl.errors import BadInput
from megarl.models.spec import ModelSpec


def check_served(spec: ModelSpec, model_path: str, sizes: list[int] | None) -> None:
    """Raises BadInput for a model that vLLM would compute as another one, without a word, or has no kernel for.

    `sizes`: the widths of a cached key that its attention takes; none: any.
    """
    if spec.kv_lora_rank:
        what, size = "kv_lora_rank + qk_rope_head_dim", spec.kv_lora_rank + spec.rope_head_dim
    else:
        what, size = "head_dim", spec.head_dim
    if sizes is not None and size not in sizes:
        raise BadInput(f"{model_path}: {what} is {size}, and vLLM's CPU attention takes {sizes}; use another model")
    for right, what in _taken_for_granted(spec):
        if not right:
            raise BadInput(
                f"{model_path}: vLLM computes {spec.family} with {what}, whatever config.json says; use such a model"
            )


def _taken_for_granted(spec: ModelSpec) -> list[tuple[bool, str]]:
    """(whether the model is so, the keys of config.json that vLLM does not look at, and what it takes them to be)."""
    windows = [bool(window) for window in spec.windows]
    untied = (not spec.tie_embeddings, "tie_word_embeddings = false")
    return {
        "deepseek_v2": [untied],
        "deepseek_v3": [untied, (spec.rope.interleaved, "rope_interleave = true")],
        "glm4_moe": [untied],
        "gpt_oss": [
            untied,
            (spec.qkv_bias, "attention_bias = true"),
            (spec.rope.kind == "yarn", "rope_type = yarn"),
            (windows == [layer % 2 == 0 for layer in range(spec.num_layers)], "layer_types in turn, the first a window"),
        ],
        "olmoe": [
            untied,
            (not spec.qkv_bias, "attention_bias = false"),
            (not spec.norm_topk_prob, "norm_topk_prob = false"),
        ],
        "qwen2_moe": [(spec.qkv_bias, "qkv_bias = true")],
    }.get(spec.family, [])


def overrides(spec: ModelSpec, config: Mapping[str, Any], head_dtype: str | None = None) -> dict[str, Any]:
    """Keys that vLLM asks for and this config.json lacks, since transformers leaves out those with one possible value.

    And the groups of experts: with `topk_method: greedy` transformers looks at none, vLLM at those of config.json. And
    `head_dtype`, the precision of the output layer's product, if it is another than the model's.
    """
    table = family(spec.family)
    out = {key: value for key, value in table.implied().items() if key not in config}
    written = table.write_config(spec)
    out |= {"head_dtype": head_dtype} if head_dtype else {}
    return out | {key: written[key] for key in ("n_group", "topk_group") if key in written}
