"""`ModelSpec`: what a checkpoint's config.json says about a model, in one set of names for all families."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Head = Literal["lm", "scalar"]


@dataclass(frozen=True)
class ModelSpec:
    """Architecture of a decoder-only transformer; widths in elements, everything global (before any sharding).

    Example: Qwen3-30B-A3B is `ModelSpec("qwen3_moe", num_layers=48, hidden_size=2048, ..., num_experts=128, top_k=8)`.
    """

    family: str  # model_type of config.json
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int  # dense MLP width (unused when every layer is MoE)
    vocab_size: int  # as on disk, before padding
    max_position_embeddings: int
    rope_theta: float
    norm_eps: float
    tie_embeddings: bool
    qk_norm: bool  # RMSNorm per head on queries and keys
    num_experts: int = 0  # 0: dense
    top_k: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = True  # renormalise the k gate values
    moe_layers: tuple[int, ...] = ()  # indices of the MoE layers, ascending
    head: Head = "lm"  # after the last layer: logits over the vocabulary, or one number (critic, reward model)

    @property
    def is_moe(self) -> bool:
        return bool(self.moe_layers)

    @property
    def attention_cost(self) -> float:
        """Work of a sequence of n tokens is proportional to n + attention_cost * n²: causal scores against products.

        A token multiplies with every active weight; the n² / 2 pairs of query and key with two head widths a head.
        """
        heads = self.num_heads * self.head_dim
        attention = self.hidden_size * (2 * heads + 2 * self.num_kv_heads * self.head_dim)
        dense = self.num_layers - len(self.moe_layers)
        mlp = dense * self.intermediate_size + len(self.moe_layers) * self.top_k * self.moe_intermediate_size
        weights = self.num_layers * attention + 3 * self.hidden_size * mlp + self.hidden_size * self.vocab_size
        return self.num_layers * heads / weights

    def padded_vocab_size(self, tp: int) -> int:
        """Rows of the embedding in the learner: the vocabulary rounded up to a multiple of tp."""
        return -(-self.vocab_size // tp) * tp
