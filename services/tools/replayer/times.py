"""Points in time as users write and read them."""

from __future__ import annotations

import re
from datetime import UTC, datetime

from services.tools.replayer.core.recording import RecordingError

_AGO = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|h|d)")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_time_ms(text: str, now_ms: float) -> float:
    """Parse a point in time, in milliseconds since 1970.

    text: an age (`90s`, `10m`, `2h`, `1d`) or an ISO date and time, local if it names no time zone. Raises
    RecordingError.
    """
    if match := _AGO.fullmatch(text.strip()):
        return now_ms - float(match[1]) * _SECONDS[match[2]] * 1000
    try:
        return datetime.fromisoformat(text.strip()).timestamp() * 1000
    except ValueError:
        raise RecordingError(
            f"{text!r} is no point in time: give an age (90s, 10m, 2h, 1d), or a date and time (2026-11-25T14:30)"
        ) from None


def format_time(at_ms: float) -> str:
    """Format milliseconds since 1970 as a date and time in UTC."""
    return datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3] + " UTC"
