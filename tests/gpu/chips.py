"""What a GPU can do at most, and what a model asks of it: for shares of the peak."""

from __future__ import annotations

from megarl.models.spec import ModelSpec

# dense tensor-core TFLOP/s in bfloat16 with float32 accumulation, as NVIDIA's data sheets state them (half of the figures
# "with sparsity"); the first name that a device's name contains counts
BFLOAT16 = {
    "B200": 2250.0,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.5,
    "H100": 989.4,
    "A100": 312.0,
}


def peak(device_name: str) -> float | None:
    """FLOP/s of dense bfloat16 products; None for a chip that is not in the table."""
    return next((1e12 * tera for name, tera in BFLOAT16.items() if name in device_name), None)


def forward_flops(spec: ModelSpec, length: int) -> float:
    """Multiplications and additions a token of one forward pass over sequences of this length.

    Of products with active weights and of attention's causal scores, without routers, norms and the embedding.
    """
    if spec.kv_lora_rank or any(spec.windows):
        raise ValueError(f"{spec.family}: counted are plain attention layers without windows")
    heads, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    attention = spec.hidden_size * (2 * heads + 2 * kv)
    dense = spec.num_layers - len(spec.moe_layers)
    routed = spec.top_k * spec.moe_intermediate_size + spec.shared_width
    mlp = 3 * spec.hidden_size * (dense * spec.intermediate_size + len(spec.moe_layers) * routed)
    weights = spec.num_layers * attention + mlp + spec.hidden_size * spec.vocab_size
    return 2 * weights + 2 * spec.num_layers * heads * length  # of length / 2 keys on average, twice
