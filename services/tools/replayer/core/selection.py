"""Selection of the sessions that a command works on."""

from __future__ import annotations

from collections.abc import Collection

from services.tools.replayer.core.recording import Recording, RecordingError
from shared.errors import MessageError
from shared.messages import Batch, Message, decode

_NAMED = 8
"""Session ids that an error lists at most."""


def find_session(wanted: str, session_ids: Collection[str]) -> str:
    """Return the session with this id, or the only one whose id, or its part after the last dash, begins with it.

    Raises RecordingError.
    """
    if wanted in session_ids:
        return wanted
    matching = [name for name in session_ids if name.startswith(wanted) or name.rpartition("-")[2].startswith(wanted)]
    if len(matching) == 1:
        return matching[0]
    if matching:
        more = f" and {len(matching) - _NAMED} more" if len(matching) > _NAMED else ""
        raise RecordingError(f"{wanted!r} may be any of {', '.join(matching[:_NAMED])}{more}; give more of its name")
    raise RecordingError(
        f"no session {wanted!r} in the recording, which has {len(session_ids)}; `wisp replay` without a name lists them"
    )


def session_ids_of(recording: Recording) -> set[str]:
    """Return the ids of all sessions in a recording."""
    return {
        session_id
        for entry in recording.entries()
        if isinstance(session_id := getattr(entry.message, "session", None), str)
    }


def select_sessions(recording: Recording, session_ids: Collection[str]) -> Recording:
    """Return the messages of these sessions, their whole batches, and the messages that belong to no session."""
    kept = []
    for packed in recording.packed:
        try:
            message = decode(packed.body)
        except MessageError:
            continue
        if _belongs(message, session_ids):
            kept.append(packed)
    return Recording(recording.source, kept, recording.redacted, recording.notes)


def _belongs(message: Message, session_ids: Collection[str]) -> bool:
    if isinstance(message, Batch):
        return any(job.session in session_ids for job in message.jobs) or any(
            left.session in session_ids for left in message.left_out
        )
    session_id = getattr(message, "session", None)
    return session_id is None or session_id in session_ids
