"""Recordings without what users said: every token becomes 0, lengths and times stay. Pure.

Works on what the messages are known to carry: a field that this version does not know is dropped.
"""

from __future__ import annotations

from typing import Any, TypeVar

from shared.messages import Batch, Generate, Message, Record, Result, Verify

R = TypeVar("R", bound=Record)


def redacted(message: Message) -> Message:
    """The message without text, tokens, what could tell a guess of them from a wrong one, and the session's key."""
    match message:
        case Generate():
            sampling = message.sampling.model_copy(update={"seed": 0})
            blank = {"prompt": _blank(message.prompt), "stop_ids": _blank(message.stop_ids)}
            return _with(message, **blank, sampling=sampling, session_key="")
        case Verify():
            return _with(message, draft=_blank(message.draft), session_key="")
        case Batch():
            return _with(message, jobs=[_with(job, draft=_blank(job.draft), session_key="") for job in message.jobs])
        case Result():
            return _with(message, tokens=_blank(message.tokens), logits_digest=None)
        case _:
            return message


def _blank(tokens: list[int]) -> list[int]:
    return [0] * len(tokens)


def _with(record: R, **changed: Any) -> R:
    return record.model_copy(update=changed)
