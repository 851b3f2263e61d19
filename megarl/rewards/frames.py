"""The wire between runner and worker: a 4-byte little-endian length, then the value.

Work goes out as a pickle: it comes from this process, and tuples in a row's metadata stay tuples. Answers come from a
process that runs other people's code, so they are JSON, short, and checked.
"""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Iterator
from typing import Any, BinaryIO

HEADER = struct.Struct("<I")
LONGEST_ANSWER = 1 << 14  # bytes


def pack_work(value: Any) -> bytes:
    """The frame of a value for a worker."""
    body = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
    return HEADER.pack(len(body)) + body


def read_work(stream: BinaryIO) -> Any:
    """The next value of the runner. Raises EOFError when it is gone."""
    head = stream.read(HEADER.size)
    if len(head) < HEADER.size:
        raise EOFError
    return pickle.loads(stream.read(HEADER.unpack(head)[0]))


def write_answer(stream: BinaryIO, value: Any) -> None:
    body = json.dumps(value).encode()
    stream.write(HEADER.pack(len(body)) + body)
    stream.flush()


def take_answers(buffer: bytearray) -> Iterator[Any]:
    """The complete values at the front of `buffer`, removed from it; a partial frame stays.

    Raises ValueError for bytes that are no answer of a worker.
    """
    start = 0
    try:
        while start + HEADER.size <= len(buffer):
            length = HEADER.unpack_from(buffer, start)[0]
            if length > LONGEST_ANSWER:
                raise ValueError(f"an answer of {length} bytes")
            end = start + HEADER.size + length
            if end > len(buffer):
                break
            body = bytes(buffer[start + HEADER.size : end])
            start = end
            yield json.loads(body)
    finally:
        del buffer[:start]
