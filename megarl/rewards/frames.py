"""The wire between runner and worker: a 4-byte little-endian length, then a pickle.

Both ends are this package and the pipes are private, so pickle is safe here, and tuples in a row's metadata stay tuples.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Iterator
from typing import Any, BinaryIO

HEADER = struct.Struct("<I")


def write_frame(stream: BinaryIO, value: Any) -> None:
    body = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
    stream.write(HEADER.pack(len(body)) + body)
    stream.flush()


def read_frame(stream: BinaryIO) -> Any:
    """The next value. Raises EOFError when the other end is gone."""
    head = stream.read(HEADER.size)
    if len(head) < HEADER.size:
        raise EOFError
    return pickle.loads(stream.read(HEADER.unpack(head)[0]))


def take_frames(buffer: bytearray) -> Iterator[Any]:
    """The complete values at the front of `buffer`, removed from it; a partial frame stays."""
    start = 0
    while start + HEADER.size <= len(buffer):
        end = start + HEADER.size + HEADER.unpack_from(buffer, start)[0]
        if end > len(buffer):
            break
        yield pickle.loads(memoryview(buffer)[start + HEADER.size : end].tobytes())
        start = end
    del buffer[:start]
