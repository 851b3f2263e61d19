"""Megatron-style MoE reinforcement learning."""

__version__ = "0.1.0"
