"""Small transformers models of every family: one module each, with `CASES`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

# odd vocabulary, so that tp pads it
SHAPE = dict(
    vocab_size=131,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
)


@dataclass(frozen=True)
class Case:
    """One variant of a family. `settings` go to the class `config` of transformers; `refuses`: layouts, as degrees, that
    cannot be, with a part of the error."""

    config: str  # "Qwen3MoeConfig"
    settings: dict[str, Any]
    layouts: tuple[dict[str, int], ...] = (dict(tp=2), dict(ep=2), dict(pp=2), dict(tp=2, ep=2, pp=2))
    refuses: tuple[tuple[dict[str, int], str], ...] = ()
    serve: dict[str, Any] | None = field(default_factory=dict)  # settings it is served by vLLM with; none: it cannot be
    weights: Callable[[Any], None] = field(default=lambda model: None)  # the last word on the model's weights

    def configuration(self, **changes: Any):
        """transformers' configuration."""
        import transformers

        return getattr(transformers, self.config)(**(SHAPE | self.settings | changes))

    def write(self, folder: Path, seed: int = 3, **changes: Any):
        """A float32 checkpoint with all weights random, norms and buffers too; returns the model, in eager attention."""
        import transformers

        config = self.configuration(**changes)
        config._attn_implementation = "eager"
        name = self.config.removesuffix("Config") + "ForCausalLM"
        model = getattr(transformers, name)(config).float().eval()
        torch.manual_seed(seed)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.1)
        self.weights(model)
        model.save_pretrained(folder)
        return model


def all_cases() -> dict[str, Case]:
    """`family-variant` -> case, of all modules here."""
    cases: dict[str, Case] = {}
    for module in pkgutil.iter_modules(__path__):
        cases |= importlib.import_module(f"{__name__}.{module.name}").CASES
    return cases
