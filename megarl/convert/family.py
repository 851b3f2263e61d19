"""`Family`: the table of one model family, and the two directions read off it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from megarl.convert.hf_config import HARMLESS, Key, refuse_others, rope_theta
from megarl.convert.rules import Rule
from megarl.errors import BadInput
from megarl.models.spec import ModelSpec

LAYER = "decoder.layers."
EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


@dataclass(frozen=True)
class Family:
    """One family's configuration keys and weight rules."""

    model_type: str
    architecture: str  # the transformers class of its checkpoints
    keys: tuple[Key, ...]
    fixed: Mapping[str, tuple]  # config.json key -> values the learner computes with
    model: tuple[Rule, ...]  # outside the layers, embedding first
    layer: Callable[[ModelSpec, int], tuple[Rule, ...]]  # the rules of one layer
    qk_norm: bool = True
    read_extra: Callable[[Mapping[str, Any], str], dict[str, Any]] = lambda config, where: {}
    write_extra: Callable[[ModelSpec], dict[str, Any]] = lambda spec: {}
    extra_keys: tuple[str, ...] = ()
    special: tuple[str, ...] = (
        "model_type",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "sliding_window",
        "layer_types",
    )

    def read_config(self, config: Mapping[str, Any], where: str = "config.json") -> ModelSpec:
        """`ModelSpec` of a config.json in transformers 4 or 5 form. Raises BadInput for what it cannot compute."""
        mapped = {name for key in self.keys for name in (key.name, *key.aliases)}
        mapped |= {*self.special, *self.extra_keys}
        refuse_others(config, mapped, self.fixed, HARMLESS, where)
        architectures = config.get("architectures") or [self.architecture]
        if self.architecture not in architectures:
            raise BadInput(
                f"{where}: architectures={architectures} is not supported; it must be [{self.architecture!r}]"
            )
        windowed = [kind for kind in config.get("layer_types") or [] if kind != "full_attention"]
        if windowed:
            raise BadInput(f"{where}: layer_types has {windowed[0]!r}; only 'full_attention' layers are supported")
        fields = {key.field: key.read(config, where) for key in self.keys}
        fields["rope_theta"] = rope_theta(config, where)
        spec = ModelSpec(family=self.model_type, qk_norm=self.qk_norm, **fields, **self.read_extra(config, where))
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
        config |= {key.name: getattr(spec, key.field) for key in self.keys}
        config |= {
            "rope_theta": spec.rope_theta,
            "rope_parameters": {"rope_theta": spec.rope_theta, "rope_type": "default"},
        }
        config |= {name: values[0] for name, values in self.fixed.items()}
        return config | self.write_extra(spec)

    def blocks(self, spec: ModelSpec) -> list[list[Rule]]:
        """All rules with full names, in blocks: the embedding, each layer, what follows the layers."""
        model = [self._tied(rule) if spec.tie_embeddings else rule for rule in self.model]
        layers = [
            [rule.under(f"{LAYER}{i}.", f"model.layers.{i}.") for rule in self.layer(spec, i)]
            for i in range(spec.num_layers)
        ]
        return [model[:1], *layers, model[1:]]

    @staticmethod
    def _tied(rule: Rule) -> Rule:
        """With tied embeddings a last pipeline stage holds a copy of the embedding as its output layer."""
        return replace(rule, hf=("model.embed_tokens.weight",), exported=False) if rule.megatron == OUTPUT else rule

    def hf_shapes(self, spec: ModelSpec) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of a checkpoint, in the order of export."""
        rules = [rule for block in self.blocks(spec) for rule in block if rule.exported]
        return {name: size for rule in rules for name, size in rule.hf_shapes(spec).items()}
