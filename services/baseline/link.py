"""Messages over a local stream socket, each after its length in four bytes."""

from __future__ import annotations

import struct

from shared.messages import Message, decode, encode

_LENGTH = struct.Struct("<I")


def frame(message: Message) -> bytes:
    """Encode a message for the socket."""
    body = encode(message)
    return _LENGTH.pack(len(body)) + body


class Frames:
    """Decodes messages from the pieces in which their bytes arrive."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """Return the messages that these bytes complete. Raises MessageError."""
        self._buffer += data
        messages = []
        start = 0
        while len(self._buffer) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, start)
            end = start + _LENGTH.size + length
            if len(self._buffer) < end:
                break
            messages.append(decode(bytes(self._buffer[start + _LENGTH.size : end])))
            start = end
        del self._buffer[:start]
        return messages
