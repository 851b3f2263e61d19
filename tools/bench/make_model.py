"""A random Qwen3-MoE checkpoint with a character tokenizer, and prompts: python make_model.py 1m|20m OUT_DIR"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

SHAPES = {
    "1m": {"hidden_size": 128, "num_hidden_layers": 4, "moe_intermediate_size": 64}
    | {"num_experts": 8, "num_experts_per_tok": 2},
    "20m": {"hidden_size": 256, "num_hidden_layers": 6, "moe_intermediate_size": 128}
    | {"num_experts": 32, "num_experts_per_tok": 4},
}
VOCAB = 128
PROMPTS = 16 * 200


def save_tokenizer(out: Path) -> None:
    """One token per printable character; the chat template passes the content through."""
    names = ["<pad>", "<eos>", "<bos>", "<unk>", *map(chr, range(32, 127)), "\n"]
    vocab = {name: i for i, name in enumerate(names + [f"<r{i}>" for i in range(len(names), VOCAB)])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = (pre_tokenizers.Split("", "isolated"), decoders.Fuse())
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )
    fast.chat_template = "{% for m in messages %}{{m['content']}}{% endfor %}"
    fast.save_pretrained(out)


def save_model(size: str, out: Path) -> int:
    """Writes the checkpoint and returns its number of parameters.

    The weights are wide enough (0.08) for visible differences between tokens. The end token's row of the output layer
    is zero: it comes about once in 190 tokens whatever came before, so that responses run close to the limit of 64.
    """
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCAB,
        intermediate_size=256,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        max_position_embeddings=512,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        router_aux_loss_coef=0.0,
        **SHAPES[size],
    )
    model = Qwen3MoeForCausalLM(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=1.0 if p.dim() == 1 else 0.0, std=0.08)
    model.lm_head.weight.data[config.eos_token_id] = 0.0
    model.save_pretrained(out)
    return sum(p.numel() for p in model.parameters())


def save_prompts(out: Path) -> None:
    rng = random.Random(0)
    with (out / "prompts.jsonl").open("w") as file:
        for _ in range(PROMPTS):
            a, b = rng.randint(0, 99), rng.randint(0, 99)
            file.write(json.dumps({"prompt": f"{a}+{b}=", "answer": str(a + b)}) + "\n")


def main(size: str, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    save_tokenizer(out)
    save_prompts(out)
    parameters = save_model(size, out)
    (out / "parameters.json").write_text(json.dumps({"parameters": parameters}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
