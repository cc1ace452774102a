"""Protection of the API against web pages: CORS, and checks of the Host and Content-Type headers.

Pages of the origins in `WISP_CORS_ORIGINS` may use the whole API, all others none of it. A page runs in its reader's
browser, so it can reach an API on loopback or behind a firewall that its author cannot. Browsers send a page's simple
requests without a preflight, and a page whose host name is later resolved to the API's address (DNS rebinding) counts
as the API's own. API keys stop both, because pages do not have them.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from ipaddress import ip_address

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from services.gateway.errors import DROPPED_HEADER, REFUSED_HEADER, ApiError
from services.gateway.misspelt import IGNORED_HEADER
from services.gateway.response import SEED_HEADER, SLO_HEADER
from shared.errors import quoted

EXPOSED = (
    "retry-after",
    "x-request-id",
    SEED_HEADER,
    SLO_HEADER,
    IGNORED_HEADER,
    REFUSED_HEADER,
    DROPPED_HEADER,
    *(f"x-ratelimit-{what}-{kind}" for what in ("limit", "remaining", "reset") for kind in ("requests", "tokens")),
)
"""Response headers that pages of the allowed origins may read."""

_HOST = re.compile(r"(?:\[(?P<ipv6>[0-9a-f:.%]+)\]|(?P<name>[^:\[\]]+))(?::\d*)?", re.IGNORECASE)


def with_cors(app: ASGIApp, origins: Collection[str]) -> ASGIApp:
    """Return the application with CORS for these origins (`*` for all), also for pages of a public site."""
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=("GET", "POST"),
        allow_headers=("*",),
        expose_headers=EXPOSED,
        allow_private_network=True,
    )


def is_foreign(headers: Headers, origins: Collection[str]) -> bool:
    """Return whether a request comes from a page whose origin is neither the server's own nor one of these.

    Browsers send no Origin with GET requests of the server's own pages. Over HTTPS and to loopback addresses they send
    Sec-Fetch-Site with every request.
    """
    origin = headers.get("origin")
    if "*" in origins or origin in origins:
        return False
    if (site := headers.get("sec-fetch-site")) is not None:
        return site not in ("same-origin", "none")
    return origin is not None and origin.partition("://")[2] != headers.get("host")


class BrowserGuard:
    """ASGI middleware for an API without keys: refuses what a page could send without being asked.

    Requests have to name the server by an IP address, a loopback name or one of `hosts` (`*` for any), and their
    bodies have to have a JSON type, for which browsers ask with a preflight.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str] = ()) -> None:
        self._app = app
        self._hosts = {_plain(host) for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        error = self._refusal(scope) if scope["type"] == "http" else None
        if error is None:
            await self._app(scope, receive, send)
        else:
            await JSONResponse(error.body_at(scope["path"]), error.status)(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        host = headers.get("host")
        # Browsers always send the header; clients of HTTP/1.0 may not.
        if host is not None and not self._is_allowed(host):
            return ApiError(
                403,
                f"this API needs no key, so it answers only to IP addresses and loopback names, not to {quoted(host)}; "
                "its operator can add names to WISP_ALLOWED_HOSTS",
                code="host_not_allowed",
            )
        if scope["method"] == "POST" and not _is_json(headers.get("content-type", "")):
            return ApiError(
                415,
                "this API needs no key, so it takes only bodies of type JSON; send the header "
                "Content-Type: application/json",
                code="unsupported_content_type",
            )
        return None

    def _is_allowed(self, host: str) -> bool:
        if "*" in self._hosts:
            return True
        found = _HOST.fullmatch(host)
        name = _plain(found["ipv6"] or found["name"]) if found else ""
        return name == "localhost" or name.endswith(".localhost") or name in self._hosts or _is_address(name)


def _plain(host: str) -> str:
    return host.strip().lower().removesuffix(".")


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _is_json(content_type: str) -> bool:
    media_type = content_type.partition(";")[0].strip().lower()
    return media_type == "application/json" or (media_type.startswith("application/") and media_type.endswith("+json"))
