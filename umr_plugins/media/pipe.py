"""Messages between the PDF parent and child: 4 bytes length, JSON, then the raw bytes it announces."""

from __future__ import annotations

import json
import struct
from typing import Any, BinaryIO


def write_message(stream: BinaryIO, message: dict[str, Any], data: bytes = b"") -> None:
    """Send one message and its bytes."""
    body = json.dumps({**message, "bytes": len(data)}).encode()
    stream.write(struct.pack("<I", len(body)) + body)
    stream.write(data)
    stream.flush()


def read_message(stream: BinaryIO, most: int) -> tuple[dict[str, Any], bytes]:
    """Receive one message and its bytes, neither longer than `most`.

    Raises:
        EOFError: the stream ended within it.
        ValueError: it is not a message.
    """
    (length,) = struct.unpack("<I", _exactly(stream, 4, most))
    message = json.loads(_exactly(stream, length, most))
    if not isinstance(message, dict) or not isinstance(message.get("bytes"), int):
        raise ValueError("not a message")
    return message, _exactly(stream, message["bytes"], most)


def _exactly(stream: BinaryIO, size: int, most: int) -> bytes:
    if not 0 <= size <= most:
        raise ValueError("a message of an impossible size")
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return data
