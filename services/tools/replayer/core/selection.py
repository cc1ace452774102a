"""Which sessions, of which time, a command is about. Pure."""

from __future__ import annotations

import re
from collections.abc import Collection
from datetime import UTC, datetime

from services.tools.replayer.core.recording import RecordingError

_AGO = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|h|d)")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
NAMED = 8


def moment_ms(text: str, now_ms: float) -> float:
    """A point in time as a person writes it, in milliseconds since 1970: `90s`, `10m`, `2h`, `1d` (ago), or an ISO date
    and time, local unless it says otherwise. Raises RecordingError."""
    if match := _AGO.fullmatch(text.strip()):
        return now_ms - float(match[1]) * _SECONDS[match[2]] * 1000
    try:
        return datetime.fromisoformat(text.strip()).timestamp() * 1000
    except ValueError:
        raise RecordingError(
            f"{text!r} is no point in time: give how long ago (90s, 10m, 2h, 1d), or a date and time (2026-11-25T14:30)"
        ) from None


def written(at_ms: float) -> str:
    """A point in time for reading, in UTC."""
    return datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3] + " UTC"


def chosen(wanted: str, sessions: Collection[str]) -> str:
    """The session of this name, or the only one whose name, or a part of it after a dash, begins so. Raises
    RecordingError."""
    if wanted in sessions:
        return wanted
    fitting = [name for name in sessions if name.startswith(wanted) or name.rpartition("-")[2].startswith(wanted)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        more = f" and {len(fitting) - NAMED} more" if len(fitting) > NAMED else ""
        raise RecordingError(f"{wanted!r} may be any of {', '.join(fitting[:NAMED])}{more}; give more of its name")
    raise RecordingError(
        f"no session {wanted!r} in the recording, which has {len(sessions)}; `wisp replay` without a name lists them"
    )
