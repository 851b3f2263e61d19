"""What a model costs a token, and what one RL step asks of it: counts, before any layout."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist

from megarl.config.schema import Config
from megarl.convert import family, read_spec
from megarl.models.spec import ModelSpec

ACTIVATION_BYTES = {"float32": 4, "bfloat16": 2, "float64": 8}


@dataclass(frozen=True)
class LayerShape:
    """Parameters of one layer by what uses them."""

    attention: int
    dense: int  # MLP or shared experts, router, norms
    experts: int  # all of them
    expert_share: float  # of the experts, that a token passes

    @property
    def active(self) -> float:
        """Parameters that a token passes."""
        return self.attention + self.dense + self.experts * self.expert_share


@dataclass(frozen=True)
class ModelShape:
    """Parameters, operations and bytes of a model, read off its table of weights.

    Operations are floating-point additions and multiplications, two for each parameter a token is multiplied with.
    Example: of Qwen3-30B-A3B `parameters` is 30.5e9 and `active` 3.35e9.
    """

    spec: ModelSpec
    embedding: int
    head: int  # output layer (of tied embeddings too, whose parameters are the embedding's) and last norm
    layers: tuple[LayerShape, ...]

    @classmethod
    def of(cls, spec: ModelSpec) -> ModelShape:
        """Of a specification; `from_folder` reads one."""
        model, *_ = family(spec.family).blocks(replace(spec, num_layers=0, moe_layers=()))
        kinds = {is_moe: _layer(spec, is_moe) for is_moe in {i in spec.moe_layers for i in range(spec.num_layers)}}
        embedding = sum(map(_size(spec), model))
        return cls(
            spec,
            embedding,
            spec.vocab_size * spec.hidden_size + spec.hidden_size,
            tuple(kinds[i in spec.moe_layers] for i in range(spec.num_layers)),
        )

    @classmethod
    def from_folder(cls, path: str | Path) -> ModelShape:
        """Of a folder with a config.json. Raises BadInput when it cannot be used."""
        return cls.of(read_spec(path))

    @property
    def parameters(self) -> int:
        """All of them."""
        own = self.embedding + self.head - (self.spec.vocab_size * self.spec.hidden_size if self.spec.tie_embeddings else 0)
        return own + sum(layer.attention + layer.dense + layer.experts for layer in self.layers)

    @property
    def expert_parameters(self) -> int:
        return sum(layer.experts for layer in self.layers)

    @property
    def active(self) -> float:
        """Parameters a token has to do with, the embedding included: what a model's makers call its active ones."""
        return self.embedding + self.head + sum(layer.active for layer in self.layers)

    @property
    def forward_flops(self) -> float:
        """Of one token in a forward pass, without attention scores: 2 for each parameter that it is multiplied with."""
        return 2 * (self.active - self.embedding)

    @property
    def pair_flops(self) -> float:
        """Of one query with one key in one layer: the score, and the value's part in the output."""
        return 2 * self.spec.num_heads * (self.spec.head_dim + (self.spec.v_head_dim or self.spec.head_dim))

    def pairs(self, tokens: float) -> float:
        """Pairs of query and key in a causal sequence, summed over the layers; a window limits the keys."""
        windows = self.spec.windows or (0,) * self.spec.num_layers
        return sum(causal_pairs(tokens, window) for window in windows)

    def cache_bytes(self, item: int) -> int:
        """Of one token in the key/value cache, over all layers and heads."""
        spec = self.spec
        width = spec.kv_lora_rank + spec.rope_head_dim if spec.kv_lora_rank else 2 * spec.num_kv_heads * spec.head_dim
        return spec.num_layers * width * item


def causal_pairs(tokens: float, window: int = 0) -> float:
    """Pairs of query and key in one causal sequence of one layer; `window`: keys a query sees at most, 0: all."""
    if not window or tokens <= window:
        return tokens * (tokens + 1) / 2
    return window * (window + 1) / 2 + (tokens - window) * window


def _layer(spec: ModelSpec, is_moe: bool) -> LayerShape:
    number = next(i for i in range(spec.num_layers) if (i in spec.moe_layers) == is_moe)
    size, count = _size(spec), {"attention": 0, "experts": 0, "dense": 0}
    for rule in family(spec.family).layer(spec, number):
        if rule.exported:
            kind = "experts" if rule.group == "expert" else "attention" if "self_attention" in rule.megatron else "dense"
            count[kind] += size(rule)
    return LayerShape(**count, expert_share=spec.top_k / spec.num_experts if is_moe else 0.0)


def _size(spec: ModelSpec):
    return lambda rule: sum(math.prod(shape) for shape in rule.hf_shapes(spec).values())


@dataclass(frozen=True)
class Workload:
    """What one RL step samples and trains on, over all ranks; lengths in tokens.

    Response lengths are taken to be log-normal with a standard deviation of `spread` times their mean, cut off at
    `longest`, with `response` as their mean after that. Example: 64 prompts with 32 responses of 3,000 tokens each are
    `Workload(64, 32, 200, 3000, 3896)`.
    """

    prompts: int
    samples: int  # responses to a prompt
    prompt: float  # mean length
    response: float  # mean length
    longest: int  # response
    optimizer_steps: int = 1
    micro_batch_tokens: int = 8192
    spread: float = 0.6

    @classmethod
    def of(cls, cfg: Config, prompt: float | None = None, response: float | None = None) -> Workload:
        """Of `cfg.rl`. Lengths are not in a configuration: none are half a longest response, and a quarter of a prompt."""
        rl, longest = cfg.rl, cfg.rollout.max_response_tokens
        prompt = prompt or (rl.max_prompt_tokens or 1024) / 4
        counts = (rl.prompts_per_step, rl.samples_per_prompt)
        steps = rl.optimizer_steps_per_rollout
        return cls(*counts, prompt, response or longest / 2, longest, steps, rl.micro_batch_tokens)

    @property
    def sequences(self) -> int:
        return self.prompts * self.samples

    @property
    def tokens(self) -> float:
        """Of all sequences, prompts included: what the learner sees."""
        return self.sequences * (self.prompt + self.response)

    @functools.cache  # noqa: B019 - a few counts each
    def lengths(self, count: int) -> tuple[float, ...]:
        """Of `count` responses, ascending: the middles of as many equal shares of the distribution."""
        sigma = math.sqrt(math.log1p(self.spread**2))
        quantiles = [math.exp(sigma * NormalDist().inv_cdf((i + 0.5) / count)) for i in range(count)]
        low, high = 0.0, float(self.longest) / quantiles[0]
        for _ in range(60):
            middle = (low + high) / 2
            mean = sum(min(self.longest, middle * q) for q in quantiles) / count
            low, high = (middle, high) if mean < self.response else (low, middle)
        return tuple(max(1.0, min(self.longest, high * q)) for q in quantiles)

    def sequence_pairs(self, shape: ModelShape) -> float:
        """Pairs of query and key of all sequences, over all layers."""
        lengths = self.lengths(64)
        return self.sequences * sum(shape.pairs(self.prompt + length) for length in lengths) / len(lengths)


@dataclass(frozen=True)
class Rows:
    """The packed rows that a data-parallel rank runs in one optimizer step; a row's tokens are those of all cp ranks."""

    micro_batches: int
    tokens: float  # of one row
    sequences: float  # in one row
    pairs: float  # of query and key in one row, over all layers

    @classmethod
    def of(cls, work: Workload, shape: ModelShape, dp: int, count_multiple: int = 1) -> Rows:
        """As packing shares sequences out: rows are full but for half a sequence, and of the same number on every rank."""
        share = dp * work.optimizer_steps
        tokens = work.tokens / share
        room = max(work.micro_batch_tokens - (work.prompt + work.response) / 2, work.micro_batch_tokens / 2)
        count = -(-math.ceil(tokens / room) // count_multiple) * count_multiple
        pairs = work.sequence_pairs(shape) / share
        return cls(count, tokens / count, work.sequences / share / count, pairs / count)
