"""Redaction: messages without the users' text. Every token becomes 0; lengths and times stay.

Fields that this version does not know are dropped, since they might hold text.
"""

from __future__ import annotations

from typing import Any, TypeVar

from shared.messages import Batch, Generate, Message, Record, Result, Verify

R = TypeVar("R", bound=Record)


def redacted(message: Message) -> Message:
    """Return the message without tokens, session key, and the seeds and digests that would confirm a guessed text."""
    match message:
        case Generate():
            sampling = message.sampling.model_copy(update={"seed": 0, "rules": None, "grammar": None})
            blank = {"prompt": _zeros(message.prompt), "stop_ids": _zeros(message.stop_ids)}
            blank["prediction"] = _zeros(message.prediction)
            return _with(message, **blank, sampling=sampling, session_key="")
        case Verify():
            return _with(message, draft=_zeros(message.draft), session_key="")
        case Batch():
            return _with(message, jobs=[_with(job, draft=_zeros(job.draft), session_key="") for job in message.jobs])
        case Result():
            blanked = {"tokens": _zeros(message.tokens), "copied": _zeros(message.copied)}
            return _with(message, **blanked, logits_digest=None, logprobs="")
        case _:
            return message


def _zeros(tokens: list[int]) -> list[int]:
    return [0] * len(tokens)


def _with(record: R, **changed: Any) -> R:
    return record.model_copy(update=changed)
