"""Data sources, chat template, prompts, supervised rows, preferences, and the packing of batches into micro-batches."""

from megarl.data.chat import load_tokenizer, render_prompt, render_prompts, render_sft
from megarl.data.packing import BatchLayout, micro_batches, pack, plan_micro_batches
from megarl.data.pairs import PairData, pair_micro_batches
from megarl.data.prompts import PromptSource, load_eval_prompts
from megarl.data.sft import SFTData
from megarl.data.sources import load_rows, load_texts

__all__ = [
    "BatchLayout",
    "PairData",
    "PromptSource",
    "SFTData",
    "load_eval_prompts",
    "load_rows",
    "load_texts",
    "load_tokenizer",
    "micro_batches",
    "pack",
    "pair_micro_batches",
    "plan_micro_batches",
    "render_prompt",
    "render_prompts",
    "render_sft",
]
