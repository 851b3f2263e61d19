"""Tokenizer and chat template: rows as the token sequences the model sees."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megarl.bounds import TooMuch, bounded
from megarl.data.sources import Row
from megarl.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


LARGEST_ID = 1 << 24
TOKENIZER_SECONDS = 120  # the largest tokenizers take two
TEMPLATE_SECONDS, TEMPLATE_SECONDS_A_CHAT = 5.0, 0.01  # a hundred times what a long one takes


def load_tokenizer(path: str | Path, chat_template: str | Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face folder, from disk only; `chat_template` is a Jinja file that replaces its own.

    Raises BadInput when the folder holds none or the file cannot be read.
    """
    from transformers import AutoTokenizer

    if not Path(path).is_dir():
        raise BadInput(f"model.path: {path} is not a folder; set a Hugging Face checkpoint folder")
    try:
        _check_ids(Path(path))
        with bounded(TOKENIZER_SECONDS, 4 << 30):
            tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # anything: its files are others', and the Rust library panics on some
        raise BadInput(
            f"{path}: no usable tokenizer: {type(error).__name__}: {_line(error)}; add its tokenizer.json"
        ) from None
    if chat_template is not None:
        try:
            tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise BadInput(f"model.chat_template: {chat_template}: {_line(error)}; set a Jinja file") from None
    return tokenizer


def _check_ids(folder: Path) -> None:
    """Raises ValueError for an id that is none: the library makes room for all ids up to the largest, and aborts."""
    ids: list[Any] = []
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            continue
        found = json.loads((folder / name).read_text(encoding="utf-8"))
        parts = found if isinstance(found, dict) else {}
        model, added = parts.get("model"), parts.get("added_tokens")
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        ids += vocabulary.values() if isinstance(vocabulary, dict) else []
        ids += [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
        named = parts.get("added_tokens_decoder")
        ids += [int(token) for token in named] if isinstance(named, dict) else []
    for token in ids:
        if type(token) is not int or not 0 <= token < LARGEST_ID:
            raise ValueError(f"the token id {token!r:.40} is not within 0 .. {LARGEST_ID - 1}")


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text as it stands: no special tokens are added, those in the text are recognised.

    Equal texts share one list: generated problems and short answers repeat a lot. Treat the lists as read-only. Raises
    BadInput for a tokenizer that cannot take a text, such as one whose unknown token is not in its vocabulary.
    """
    unique = list(dict.fromkeys(texts))
    if not unique:
        return []
    if tokenizer.is_fast:
        # Straight to the Rust tokenizer: BatchEncoding costs more than the encoding of short texts.
        try:
            batch = tokenizer.backend_tokenizer.encode_batch_fast(unique, add_special_tokens=False)
        except Exception as error:  # its own errors have no class
            line = " ".join(str(error).split())[:200]
            raise BadInput(f"tokenizer.json: cannot take a text ({line}); give another tokenizer") from None
        ids = dict(zip(unique, (encoding.ids for encoding in batch), strict=True))
    else:
        ids = dict(zip(unique, tokenizer(unique, add_special_tokens=False)["input_ids"], strict=True))
    return [ids[text] for text in texts]


def render_prompts(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> list[tuple[str, list[int]]]:
    """Text and token ids of each row's prompt, ready for the assistant's turn.

    A row has `messages` (the last one not the assistant's) or `prompt` (text, or a list of messages). Raises BadInput
    for a row without, and for a tokenizer without chat template.
    """
    texts = _render(tokenizer, [_prompt_messages(row) for row in rows], rows, generation=True)
    return list(zip(texts, encode(tokenizer, texts), strict=True))


def render_prompt(tokenizer: PreTrainedTokenizerBase, row: Row) -> tuple[str, list[int]]:
    """`render_prompts` of one row."""
    return render_prompts(tokenizer, [row])[0]


def render_sft_rows(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]
) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """`(prompt text, tokens [n] int32, mask [n] uint8)` of each row.

    The mask is 1 on what the model would have to sample: every assistant turn through its end token, or all but the
    first token of a `text` row. Prompt and response are encoded apart, so that the prompt's tokens are those that
    sampling starts from. The end token is the last special token of a turn; where the template writes none, and after
    a `text`, the tokenizer's eos is added. Raises BadInput for a row of another form, and where the template renders
    a conversation differently once more turns follow.
    """
    plain = [index for index, row in enumerate(rows) if "text" in row]
    chats = [index for index, row in enumerate(rows) if "text" not in row]
    rendered: dict[int, tuple[str, np.ndarray, np.ndarray]] = {}
    special = _special_ids(tokenizer)
    for index, ids in zip(plain, encode(tokenizer, [_text(rows[index]) for index in plain]), strict=True):
        tokens = ids if ids and ids[-1] == tokenizer.eos_token_id else [*ids, _eos(tokenizer)]
        rendered[index] = ("", *_arrays(tokens, [0] + [1] * (len(tokens) - 1)))
    pieces = _chat_pieces(tokenizer, [rows[index] for index in chats])
    encoded = iter(encode(tokenizer, [text for row in pieces for text in row]))
    for index, row in zip(chats, pieces, strict=True):
        tokens, mask = [], []
        for turn in range(0, len(row), 2):
            prompt, response = next(encoded), next(encoded)
            last = turn + 2 == len(row)
            ends = [position for position, token in enumerate(response) if token in special]
            if not ends and last:
                response, ends = [*response, _eos(tokenizer)], [len(response)]
            trained = ends[-1] + 1 if ends else len(response)
            # What the template writes after the end token is never sampled, and at the very end nobody needs it.
            response = response[:trained] if last else response
            tokens += prompt + response
            mask += [0] * len(prompt) + [1] * trained + [0] * (len(response) - trained)
        mask[0] = 0
        rendered[index] = (row[0], *_arrays(tokens, mask))
    return [rendered[index] for index in range(len(rows))]


def render_sft(tokenizer: PreTrainedTokenizerBase, row: Row) -> tuple[np.ndarray, np.ndarray]:
    """`(tokens [n] int32, mask [n] uint8)` of one row, as in `render_sft_rows`."""
    return render_sft_rows(tokenizer, [row])[0][1:]


# Rows to messages ----------------------------------------------------------------------------------------------


def _prompt_messages(row: Row) -> list[dict[str, Any]]:
    prompt = row.get("messages") or row.get("prompt")
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return _checked_messages(prompt, row, "a row needs messages, or a prompt")


def _sft_messages(row: Row) -> list[dict[str, Any]]:
    if row.get("messages"):
        messages = _checked_messages(row["messages"], row, "messages")
    elif row.get("prompt") and isinstance(row.get("response"), str):
        messages = [*_prompt_messages(row), {"role": "assistant", "content": row["response"]}]
    else:
        raise BadInput(f"{_origin(row)}: fields {sorted(row)}; a row needs messages, prompt and response, or text")
    if not any(message["role"] == "assistant" for message in messages):
        raise BadInput(f"{_origin(row)}: no assistant message to train on; add one")
    return messages


def _checked_messages(messages: Any, row: Row, what: str) -> list[dict[str, Any]]:
    good = isinstance(messages, list) and messages and all(isinstance(m, dict) and "role" in m for m in messages)
    if not good:
        raise BadInput(f'{_origin(row)}: {what}: got {messages!r:.80}; set text or [{{"role": …, "content": …}}, …]')
    return messages


def _text(row: Row) -> str:
    if not isinstance(row["text"], str) or not row["text"]:
        raise BadInput(f"{_origin(row)}: text is {row['text']!r:.80}; set a text that is not empty")
    return row["text"]


def _origin(row: Row) -> str:
    return getattr(row, "origin", "row")


# Rendering -----------------------------------------------------------------------------------------------------


def _render(
    tokenizer: PreTrainedTokenizerBase, chats: list[list[dict]], rows: Sequence[Row], generation: bool
) -> list[str]:
    if not chats:
        return []
    if not tokenizer.chat_template:
        raise BadInput(f"{tokenizer.name_or_path}: the tokenizer has no chat template; set model.chat_template")
    try:
        with bounded(TEMPLATE_SECONDS + TEMPLATE_SECONDS_A_CHAT * len(chats)):
            return tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=generation)
    except TooMuch as error:
        raise BadInput(f"{_origin(rows[0])}: the chat template fails: {error}; set model.chat_template") from None
    except Exception as error:  # Jinja, and whatever a template raises through it
        if len(chats) > 1:
            for chat, row in zip(chats, rows, strict=True):
                _render(tokenizer, [chat], [row], generation)
        raise BadInput(f"{_origin(rows[0])}: the chat template fails: {_line(error)}") from None


def _chat_pieces(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> list[list[str]]:
    """Each row's text cut into prompt, response, prompt, response, ... at its assistant turns."""
    chats = [_sft_messages(row) for row in rows]
    turns = [
        (index, position)
        for index, chat in enumerate(chats)
        for position, message in enumerate(chat)
        if message["role"] == "assistant"
    ]
    owners = [rows[index] for index, _ in turns]
    before = _render(tokenizer, [chats[index][:position] for index, position in turns], owners, generation=True)
    after = _render(tokenizer, [chats[index][: position + 1] for index, position in turns], owners, generation=False)
    pieces: list[list[str]] = [[] for _ in rows]
    done = [""] * len(rows)
    for (index, position), start, end in zip(turns, before, after, strict=True):
        if not start.startswith(done[index]) or not end.startswith(start):
            raise BadInput(
                f"{_origin(rows[index])}: the chat template renders the turns before message {position + 1} differently "
                "once it is there; give one row per assistant turn, or set model.chat_template"
            )
        pieces[index] += [start[len(done[index]) :], end[len(start) :]]
        done[index] = end
    return pieces


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    return {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise BadInput(f"{tokenizer.name_or_path}: the tokenizer has no eos_token; set one in tokenizer_config.json")
    return tokenizer.eos_token_id


def _arrays(tokens: list[int], mask: list[int]) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(tokens, dtype=np.int32), np.asarray(mask, dtype=np.uint8)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
