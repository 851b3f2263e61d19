"""Chat rendering: tokens and masks against transformers' own assistant mask, and against plain encoding."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megarl.data.chat import encode, load_tokenizer, render_prompt, render_sft, render_sft_rows
from megarl.data.sources import Row
from megarl.errors import BadInput

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Writes no end token, as base models' templates do.
BARE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
# Hides the answers of earlier turns, as templates of reasoning models do with their thoughts.
FORGETFUL = (
    "{% for m in messages %}{{ m['content'] if m['role'] == 'user' or loop.last else '...' }}<|im_end|>{% endfor %}"
)
TEXTS = ["What is 12 + 34? Say the sum.", "assistant user system", "the answer is 46, and so on"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        TEXTS * 3,
        trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    path = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<|pad|>", eos_token="<|im_end|>").save_pretrained(path)
    return path


def with_template(folder, template: str | None):
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = template
    return tokenizer


def row(**fields) -> Row:
    return Row(fields, "x.jsonl:7")


def turns(*contents: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


@pytest.mark.parametrize("contents", [("What is 12 + 34?", "46"), ("a", "b", "the sum", "answer, so", "c", "")])
def test_mask_is_transformers_own_assistant_mask(folder, contents):
    tokenizer = with_template(folder, CHATML)
    messages = [{"role": "system", "content": "Say the sum"}, *turns(*contents)]
    tokens, mask = render_sft(tokenizer, row(messages=messages))
    theirs = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(theirs["input_ids"]) == text and text.endswith("<|im_end|>\n")
    # The line break after the last end token is nobody's: not sampled, and nothing comes after it.
    assert tokens.tolist() == theirs["input_ids"][:-1]
    assert mask.tolist() == theirs["assistant_masks"][:-1]
    assert (tokens.dtype, mask.dtype) == (np.int32, np.uint8)


def test_the_prompt_of_sft_is_the_prompt_of_rollouts(folder):
    tokenizer = with_template(folder, CHATML)
    text, prompt = render_prompt(tokenizer, row(prompt="What is 12 + 34?"))
    assert text == tokenizer.apply_chat_template(turns("What is 12 + 34?"), tokenize=False, add_generation_prompt=True)
    assert prompt == tokenizer(text, add_special_tokens=False)["input_ids"]
    tokens, mask = render_sft(tokenizer, row(prompt="What is 12 + 34?", response="46"))
    assert tokens[: len(prompt)].tolist() == prompt and not mask[: len(prompt)].any()
    assert tokenizer.decode(tokens[len(prompt) :]) == "46<|im_end|>" and mask[len(prompt) :].all()
    assert render_prompt(tokenizer, row(messages=turns("What is 12 + 34?")))[1] == prompt
    assert render_prompt(tokenizer, row(prompt=turns("What is 12 + 34?")))[1] == prompt


def test_end_token_is_added_where_the_template_writes_none(folder):
    tokenizer = with_template(folder, BARE)
    tokens, mask = render_sft(tokenizer, row(prompt="the sum", response=" is 46"))
    assert tokenizer.decode(tokens) == "the sum is 46<|im_end|>"
    assert tokenizer.decode(tokens[mask == 1]) == " is 46<|im_end|>"
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.chat_template = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    tokens, mask = render_sft(tokenizer, row(prompt="the sum", response="46"))
    assert tokenizer.decode(tokens[mask == 1]) == "46<|im_end|>"


def test_plain_text_trains_all_but_its_first_token(folder):
    tokenizer = with_template(folder, None)
    for text in ("the answer is 46", "the answer is 46<|im_end|>"):
        tokens, mask = render_sft(tokenizer, row(text=text))
        assert tokenizer.decode(tokens) == "the answer is 46<|im_end|>"
        assert mask.tolist() == [0] + [1] * (len(tokens) - 1)


def test_the_first_token_of_all_is_never_trained(folder):
    """Nothing predicts it, not even when the conversation begins with the assistant."""
    tokens, mask = render_sft(with_template(folder, BARE), row(messages=[{"role": "assistant", "content": "the sum"}]))
    assert len(tokens) > 2 and mask.tolist() == [0] + [1] * (len(tokens) - 1)


def test_rows_of_all_kinds_come_back_in_order(folder):
    tokenizer = with_template(folder, CHATML)
    rows = [row(text="so"), row(prompt="a", response="b"), row(messages=turns("a", "b", "c", "d")), row(text="on")]
    together = render_sft_rows(tokenizer, rows)
    assert [prompt.count("<|im_start|>") for prompt, _, _ in together] == [0, 2, 2, 0]
    for (_, tokens, mask), one in zip(together, rows, strict=True):
        alone = render_sft(tokenizer, one)
        assert tokens.tolist() == alone[0].tolist() and mask.tolist() == alone[1].tolist()


def test_encode_is_the_tokenizers_own(folder):
    tokenizer = load_tokenizer(folder)
    texts = [*TEXTS, "", TEXTS[0], "<|im_start|>user\nü<|im_end|>"]
    assert encode(tokenizer, texts) == tokenizer(texts, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("template", "fields", "message"),
    [
        (None, {"prompt": "a", "response": "b"}, "no chat template; set model.chat_template"),
        (FORGETFUL, {"messages": turns("a", "b", "c", "d")}, "x.jsonl:7: the chat template renders .* message 4"),
        ("{{ raise_exception('no') }}", {"prompt": "a", "response": "b"}, "x.jsonl:7: the chat template fails: no"),
        (CHATML, {"messages": turns("a")}, "x.jsonl:7: no assistant message"),
        (CHATML, {"prompt": "a"}, r"x.jsonl:7: fields \['prompt'\]; a row needs"),
        (CHATML, {"messages": ["a"]}, r"x.jsonl:7: messages: got \['a'\]"),
        (CHATML, {"text": ""}, "x.jsonl:7: text is ''"),
    ],
)
def test_row_that_cannot_be_rendered_is_named(folder, template, fields, message):
    with pytest.raises(BadInput, match=message):
        render_sft(with_template(folder, template), row(**fields))


def test_prompt_without_chat_template_says_what_to_set(folder):
    with pytest.raises(BadInput, match="no chat template; set model.chat_template"):
        render_prompt(load_tokenizer(folder), row(prompt="a"))


def test_tokenizer_comes_from_disk_with_the_given_template(folder, tmp_path):
    (tmp_path / "t.jinja").write_text(BARE)
    assert load_tokenizer(folder, tmp_path / "t.jinja").chat_template == BARE
    for path, template, message in (
        (tmp_path / "missing", None, "model.path: .*missing is not a folder"),
        (tmp_path, None, "no usable tokenizer"),
        (folder, tmp_path / "none.jinja", "model.chat_template: .*none.jinja"),
    ):
        with pytest.raises(BadInput, match=message):
            load_tokenizer(path, template)
