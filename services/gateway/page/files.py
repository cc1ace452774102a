"""Files that never change while the process runs, served with an entity tag and a strict policy for browsers."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

STATIC = Path(__file__).parent / "static"
MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".png": "image/png",
    ".svg": "image/svg+xml",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Everything comes from the gateway itself, nothing is inline, and no other page may frame ours."""
HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": POLICY,
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
"""`no-cache`: browsers ask each time, and a 304 answers them until the gateway is updated."""


class ServedFile:
    """One file in memory."""

    def __init__(self, body: bytes, media_type: str) -> None:
        self.body = body
        self.media_type = media_type
        self.etag = f'"{blake2b(body, digest_size=16).hexdigest()}"'

    def response(self, request: Request, status: int = 200) -> Response:
        """Return the file, or a 304 to a client that has it."""
        headers = HEADERS | {"etag": self.etag}
        if status == 200 and _names(request.headers.get("if-none-match", ""), self.etag):
            return Response(status_code=304, headers=headers)
        return Response(self.body, status, headers, self.media_type)


def static_files() -> Mapping[str, ServedFile]:
    """Read the files of the page, by name."""
    return {
        path.name: ServedFile(path.read_bytes(), MEDIA_TYPES[path.suffix])
        for path in sorted(STATIC.iterdir())
        if path.suffix in MEDIA_TYPES
    }


def _names(given: str, etag: str) -> bool:
    """Return whether an If-None-Match header names the tag. A proxy that compresses may have made it a weak one."""
    tags = [tag.strip().removeprefix("W/") for tag in given.split(",")]
    return "*" in tags or etag in tags
