"""A short recording made by hand: session `A` with two rounds beside `B` and `C`, on one verifier.

Times are in milliseconds since `START_MS`, with round numbers that can be added up on paper.
"""

from __future__ import annotations

from typing import Any

import builders

from services.tools.replayer.core.recording import PackedMessage, Recording, RecordingSource
from shared.messages import (
    Batch,
    Ended,
    Finish,
    Generate,
    Job,
    LeftOut,
    Message,
    Result,
    Sampling,
    Slo,
    Verify,
    encode,
)

START_MS = 1_764_000_000_000
A, B, C = "chatcmpl-aaaaaaaa01", "chatcmpl-bbbbbbbb01", "chatcmpl-cccccccc01"
Sent = tuple[float | None, str, Message]


def recording(sent: list[Sent], **changed: Any) -> Recording:
    """Return the messages as the journal holds them."""
    packed = [
        PackedMessage(None if at_ms is None else round((START_MS + at_ms) * 1000), key, encode(message))
        for at_ms, key, message in sent
    ]
    return Recording(RecordingSource("suite", "/", "127.0.0.1:5672", "rabbit@here"), packed, **changed)


def generate(session: str = A, **changed: Any) -> Generate:
    fields = {"gateway": "g1", "sampling": Sampling(temperature=0.5, seed=4711), "max_tokens": 3, "elapsed_ms": 5.0}
    return builders.generate(session, **{**fields, "slo": Slo(ttft_ms=100, tpot_ms=50), **changed})


def verify(session: str, round_: int, base_len: int, draft: list[int], **changed: Any) -> Verify:
    return builders.verify(session, round_, base_len, draft, **{"drafter": "d1", "gateway": "g1", **changed})


def job(session: str, round_: int, base_len: int, draft: list[int], **changed: Any) -> Job:
    fields = {"drafter": "d1", "gateway": "g1", "reason": "due soon"}
    return builders.job(session, round_, base_len, draft, **{**fields, **changed})


def batch(name: str, *jobs: Job, **changed: Any) -> Batch:
    return builders.batch(name, *jobs, **{"predicted_ms": 33.0, "policy": "wisp+", **changed})


def result(session: str, round_: int, base_len: int, name: str, tokens: list[int], **changed: Any) -> Result:
    return builders.result(session, round_, base_len, tokens, **{"batch": name, "new_tokens": 1, **changed})


def sent() -> list[Sent]:
    """Return the messages in the broker's order."""
    return [
        (0.0, "heartbeat.v1", builders.heartbeat(free_tokens=4096, total_tokens=4096)),
        (5.0, "generate.pool", generate()),
        (20.0, "verify", verify(A, 0, 3, [], draft_ms=8.0, slack_ms=80.0)),
        (24.0, "batch.v1", batch("s1-1", job(A, 0, 3, [], queue_ms=2.0))),
        (60.0, "result.d1", result(A, 0, 3, "s1-1", [11], verify_ms=30.0, new_tokens=3)),
        (61.0, "load", builders.load(0.5)),
        (70.0, "verify", verify(B, 0, 3, [])),
        (70.0, "verify", verify(C, 0, 3, [])),
        (75.0, "verify", verify(A, 1, 4, [12, 13, 14, 15], draft_ms=10.0, slack_ms=50.0)),
        (80.0, "batch.v1", batch("s1-2", job(B, 0, 3, []), waiting=2, left_out=[LeftOut(session=A, reason="no room")])),
        (
            85.0,
            "batch.v1",
            batch("s1-3", job(A, 1, 4, [12, 13], drafted=4, queue_ms=8.0, slack_ms=42.0), job(C, 0, 3, []), waiting=1),
        ),
        (110.0, "result.d1", result(B, 0, 3, "s1-2", [21], verify_ms=28.0)),
        (
            150.0,
            "result.d1",
            result(
                A, 1, 4, "s1-3", [12, 99], verify_ms=35.0, accepted=1, trimmed_to=2, new_tokens=3, finish=Finish.LENGTH
            ),
        ),
        (151.0, "result.d1", result(C, 0, 3, "s1-3", [31], verify_ms=35.0)),
        (
            155.0,
            "ended",
            Ended(
                session=A,
                slo=Slo(ttft_ms=100, tpot_ms=50),
                reason="length",
                tokens=3,
                ttft_ms=60.0,
                tpot_ms=45.0,
                attained=True,
            ),
        ),
    ]
