"""Routes of the page: `/`, its files, the documentation, the version and the feed of the fleet view."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import PurePosixPath
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, RedirectResponse, Response

from services.gateway.browsers import is_foreign
from services.gateway.errors import ApiError
from services.gateway.page.documents import INDEX, PREFIX, PROJECT, Documents
from services.gateway.page.feed import FeedResponse, FleetFeed
from services.gateway.page.files import MEDIA_TYPES, ServedFile, static_files
from shared.errors import quoted

READ = ["GET", "HEAD"]
"""Methods of the routes that describe something."""
FEED_PATH = "/fleet/events"


def add_page(
    app: FastAPI, feed: FleetFeed | None, described: Callable[[], Mapping[str, Any]], origins: Collection[str] = ()
) -> None:
    """Add the routes of the page. Without a feed, the fleet view says so.

    described: returns the OpenAPI document. origins: those whose pages may open the feed. Other pages cannot read it,
    but could hold connections open.
    """
    files = static_files()

    @app.api_route("/", methods=READ)
    async def index(request: Request) -> Response:
        return files["index.html"].response(request)

    @app.api_route("/page/{name}", methods=READ)
    async def file(name: str, request: Request) -> Response:
        if name not in files:
            raise ApiError(404, f"the page has no file {quoted(name)}", code="unknown_url")
        return files[name].response(request)

    @app.api_route("/version", methods=READ)
    async def wisp_version() -> JSONResponse:
        return JSONResponse({"version": installed_version()})

    @app.get(FEED_PATH)
    async def events(request: Request) -> Response:
        if is_foreign(request.headers, origins):
            text = f"{FEED_PATH} refuses pages of other origins; its operator can add theirs to WISP_CORS_ORIGINS"
            raise ApiError(403, text, code="origin_not_allowed")
        if feed is None:
            raise ApiError(404, "this server has no fleet: it serves a baseline", code="no_fleet")
        return FeedResponse(feed)

    _add_documents(app, described)


def _add_documents(app: FastAPI, described: Callable[[], Mapping[str, Any]]) -> None:
    documents = cache(partial(Documents, described=described))

    @app.api_route("/docs", methods=READ)
    async def first() -> Response:
        return RedirectResponse(PREFIX + INDEX, 307)

    @app.api_route("/docs/{path:path}", methods=READ)
    async def document(path: str, request: Request) -> Response:
        # In a thread, so that no stream waits for a page that is made.
        if (html := await asyncio.to_thread(lambda: documents().html(path))) is not None:
            return ServedFile(html, MEDIA_TYPES[".html"]).response(request)
        media_type = MEDIA_TYPES.get(PurePosixPath(path).suffix)
        if media_type is not None and (picture := documents().picture(path)) is not None:
            return ServedFile(picture, media_type).response(request)
        problem = f"There is no page {quoted(path)}"
        if "text/html" in request.headers.get("accept", ""):
            html = documents().missing(problem)
            return ServedFile(html, MEDIA_TYPES[".html"]).response(request, 404)
        raise ApiError(404, problem, code="unknown_url")


def installed_version() -> str:
    """Return the version of the installed package."""
    try:
        return version(PROJECT)
    except PackageNotFoundError:
        return "unknown"  # run from a checkout that is not installed
