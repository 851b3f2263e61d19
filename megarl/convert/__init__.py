"""Hugging Face <-> Megatron: one bidirectional table per model family, and what is read off it."""

from __future__ import annotations

from megarl.convert.families import FAMILIES, family
from megarl.convert.hf_io import pad_token_id
from megarl.convert.load import load_hf, read_spec, validate_folder
from megarl.convert.save import save_hf
from megarl.convert.stream import stream_gradients, stream_hf, stream_tensors

__all__ = [
    "FAMILIES",
    "family",
    "load_hf",
    "pad_token_id",
    "read_spec",
    "save_hf",
    "stream_gradients",
    "stream_hf",
    "stream_tensors",
    "validate_folder",
]
