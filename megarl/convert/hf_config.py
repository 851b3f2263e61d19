"""The config.json half of a family's table: every key is mapped, required to have one value, harmless, or refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megarl.errors import BadInput

REQUIRED = object()

# Keys that change no number of a forward pass: names, versions, tokens, storage, training options of transformers.
HARMLESS = frozenset(
    [
        "_name_or_path",
        "architectures",
        "transformers_version",
        "torch_dtype",
        "dtype",
        "use_cache",
        "initializer_range",
        "tokenizer_class",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "sep_token_id",
        "cls_token_id",
        "decoder_start_token_id",
        "unk_token_id",
        "prefix",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "return_dict_in_generate",
        "torchscript",
        "use_bfloat16",
        "finetuning_task",
        "is_encoder_decoder",
        "is_decoder",
        "tie_encoder_decoder",
        "cross_attention_hidden_size",
        "add_cross_attention",
        "chunk_size_feed_forward",
        "id2label",
        "label2id",
        "num_labels",
        "problem_type",
        "task_specific_params",
        "pruned_heads",
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_autoset",
        "output_router_logits",
        "router_aux_loss_coef",
        "max_window_layers",
    ]
)


@dataclass(frozen=True)
class Key:
    """One number of the architecture: `ModelSpec.field` is `name` in config.json (or one of `aliases`).

    `default` is what transformers assumes when the key is absent: a value, or a function of the whole config.json.
    """

    field: str
    name: str
    type: type = int
    default: Any = REQUIRED
    aliases: tuple[str, ...] = ()

    def read(self, config: Mapping[str, Any], where: str) -> Any:
        """The value, of this key's type. Raises BadInput when it is absent, contradictory or of another type."""
        present = {name: config[name] for name in (self.name, *self.aliases) if config.get(name) is not None}
        if not present:
            if self.default is REQUIRED:
                raise BadInput(f"{where}: {self.name} is missing; add it")
            return self.default(config) if isinstance(self.default, Callable) else self.default
        name, value = next(iter(present.items()))
        if any(other != value for other in present.values()):
            pairs = ", ".join(f"{key}={other!r}" for key, other in present.items())
            raise BadInput(f"{where}: {pairs} contradict each other; keep one of them")
        return checked(name, value, self.type, where)


def checked(name: str, value: Any, kind: type, where: str) -> Any:
    """`value` as `kind` (a positive int or float, or a bool). Raises BadInput."""
    if kind is bool:
        if isinstance(value, bool):
            return value
    elif isinstance(value, (int, kind)) and not isinstance(value, bool) and value > 0:
        return kind(value)
    raise BadInput(
        f"{where}: {name}={value!r} must be {'true or false' if kind is bool else f'a positive {kind.__name__}'}"
    )


def rope_theta(config: Mapping[str, Any], where: str) -> float:
    """The base of the rotary embedding, in transformers 5 form (`rope_parameters`) or 4 form (`rope_theta`).

    10000 when absent, as in transformers. Raises BadInput for any scaling of the positions, which is not implemented.
    """
    parameters = config.get("rope_parameters") or {}
    for name, rope in (("rope_parameters", parameters), ("rope_scaling", config.get("rope_scaling") or {})):
        kind = rope.get("rope_type", rope.get("type", "default"))
        extra = {k: v for k, v in rope.items() if k not in ("rope_type", "type", "rope_theta") and v is not None}
        if extra.get("partial_rotary_factor") in (1, 1.0):
            del extra["partial_rotary_factor"]
        if kind != "default" or extra:
            raise BadInput(
                f"{where}: {name}={dict(rope)} asks for scaled or partial rotary embeddings, which are not supported; "
                'set rope_type to "default" and keep to the original context'
            )
    both = {"rope_theta": parameters.get("rope_theta"), "rope_theta_v4": config.get("rope_theta")}
    return Key("rope_theta", "rope_theta", float, 10_000.0, ("rope_theta_v4",)).read(both, where)


def refuse_others(
    config: Mapping[str, Any], mapped: set[str], fixed: Mapping[str, tuple], ignored: frozenset[str], where: str
) -> None:
    """Raises BadInput for a key with another value than the learner computes with, or a key nobody knows."""
    for name, value in config.items():
        if name in fixed:
            if value not in fixed[name]:
                raise BadInput(f"{where}: {name}={value!r} is not supported; it must be {fixed[name][0]!r}")
        elif name not in mapped and name not in ignored and value is not None:
            raise BadInput(
                f"{where}: unknown key {name}={value!r} may change the model's numbers; "
                "remove it if it does not, otherwise this model is not supported"
            )
