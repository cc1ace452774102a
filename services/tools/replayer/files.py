"""Recordings as files: JSON lines, gzip-compressed if the name ends in .gz.

    {"wisp_journal": 1, "source": {"namespace": ...}, "redacted": false}
    {"at_us": 1764096000000000, "key": "verify", "message": {"t": "Verify", "v": 1, ...}}
    ...
    {"entries": 1234, "left_out": 0}

The last line tells a whole file from one that was cut off.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, cast

import msgpack

from services.tools.replayer.core.recording import Packed, Recording, RecordingError, Source
from services.tools.replayer.core.redaction import redacted
from shared.errors import MessageError
from shared.messages import HiddenStates, decode, encode

VERSION = 1


def write(path: Path, recording: Recording, *, without_text: bool = False) -> tuple[int, int]:
    """Write a recording; returns how many messages were written, and how many left out, as they are none of ours.

    Raises RecordingError where the file cannot be written.
    """
    written = left_out = 0
    try:
        with _open(path, "wt") as file:
            _line(file, _header(recording, without_text))
            for one in recording.packed:
                if (fields := _fields(one.body, without_text)) is None:
                    left_out += 1
                    continue
                _line(file, {"at_us": one.at_us, "key": one.key, "message": fields})
                written += 1
            _line(file, {"entries": written, "left_out": left_out})
    except OSError as error:
        raise RecordingError(f"cannot write the recording to {path}: {error.strerror or error}") from error
    return written, left_out


def read(path: Path) -> Recording:
    """Read a file that `write` wrote. What is broken in it is skipped and told in the recording's notes.

    Raises RecordingError where there is no file, or it is no recording.
    """
    lines = _lines(path)
    recording = _begun(path, next(lines, None))
    broken: list[int] = []
    ended: dict[str, Any] | None = None
    cut = None
    number = 1
    try:
        for number, line in enumerate(lines, 2):
            if isinstance(line, Exception):
                cut = line
                break
            fields = _parsed(line)
            if fields is not None and "entries" in fields:
                ended = fields
            elif fields is not None and (packed := _packed(fields)) is not None:
                recording.packed.append(packed)
            else:
                broken.append(number)
    except OSError as error:
        raise RecordingError(f"cannot read {path}: {error.strerror or error}") from error
    if broken:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        recording.notes.append(f"{path}: skipped what could not be read: line {broken[0]}{more}")
    if ended is None:
        why = f" ({cut})" if cut else ""
        recording.notes.append(
            f"{path} is cut off after line {number}{why}: what follows there is missing; {len(recording.packed)} "
            "messages were read"
        )
    elif ended["entries"] != len(recording.packed) + len(broken):
        recording.notes.append(
            f"{path} was written with {ended['entries']} messages and has {len(recording.packed)} now: it was changed"
        )
    return recording


def _open(path: Path, mode: str) -> IO[str]:
    if path.name.endswith(".gz"):
        return cast("IO[str]", gzip.open(path, mode, encoding="utf-8"))
    return path.open(mode, encoding="utf-8")


def _line(file: IO[str], fields: dict[str, Any]) -> None:
    file.write(json.dumps(fields, separators=(",", ":")) + "\n")


def _header(recording: Recording, without_text: bool) -> dict[str, Any]:
    return {
        "wisp_journal": VERSION,
        "source": asdict(recording.source),
        "redacted": without_text or recording.redacted,
    }


def _fields(body: bytes, without_text: bool) -> dict[str, Any] | None:
    """The message's map; None for what is no message of ours."""
    try:
        message = decode(body)
    except MessageError:
        return None
    if isinstance(message, HiddenStates):
        return None  # not recorded, and not to be written as text
    # Without removing anything the map stays as it was sent, fields of newer versions included.
    return cast("dict[str, Any]", msgpack.unpackb(encode(redacted(message)) if without_text else body))


def _lines(path: Path) -> Iterator[str | Exception]:
    """The file's lines; an exception in place of those that are lost behind damage."""
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


def _begun(path: Path, line: str | Exception | None) -> Recording:
    remedy = "it is no recording by `wisp journal export`"
    fields = _parsed(line) if isinstance(line, str) else None
    if fields is None or "wisp_journal" not in fields:
        raise RecordingError(f"{path}: {remedy}" + (f" ({line})" if isinstance(line, Exception) else ""))
    if fields["wisp_journal"] != VERSION:
        raise RecordingError(
            f"{path} was written in version {fields['wisp_journal']} of the format, and this is for version {VERSION}; "
            "use the wisp that wrote it"
        )
    source = fields.get("source")
    if not isinstance(source, dict) or not isinstance(source.get("namespace"), str):
        raise RecordingError(f"{path}: {remedy}: its first line does not say where it was recorded")
    known = {key: str(source.get(key, "")) for key in ("namespace", "vhost", "address", "cluster")}
    return Recording(Source(**known), redacted=bool(fields.get("redacted")))


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        fields = json.loads(line)
    except ValueError:
        return None
    return fields if isinstance(fields, dict) else None


def _packed(fields: dict[str, Any]) -> Packed | None:
    at_us, key, message = fields.get("at_us"), fields.get("key"), fields.get("message")
    if not isinstance(key, str) or not isinstance(message, dict) or not isinstance(at_us, int | None):
        return None
    try:
        return Packed(at_us, key, msgpack.packb(message))
    except (ValueError, OverflowError, TypeError):
        return None
