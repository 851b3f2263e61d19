"""`Family`: the table of one model family, and the two directions read off it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from megarl.convert.hf_config import (
    HARMLESS,
    Key,
    read_rope,
    read_windows,
    refuse_others,
    refuse_windows,
    write_rope,
    write_windows,
)
from megarl.convert.rules import Rule, plain
from megarl.errors import BadInput
from megarl.models.spec import Head, ModelSpec

LAYER = "decoder.layers."
EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
SCORE = plain(OUTPUT, "score.weight", "1H")  # the scalar head, in place of the output layer


@dataclass(frozen=True)
class Family:
    """One family's configuration keys and weight rules."""

    model_type: str
    architecture: str  # the transformers class of its language models
    keys: tuple[Key, ...]
    fixed: Mapping[str, tuple]  # config.json key -> values the learner computes with
    model: tuple[Rule, ...]  # outside the layers, embedding first
    layer: Callable[[ModelSpec, int], tuple[Rule, ...]]  # the rules of one layer
    same: Mapping[str, Any] = field(default_factory=dict)  # fields of `ModelSpec` that are equal in all models
    read_extra: Callable[[Mapping[str, Any], str], dict[str, Any]] = lambda config, where: {}
    write_extra: Callable[[ModelSpec], dict[str, Any]] = lambda spec: {}
    extra_keys: tuple[str, ...] = ()
    rope_theta: float = 10_000.0  # when config.json has none
    interleaved_rope: Callable[[Mapping[str, Any]], bool] = lambda config: False
    partial_rope: float = 1.0  # partial_rotary_factor when config.json has none; 1: it must be 1
    rope_scaling: Mapping[str, Any] = field(default_factory=dict)  # when config.json has none
    window: int = 0  # of every other layer when config.json has none; 0: sliding_window does not count
    # how the names of tensors begin that the learner has no use for and an export writes back
    aside: Callable[[ModelSpec], tuple[str, ...]] = lambda spec: ()
    special: tuple[str, ...] = (
        "model_type",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "partial_rotary_factor",
        "sliding_window",
        "layer_types",
    )

    def read_config(self, config: Mapping[str, Any], where: str = "config.json") -> ModelSpec:
        """`ModelSpec` of a config.json in transformers 4 or 5 form. Raises BadInput for what it cannot compute."""
        mapped = {name for key in self.keys for name in (key.name, *key.aliases)}
        mapped |= {*self.special, *self.extra_keys}
        refuse_others(config, mapped, self.fixed, HARMLESS, where)
        head = self._read_head(config, where)
        if not (config.get("rope_parameters") or config.get("rope_scaling")) and self.rope_scaling:
            config = {**config, "rope_scaling": self.rope_scaling}
        fields = {key.field: key.read(config, where) for key in self.keys}
        fields |= {"family": self.model_type, "head": head, **self.same, **self.read_extra(config, where)}
        if self.window:
            fields["windows"] = read_windows(config, fields["num_layers"], self.window, where)
        else:
            refuse_windows(config, where)
        rotated = fields.get("rope_head_dim") or fields["head_dim"]
        rope = read_rope(config, rotated, where, self.interleaved_rope(config), self.partial_rope, self.rope_theta)
        spec = ModelSpec(**fields, rope=rope)
        if spec.num_heads % spec.num_kv_heads:
            raise BadInput(
                f"{where}: num_attention_heads={spec.num_heads} must be a multiple of "
                f"num_key_value_heads={spec.num_kv_heads}"
            )
        if spec.top_k > spec.num_experts:
            raise BadInput(f"{where}: num_experts_per_tok={spec.top_k} must be at most num_experts={spec.num_experts}")
        return spec

    def write_config(self, spec: ModelSpec) -> dict[str, Any]:
        """A config.json that transformers 4 and 5 and vLLM read as this model."""
        config: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.model_type}
        config |= self.scorer_config() if spec.head == "scalar" else {}
        config |= {key.name: getattr(spec, key.field) for key in self.keys}
        config |= write_rope(spec.rope, spec.rope_head_dim or spec.head_dim)
        config |= write_windows(spec.windows, spec.num_layers, self.window) if self.window else {}
        config |= {name: values[0] for name, values in self.fixed.items()}
        return config | self.write_extra(spec)

    def implied(self) -> dict[str, Any]:
        """Keys whose only value transformers leaves out of a config.json and vLLM asks for."""
        return {name: values[0] for name, values in self.fixed.items() if values[0] is not None}

    @property
    def scorer(self) -> str:
        """The transformers class of its reward models."""
        return self.architecture.replace("ForCausalLM", "ForSequenceClassification")

    def scorer_config(self) -> dict[str, Any]:
        """The keys of config.json that make a reward model of a language model: one label, read as a number."""
        one = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        return {"architectures": [self.scorer], "num_labels": 1, **one}

    def _read_head(self, config: Mapping[str, Any], where: str) -> Head:
        architectures = config.get("architectures") or [self.architecture]
        if self.architecture in architectures:
            return "lm"
        if self.scorer not in architectures:
            raise BadInput(
                f"{where}: architectures={architectures} is not supported; it must be [{self.architecture!r}], "
                f"or [{self.scorer!r}] for a reward model"
            )
        labels = len(config["id2label"]) if config.get("id2label") else config.get("num_labels", 2)
        if labels != 1:
            raise BadInput(
                f"{where}: architectures={architectures} with {labels} labels is no reward model, which has one; "
                "set id2label to one entry if score.weight has one row"
            )
        return "scalar"

    def blocks(self, spec: ModelSpec) -> list[list[Rule]]:
        """All rules with full names, in blocks: the embedding, each layer, what follows the layers."""
        model = [self._output(spec, rule) if rule.megatron == OUTPUT else rule for rule in self.model]
        layers = [
            [rule.under(f"{LAYER}{i}.", f"model.layers.{i}.") for rule in self.layer(spec, i)]
            for i in range(spec.num_layers)
        ]
        return [model[:1], *layers, model[1:]]

    @staticmethod
    def _output(spec: ModelSpec, rule: Rule) -> Rule:
        if spec.head == "scalar":
            return SCORE
        if spec.tie_embeddings:  # a last pipeline stage holds a copy of the embedding as its output layer
            return replace(rule, hf=("model.embed_tokens.weight",), exported=False)
        return rule

    def own_dtypes(self, spec: ModelSpec) -> dict[str, str]:
        """The tensors that keep their precision whatever the model's is, and which."""
        rules = [rule for block in self.blocks(spec) for rule in block if rule.exported and rule.dtype]
        return {name: rule.dtype for rule in rules for name in rule.hf_shapes(spec)}

    def hf_shapes(self, spec: ModelSpec) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of a checkpoint, in the order of export."""
        rules = [rule for block in self.blocks(spec) for rule in block if rule.exported]
        return {name: size for rule in rules for name, size in rule.hf_shapes(spec).items()}
