"""Log-probabilities of tokens as bytes, in Redis and in results: records of one size in each session.

Results have them in base64, because recordings are JSON.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from struct import Struct


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of one position's token, and the most probable tokens of the position."""

    logprob: float
    rank: int
    """1 for the most probable token; tokens of the same probability share the better rank."""
    top: tuple[tuple[int, float], ...] = ()
    """Ids and log-probabilities, the largest first; equal ones by id."""


def pack_logprobs(records: Sequence[TokenLogprob]) -> bytes:
    """Return records as bytes, little-endian: float32 and int32, then int32 and float32 for each of the top tokens."""
    if not records:
        return b""
    form = _form(len(records[0].top))
    return b"".join(form.pack(one.logprob, one.rank, *(part for pair in one.top for part in pair)) for one in records)


def unpack_logprobs(body: bytes, top: int) -> list[TokenLogprob]:
    """Return the records in these bytes, each with `top` tokens. An incomplete one at the end is left out."""
    form = _form(top)
    whole = body[: len(body) - len(body) % form.size]
    return [
        TokenLogprob(logprob, rank, tuple(zip(pairs[::2], pairs[1::2], strict=True)))
        for logprob, rank, *pairs in form.iter_unpack(whole)
    ]


def as_text(body: bytes) -> str:
    """Return records as a result has them."""
    return b64encode(body).decode()


def from_text(text: str) -> bytes:
    """Return the records of a result; none where the text is damaged."""
    try:
        return b64decode(text, validate=True)
    except ValueError:
        return b""


def _form(top: int) -> Struct:
    return Struct("<fi" + "if" * top)
