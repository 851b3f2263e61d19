"""`ModelSpec`: what a checkpoint's config.json says about a model, in one set of names for all families."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Head = Literal["lm", "scalar"]


@dataclass(frozen=True)
class Rope:
    """Rotary positions (RoFormer, 2104.09864): which frequencies, on which part of a head, in which order.

    Example: Llama 3.1 is `Rope(theta=5e5, width=128, kind="llama3", factor=8, original_context=8192)`.
    """

    theta: float
    width: int  # leading elements of a head that are rotated
    kind: Literal["default", "linear", "llama3", "yarn"] = "default"
    interleaved: bool = False  # pairs are neighbours (2i, 2i + 1) instead of halves (i, i + width / 2)
    factor: float = 1.0  # by how much the context was stretched
    original_context: int = 0  # before stretching
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0  # yarn (2309.00071)
    beta_slow: float = 1.0
    truncate: bool = True  # yarn: round the borders of the ramp to whole dimensions
    attention_factor: float | None = None  # yarn: of cos and sin; none: by the formula
    mscale: float = 0.0
    mscale_all_dim: float = 0.0


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
    rope: Rope
    norm_eps: float
    tie_embeddings: bool
    # RMSNorm on queries and keys: of each head, or of all heads of a token together (OLMoE)
    qk_norm: Literal["none", "head", "all"] = "none"
    qkv_bias: bool = False
    output_bias: bool = False  # of the attention's output projection
    sinks: bool = False  # a learned logit a head that takes part in the softmax and adds nothing (gpt-oss)
    windows: tuple[int, ...] = ()  # keys a query sees, itself included, of each layer; 0: all. Empty: all layers all
    # multi-head latent attention (DeepSeek-V2, 2405.04434); kv_lora_rank 0: none of it
    q_lora_rank: int = 0  # 0: queries straight from the hidden state
    kv_lora_rank: int = 0
    nope_head_dim: int = 0  # of queries and keys, not rotated
    rope_head_dim: int = 0  # of queries and keys, rotated; `head_dim` is the sum of both
    v_head_dim: int = 0
    num_experts: int = 0  # 0: dense
    top_k: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = True  # renormalise the k gate values
    moe_layers: tuple[int, ...] = ()  # indices of the MoE layers, ascending
    router_score: Literal["softmax", "sigmoid"] = "softmax"
    router_bias: bool = False  # of the router's projection (gpt-oss)
    selection_bias: bool = False  # added to the scores for the choice only, a float32 buffer (DeepSeek-V3)
    router_groups: int = 1  # the experts of a token come from `router_top_groups` of these groups
    router_top_groups: int = 1
    group_score: Literal["max", "top2"] = "top2"  # of a group: its best expert's score, or the sum of its two best
    router_scaling: float = 1.0  # of the gate values
    shared_width: int = 0  # of the shared experts, which every token passes, as one MLP; 0: none
    shared_gate: bool = False  # a sigmoid gate on them (Qwen2-MoE)
    expert_bias: bool = False  # biases of the experts' projections (gpt-oss)
    activation: Literal["swiglu", "clamped_swiglu"] = "swiglu"
    mtp_layers: int = 0  # multi-token-prediction layers of the checkpoint, which the learner leaves aside
    head: Head = "lm"  # after the last layer: logits over the vocabulary, or one number (critic, reward model)

    @property
    def is_moe(self) -> bool:
        return bool(self.moe_layers)

    @property
    def attention_cost(self) -> float:
        """Work of a sequence of n tokens is proportional to n + attention_cost * n²: causal scores against products.

        A token multiplies with every active weight; the n² / 2 pairs of query and key with two head widths a head.
        In a layer with a window the pairs are so many a token.
        """
        heads = self.num_heads * self.head_dim
        attention = self.hidden_size * (2 * heads + 2 * self.num_kv_heads * self.head_dim)
        if self.kv_lora_rank:
            down = self.q_lora_rank + self.kv_lora_rank + self.rope_head_dim + self.num_heads * self.v_head_dim
            up = heads * (self.q_lora_rank or self.hidden_size)
            both = self.num_heads * (self.nope_head_dim + self.v_head_dim) * self.kv_lora_rank
            attention = self.hidden_size * down + up + both
        dense = self.num_layers - len(self.moe_layers)
        routed = self.top_k * self.moe_intermediate_size + self.shared_width
        mlp = dense * self.intermediate_size + len(self.moe_layers) * routed
        weights = self.num_layers * attention + 3 * self.hidden_size * mlp + self.hidden_size * self.vocab_size
        windows = [window for window in self.windows if window]
        return (self.num_layers - len(windows)) * heads / (weights + 2 * heads * sum(windows))

    def padded_vocab_size(self, tp: int) -> int:
        """Rows of the embedding in the learner: the vocabulary rounded up to a multiple of tp."""
        return -(-self.vocab_size // tp) * tp
