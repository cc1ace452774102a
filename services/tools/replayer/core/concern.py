"""The part of a recording that concerns some sessions. Pure."""

from __future__ import annotations

from collections.abc import Collection

from services.tools.replayer.core.recording import Recording
from shared.errors import MessageError
from shared.messages import Batch, Message, decode


def sessions_of(recording: Recording) -> set[str]:
    """Names of the sessions that messages are about."""
    return {
        session for entry in recording.entries() if isinstance(session := getattr(entry.message, "session", None), str)
    }


def concerning(recording: Recording, sessions: Collection[str]) -> Recording:
    """Only messages about these sessions, their batches with all that are in them, and those about no session."""
    kept = []
    for one in recording.packed:
        try:
            message = decode(one.body)
        except MessageError:
            continue
        if _concerns(message, sessions):
            kept.append(one)
    return Recording(recording.source, kept, recording.redacted, recording.notes)


def _concerns(message: Message, sessions: Collection[str]) -> bool:
    if isinstance(message, Batch):
        return any(job.session in sessions for job in message.jobs) or any(
            left.session in sessions for left in message.left_out
        )
    session = getattr(message, "session", None)
    return session is None or session in sessions
