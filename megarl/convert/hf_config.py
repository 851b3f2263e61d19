"""The config.json half of a family's table: every key is mapped, required to have one value, harmless, or refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megarl.errors import BadInput
from megarl.models.spec import Rope

MOST = 1 << 16  # layers, and experts of a layer: lists of them are made before any weight is looked for
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
        "pretraining_tp",
        "router_jitter_noise",
    "auto_map",
    "aux_loss_alpha",
    "ep_size",
    "seq_aux",
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
    most: int = 2**31 - 1

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
        return checked(name, value, self.type, where, self.most)


def checked(name: str, value: Any, kind: type, where: str, most: int = 2**31 - 1) -> Any:
    """`value` as `kind` (a positive int or float of at most `most`, or a bool). Raises BadInput."""
    if kind is bool:
        if isinstance(value, bool):
            return value
    elif isinstance(value, (int, kind)) and not isinstance(value, bool) and 0 < value <= most:
        return kind(value)
    wanted = "true or false" if kind is bool else f"a positive {kind.__name__}"
    if isinstance(value, int | float) and value > most:
        wanted += f" of at most {most}"
    raise BadInput(f"{where}: {name}={value!r:.80} must be {wanted}")


ROPE_KEYS = {  # of rope_parameters (transformers 5) or rope_scaling (4), by the kinds that have them
    "factor": ("linear", "llama3", "yarn"),
    "original_max_position_embeddings": ("llama3", "yarn"),
    "low_freq_factor": ("llama3",),
    "high_freq_factor": ("llama3",),
    **dict.fromkeys(("beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim"), ("yarn",)),
}


def read_rope(
    config: Mapping[str, Any],
    head_dim: int,
    where: str,
    interleaved: bool = False,
    partial: float = 1.0,
    theta: float = 10_000.0,
) -> Rope:
    """The rotary positions of heads of `head_dim`, in transformers 5 form (`rope_parameters`) or 4 form.

    `theta`, `partial`: the base and partial_rotary_factor when config.json has none; families with 1 ignore the latter.
    Raises BadInput for what is not implemented.
    """
    name = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    given = {key: value for key, value in (config.get(name) or {}).items() if value is not None}
    kind = given.pop("rope_type", given.pop("type", "default"))
    given.pop("type", None)
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise BadInput(f"{where}: {name} has rope_type={kind!r}; only default, linear, llama3 and yarn are supported")
    both = {"rope_theta": given.pop("rope_theta", None), "rope_theta_v4": config.get("rope_theta")}
    theta = Key("rope_theta", "rope_theta", float, theta, ("rope_theta_v4",)).read(both, where)
    both = {
        "partial_rotary_factor": given.pop("partial_rotary_factor", None),
        "v4": config.get("partial_rotary_factor"),
    }
    part = Key("part", "partial_rotary_factor", float, partial, ("v4",)).read(both, where)
    if part != 1 == partial:
        raise BadInput(f"{where}: partial_rotary_factor={part} is not supported for this model_type; it must be 1")
    for key in given:
        if kind not in ROPE_KEYS.get(key, ()):
            raise BadInput(
                f"{where}: {name} has {key}={given[key]!r}, which rope_type={kind!r} does not know; remove it"
            )
    context = given.pop("original_max_position_embeddings", None) or config["max_position_embeddings"]
    fields = {key: checked(key, value, bool if key == "truncate" else float, where) for key, value in given.items()}
    if kind != "default":
        if "factor" not in fields:
            raise BadInput(f"{where}: {name} with rope_type={kind!r} needs factor; add it")
        fields["original_context"] = checked("original_max_position_embeddings", context, int, where)
    return Rope(theta, int(head_dim * part), kind, interleaved, **fields)


def write_rope(rope: Rope, head_dim: int) -> dict[str, Any]:
    """The keys of config.json that `read_rope`, transformers 4 and 5 and vLLM read as `rope`."""
    fields = {key: "original_context" if key.startswith("original") else key for key in ROPE_KEYS}
    values = {key: getattr(rope, field) for key, field in fields.items() if rope.kind in ROPE_KEYS[key]}
    values = {key: value for key, value in values.items() if value or key == "truncate"}
    part = {"partial_rotary_factor": rope.width / head_dim} if rope.width != head_dim else {}
    scaling = {} if rope.kind == "default" else {"rope_scaling": {"rope_type": rope.kind, **values}}
    parameters = {"rope_theta": rope.theta, "rope_type": rope.kind, **part, **values}
    return {"rope_theta": rope.theta, "rope_parameters": parameters, **part, **scaling}


FULL, SLIDING = "full_attention", "sliding_attention"  # of layer_types


def refuse_windows(config: Mapping[str, Any], where: str) -> None:
    """Raises BadInput for layers that do not see all keys."""
    windowed = [kind for kind in config.get("layer_types") or [] if kind != FULL]
    if windowed:
        raise BadInput(f"{where}: layer_types has {windowed[0]!r}; only {FULL!r} layers are supported")


def read_windows(config: Mapping[str, Any], layers: int, default: int, where: str) -> tuple[int, ...]:
    """`ModelSpec.windows`. Without layer_types every other layer slides, from the first on; `default`: their window.

    Raises BadInput for other kinds of layers and for sliding ones without a window.
    """
    kinds = config.get("layer_types") or [FULL if i % 2 else SLIDING for i in range(layers)]
    if len(kinds) != layers or not {*kinds} <= {FULL, SLIDING}:
        raise BadInput(f"{where}: layer_types={kinds!r} must name {FULL!r} or {SLIDING!r} for each of {layers} layers")
    if SLIDING not in kinds:
        return ()
    window = checked("sliding_window", config.get("sliding_window", default), int, where)
    return tuple(window if kind == SLIDING else 0 for kind in kinds)


def write_windows(windows: tuple[int, ...], layers: int, default: int) -> dict[str, Any]:
    """The keys of config.json that `read_windows` reads; `default` where no layer slides, since transformers wants one."""
    kinds = [SLIDING if window else FULL for window in windows or (0,) * layers]
    return {"sliding_window": max(windows, default=default), "layer_types": kinds}


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
