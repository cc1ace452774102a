"""Reads the services' JSON logs, and checks whether an HTTP API is ready."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Collection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ANSWER_S = 5.0
_PLUMBING = frozenset({"event", "level", "timestamp", "service", "instance", "exception", "logger"})


def find(log: Path, events: Collection[str]) -> dict[str, Any] | None:
    """Return the fields of the first line of a log with one of these events; None without one."""
    if not log.is_file():
        return None
    with log.open(errors="replace") as file:
        for line in file:
            fields = _parse(line)
            if fields is not None and fields.get("event") in events:
                return fields
    return None


def readable(text: str) -> str:
    """Format log lines for people: level, event, the event's fields, the last error."""
    return "\n".join(_readable(line) for line in text.splitlines())


async def answers(url: str) -> bool:
    """Return whether GET `url` answers with status 200."""
    parts = urlsplit(url)
    try:
        async with asyncio.timeout(ANSWER_S):
            secured = _unchecked() if parts.scheme == "https" else None
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port, ssl=secured)
            try:
                writer.write(f"GET {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: close\r\n\r\n".encode())
                status = await reader.readline()
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False
    return status.split()[1:2] == [b"200"]


async def until_answers(url: str, interval_s: float) -> None:
    """Poll until GET `url` answers with status 200."""
    while not await answers(url):  # noqa: ASYNC110 - the event is in another process
        await asyncio.sleep(interval_s)


def _unchecked() -> ssl.SSLContext:
    """Return a context without checks, for a gateway of this stack: its certificate names another host."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _parse(line: str) -> dict[str, Any] | None:
    try:
        fields = json.loads(line)
    except ValueError:
        return None
    return fields if isinstance(fields, dict) else None


def _readable(line: str) -> str:
    fields = _parse(line)
    if fields is None:
        return f"  {line}"
    own = " ".join(f"{key}={value}" for key, value in fields.items() if key not in _PLUMBING)
    text = f"  {fields.get('level', '')!s:8} {fields.get('event', '')} {own}".rstrip()
    for problem in fields.get("exception") or []:
        if isinstance(problem, dict):
            frames = problem.get("frames") or [{}]
            at = f" ({frames[-1].get('filename')}:{frames[-1].get('lineno')})" if frames[-1] else ""
            text += f"\n           {problem.get('exc_type')}: {problem.get('exc_value')}{at}"
    return text
