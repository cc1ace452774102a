"""The HTTP API: routes, and the id, log line and error body of each request."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Callable, Coroutine
from functools import partial
from secrets import token_hex
from time import monotonic, time
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.gateway import misspelt, spans
from services.gateway.body import parse, read_body
from services.gateway.browsers import BrowserGuard, with_cors
from services.gateway.core.cursor import StreamCursor
from services.gateway.errors import ApiError, internal_error, invalid
from services.gateway.gateway import Gateway
from services.gateway.keys import Guard, is_open, key_of
from services.gateway.messages_api import add_messages
from services.gateway.openapi import document
from services.gateway.page.routes import READ, add_page, installed_version
from services.gateway.request import accept, check_model
from services.gateway.response import AnswerResponse
from services.gateway.responses_api import add_responses
from services.gateway.resume import LAST_EVENT_ID, resume
from services.gateway.schema import ChatRequest, CompletionRequest, GenerationRequest
from services.gateway.server import Certificate, serve_http
from services.gateway.tokens import add_tokens
from shared.errors import cut
from shared.runtime import logging, tracing

MOST_OF_PATH = 200
"""Most characters of a path in errors and log lines."""
_BASE_URLS = "The base URL ends with /v1 for clients of OpenAI's API, and without it for those of Anthropic's"


async def serve_api(
    gateway: Gateway, listener: socket.socket, stop: asyncio.Event, *loops: Coroutine[Any, Any, None]
) -> None:
    """Serve the HTTP API until `stop` is set, then let the running requests end.

    `loops` run beside it, as in `shared.runtime.service.running`.
    """
    settings, sessions = gateway.settings, gateway.sessions
    certificate = None
    if settings.https_cert_file is not None:
        certificate = Certificate(settings.https_cert_file, settings.https_key_file)

    async def drain() -> None:
        logging.get().info("draining", sessions=sessions.running)
        if gateway.feed is not None:
            gateway.feed.closed = True
        await sessions.drain(settings.drain_s)

    watches = [sessions.watch()] + ([gateway.keys.watch()] if gateway.keys else [])
    app = create_app(gateway)
    await serve_http(
        app,
        listener,
        stop,
        *watches,
        *loops,
        drain=drain,
        drain_s=settings.drain_s,
        keep_alive_s=settings.keep_alive_s,
        head_timeout_s=settings.head_timeout_s,
        certificate=certificate,
        model=gateway.model.name,
    )
    await gateway.ledger.settled()


def create_app(gateway: Gateway) -> ASGIApp:
    """Return the API as an ASGI application."""
    app = FastAPI(title="WISP gateway", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _crash)
    _add_models(app, gateway)
    _add_generation(app, gateway)
    described = partial(document, installed_version(), keys=gateway.keys is not None)
    _add_operations(app, gateway, described)
    add_page(app, gateway.feed, described, gateway.settings.allowed_origins)
    add_tokens(app, gateway)
    add_responses(app, gateway)
    add_messages(app, gateway)
    settings = gateway.settings
    routes = WithoutTrailingSlash(app)
    if gateway.keys is not None:
        guarded: ASGIApp = Guard(routes, gateway.keys)
    else:
        guarded = BrowserGuard(routes, (settings.host, *settings.allowed_host_names))
    origins = settings.allowed_origins
    return RequestScope(with_cors(guarded, origins) if origins else guarded)


def _add_generation(app: FastAPI, gateway: Gateway) -> None:
    """Add the routes that generate text."""

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await _generated(gateway, request, ChatRequest)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _generated(gateway, request, CompletionRequest)

    @app.get("/v1/streams/{answer_id}")
    async def stream(answer_id: str, request: Request) -> Response:
        cursor = StreamCursor.parse(request.headers.get(LAST_EVENT_ID) or f"{answer_id}/")
        if cursor.answer_id != answer_id:
            raise invalid(f"Last-Event-ID belongs to the stream {cursor.answer_id}, the path names another")
        return await resume(gateway, cursor, key_of(request.scope))


def _add_models(app: FastAPI, gateway: Gateway) -> None:
    """Add the routes that describe the model."""
    model = {
        "id": gateway.model.name,
        "object": "model",
        "created": int(time()),
        "owned_by": "wisp",
        "root": gateway.model.name,
        "parent": None,
        "max_model_len": gateway.model.folder.max_len,
        "context_window": gateway.model.folder.max_len,
        "capabilities": {
            "chat": gateway.model.folder.chat_template is not None,
            "completions": True,
            "logprobs": True,
            "prediction": True,
            "structured_output": True,
            "tools": gateway.model.folder.chat_template is not None,
            "reasoning": gateway.model.tokenizer.thinks,
        },
    }

    @app.api_route("/v1/models", methods=READ)
    async def models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [model]})

    @app.api_route("/v1/models/{name:path}", methods=READ)
    async def one_model(name: str) -> JSONResponse:
        check_model(gateway, name)
        return JSONResponse(model)


def _add_operations(app: FastAPI, gateway: Gateway, described: Callable[[], dict[str, Any]]) -> None:
    """Add the routes for probes and Prometheus, and the API's document."""

    @app.api_route("/openapi.json", methods=READ)
    async def openapi() -> JSONResponse:
        # In a thread, so that no stream waits for it.
        return JSONResponse(await asyncio.to_thread(described))

    @app.api_route("/health", methods=READ)
    async def health() -> JSONResponse:
        return JSONResponse({"status": "ok"})

    @app.api_route("/ready", methods=READ)
    async def ready(request: Request) -> JSONResponse:
        missing = await gateway.upstream.missing()
        missing["gateway"] = "shutting down" if gateway.sessions.draining else None
        is_ready = not any(missing.values())
        # The text of a problem may contain addresses, so only holders of a key get it.
        detailed = gateway.keys is None or key_of(request.scope) is not None
        parts = {part: (problem if detailed else "not ok") if problem else "ok" for part, problem in missing.items()}
        answer: dict[str, object] = {"ready": is_ready, "parts": parts}
        if pools := gateway.sessions.without_drafters:
            answer["without_drafters"] = pools
        return JSONResponse(answer, 200 if is_ready else 503)

    @app.api_route("/metrics", methods=READ)
    async def metrics() -> Response:
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


async def _generated(gateway: Gateway, request: Request, kind: type[GenerationRequest]) -> Response:
    """Return the response to a request that generates text, or the rest of one that its client resumes."""
    started_s = monotonic()
    body = await read_body(gateway.settings, request)
    if last_id := request.headers.get(LAST_EVENT_ID):
        return await resume(gateway, StreamCursor.parse(last_id), key_of(request.scope))
    asked = parse(kind, body)
    check_model(gateway, asked.model)
    answer = await accept(gateway, request, asked, started_s)
    return AnswerResponse(gateway.sessions, gateway.ledger, answer)


async def _api_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body_at(request.url.path), error.status, error.headers)


async def _http_error(request: Request, error: Exception) -> Response:
    """Answer a request that the framework refuses: unknown paths and methods. OPTIONS gets the path's methods."""
    assert isinstance(error, HTTPException)
    if request.method == "OPTIONS" and error.status_code == 405:
        return Response(status_code=204, headers={"allow": f"{(error.headers or {}).get('Allow', '')}, OPTIONS"})
    where = f"{cut(request.method, 20)} {cut(request.url.path, MOST_OF_PATH)}"
    if error.status_code == 404:
        meant = _meant(request)
        hint = f"; did you mean {meant}? {_BASE_URLS}" if meant else "; /docs lists the paths"
        answer = ApiError(404, f"unknown request: {where}{hint}", code="unknown_url")
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        answer = ApiError(405, f"{where} is not allowed; send {allowed}", code="method_not_allowed")
    else:
        answer = ApiError(error.status_code, str(error.detail))
    return JSONResponse(answer.body_at(request.url.path), answer.status, error.headers)


def _meant(request: Request) -> str | None:
    """Return the path of the API that a client with a wrong base URL meant: /v1 is missing, or there twice."""
    path = request.url.path.rstrip("/")
    meant = path.removeprefix("/v1") if path.startswith("/v1/v1/") else f"/v1{path}"
    routes: list[BaseRoute] = request.app.router.routes
    known = len(path) <= MOST_OF_PATH and any(
        route.matches({**request.scope, "path": meant})[0] is not Match.NONE for route in routes
    )
    return meant if known else None


async def _crash(request: Request, _error: Exception) -> JSONResponse:
    return JSONResponse(internal_error().body_at(request.url.path), 500)


class WithoutTrailingSlash:
    """ASGI middleware that serves a path with a slash at its end as the path without it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] == "http" and len(scope["path"]) > 1 and scope["path"].endswith("/"):
            scope = {**scope, "path": scope["path"].rstrip("/") or "/"}
        await self._app(scope, receive, send)


class RequestScope:
    """ASGI middleware that gives every request an id, by default the client's own, a span, and a log line.

    Requests of probes and for the page's files have no span.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        request_id = given if re.fullmatch(r"[\x21-\x7e]{1,128}", given) else f"req_{token_hex(12)}"
        started_s = monotonic()
        status = 0
        quiet = scope["method"] in READ and (is_open(scope["path"]) or scope["path"] == "/metrics")
        span = spans.begin_request(scope, request_id) if tracing.is_on() and not quiet else tracing.NO_SPAN
        misspelt.FOUND.set(None)

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                if found := misspelt.FOUND.get():
                    headers[misspelt.IGNORED_HEADER] = misspelt.header_value(found)
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id), tracing.active(span):
            log = logging.get()
            try:
                await self._app(scope, receive, send_with_id)
            except Exception:
                log.exception("request crashed", path=scope["path"])
                if not status:
                    raise
            finally:
                (log.debug if quiet else log.info)(
                    "request",
                    method=scope["method"],
                    path=scope["path"][:MOST_OF_PATH],
                    status=status,
                    ms=round((monotonic() - started_s) * 1000, 1),
                )
                if span:
                    spans.end_request(span, scope, status)
