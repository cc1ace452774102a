"""Recordings and traces as files.

A recording is JSON lines, gzip-compressed if the file's name ends in .gz:

    {"wisp_journal": 1, "source": {"namespace": ...}, "redacted": false}
    {"at_us": 1764096000000000, "key": "verify", "message": {"t": "Verify", "v": 1, ...}}
    ...
    {"entries": 1234, "left_out": 0}

A file without the last line was cut off.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, cast

import msgpack

from services.tools.replayer.core.recording import PackedMessage, Recording, RecordingError, RecordingSource
from services.tools.replayer.core.redaction import redacted
from services.tools.replayer.core.sessions import RecordedSession
from services.tools.replayer.core.trace import trace_events
from shared.errors import MessageError
from shared.messages import HiddenStates, decode, encode

VERSION = 1


def write(path: Path, recording: Recording, *, without_text: bool = False) -> tuple[int, int]:
    """Write a recording; return the numbers of messages written, and of unknown ones left out.

    Raises RecordingError if the file cannot be written.
    """
    written = left_out = 0
    try:
        with _open(path, "wt") as file:
            _write_line(file, _header(recording, without_text))
            for packed in recording.packed:
                if (fields := _fields(packed.body, without_text)) is None:
                    left_out += 1
                    continue
                _write_line(file, {"at_us": packed.at_us, "key": packed.key, "message": fields})
                written += 1
            _write_line(file, {"entries": written, "left_out": left_out})
    except OSError as error:
        raise RecordingError(f"cannot write the recording to {path}: {error.strerror or error}") from error
    return written, left_out


def read(path: Path) -> Recording:
    """Read a file that `write` wrote. Broken lines are skipped, with a note in the recording.

    Raises RecordingError if the file is missing or no recording.
    """
    lines = _lines(path)
    recording = _read_header(path, next(lines, None))
    broken: list[int] = []
    footer: dict[str, Any] | None = None
    damage = None
    number = 1
    try:
        for number, line in enumerate(lines, 2):
            if isinstance(line, Exception):
                damage = line
                break
            fields = _parsed(line)
            if fields is not None and "entries" in fields:
                footer = fields
            elif fields is not None and (packed := _packed(fields)) is not None:
                recording.packed.append(packed)
            else:
                broken.append(number)
    except OSError as error:
        raise RecordingError(f"cannot read {path}: {error.strerror or error}") from error
    if broken:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        recording.notes.append(f"{path}: skipped what could not be read: line {broken[0]}{more}")
    if footer is None:
        reason = f" ({damage})" if damage else ""
        recording.notes.append(
            f"{path} is cut off after line {number}{reason}: later messages are missing; {len(recording.packed)} "
            "messages were read"
        )
    elif footer["entries"] != len(recording.packed) + len(broken):
        recording.notes.append(
            f"{path} was written with {footer['entries']} messages and has {len(recording.packed)} now: it was changed"
        )
    return recording


def write_trace(path: Path, sessions: Sequence[RecordedSession]) -> None:
    """Write sessions as a Chrome trace. Raises RecordingError if the file cannot be written or would be empty."""
    events = trace_events(sessions)
    if not events:
        raise RecordingError("nothing to trace: no session with times in the recording")
    try:
        with path.open("w", encoding="utf-8") as file:
            json.dump({"traceEvents": events, "displayTimeUnit": "ms"}, file, separators=(",", ":"), allow_nan=False)
    except OSError as error:
        raise RecordingError(f"cannot write the trace to {path}: {error.strerror or error}") from error


def _open(path: Path, mode: str) -> IO[str]:
    if path.name.endswith(".gz"):
        return cast("IO[str]", gzip.open(path, mode, encoding="utf-8"))
    return path.open(mode, encoding="utf-8")


def _write_line(file: IO[str], fields: dict[str, Any]) -> None:
    file.write(json.dumps(fields, separators=(",", ":")) + "\n")


def _header(recording: Recording, without_text: bool) -> dict[str, Any]:
    return {
        "wisp_journal": VERSION,
        "source": asdict(recording.source),
        "redacted": without_text or recording.redacted,
    }


def _fields(body: bytes, without_text: bool) -> dict[str, Any] | None:
    """Return a message's fields; None for an unknown message and for hidden states, which no journal records."""
    try:
        message = decode(body)
    except MessageError:
        return None
    if isinstance(message, HiddenStates):
        return None
    # With its text, a message keeps the fields of newer versions, which `encode` would drop.
    return cast("dict[str, Any]", msgpack.unpackb(encode(redacted(message)) if without_text else body))


def _lines(path: Path) -> Iterator[str | Exception]:
    """Yield the file's lines; at damage, yield the error and stop."""
    try:
        file = _open(path, "rt")
    except OSError as error:
        raise RecordingError(f"cannot read the recording {path}: {error.strerror or error}") from error
    with file:
        try:
            yield from file
        except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
            yield error
        except OSError as error:
            raise RecordingError(f"cannot read the recording {path}: {error.strerror or error}") from error


def _read_header(path: Path, line: str | Exception | None) -> Recording:
    problem = f"{path} is no recording by `wisp journal export`"
    fields = _parsed(line) if isinstance(line, str) else None
    if fields is None or "wisp_journal" not in fields:
        raise RecordingError(problem + (f" ({line})" if isinstance(line, Exception) else ""))
    if fields["wisp_journal"] != VERSION:
        raise RecordingError(
            f"{path} has version {fields['wisp_journal']} of the format, and this wisp reads version {VERSION}; use "
            "the wisp that wrote it"
        )
    source = fields.get("source")
    if not isinstance(source, dict) or not isinstance(source.get("namespace"), str):
        raise RecordingError(f"{problem}: its first line names no source")
    known = {key: str(source.get(key, "")) for key in ("namespace", "vhost", "address", "cluster")}
    return Recording(RecordingSource(**known), redacted=bool(fields.get("redacted")))


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        fields = json.loads(line)
    except ValueError:
        return None
    return fields if isinstance(fields, dict) else None


def _packed(fields: dict[str, Any]) -> PackedMessage | None:
    at_us, key, message = fields.get("at_us"), fields.get("key"), fields.get("message")
    if not isinstance(key, str) or not isinstance(message, dict) or not isinstance(at_us, int | None):
        return None
    try:
        return PackedMessage(at_us, key, msgpack.packb(message))
    except (ValueError, OverflowError, TypeError):
        return None
