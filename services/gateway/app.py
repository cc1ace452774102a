"""The HTTP API: routes, and the id, log line and error body of each request."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Coroutine
from secrets import token_hex
from time import monotonic, time
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.gateway.browsers import BrowserGuard, with_cors
from services.gateway.core.cursor import StreamCursor
from services.gateway.errors import ApiError, internal_error, invalid
from services.gateway.gateway import Gateway
from services.gateway.keys import Guard, is_open, key_of
from services.gateway.page.routes import add_page
from services.gateway.prompt import Limits, chat_prompts, completion_prompts
from services.gateway.request import check_choices, check_model, new_answer
from services.gateway.response import AnswerResponse
from services.gateway.resume import LAST_EVENT_ID, resume
from services.gateway.schema import ChatRequest, CompletionRequest, GenerationRequest, parse
from services.gateway.server import Certificate, serve_http
from shared.runtime import logging

READ = ["GET", "HEAD"]
"""Methods of the routes that describe something."""


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
    _add_operations(app, gateway)
    add_page(app, gateway.feed)
    settings = gateway.settings
    if gateway.keys is not None:
        guarded: ASGIApp = Guard(app, gateway.keys)
    else:
        guarded = BrowserGuard(app, (settings.host, *settings.allowed_host_names))
    origins = settings.allowed_origins
    return RequestScope(with_cors(guarded, origins) if origins else guarded)


def _add_generation(app: FastAPI, gateway: Gateway) -> None:
    """Add the routes that generate text."""
    model = gateway.model

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        started_s = monotonic()
        body = await _body(gateway, request)
        if last_id := request.headers.get(LAST_EVENT_ID):
            return await resume(gateway, StreamCursor.parse(last_id), key_of(request.scope))
        chat = parse(ChatRequest, body)
        check_model(gateway, chat.model)
        limits = await _limits(gateway, chat)
        prompts = await chat_prompts(model.tokenizer, limits, chat)
        answer = new_answer(gateway, chat, request.headers, prompts, limits, key_of(request.scope), started_s)
        return AnswerResponse(gateway.sessions, gateway.ledger, answer)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        started_s = monotonic()
        body = await _body(gateway, request)
        if last_id := request.headers.get(LAST_EVENT_ID):
            return await resume(gateway, StreamCursor.parse(last_id), key_of(request.scope))
        completion = parse(CompletionRequest, body)
        check_model(gateway, completion.model)
        check_choices(gateway, completion.n * len(completion.prompt))
        limits = await _limits(gateway, completion)
        prompts = await completion_prompts(model.tokenizer, limits, completion, model.folder.bos_id)
        answer = new_answer(gateway, completion, request.headers, prompts, limits, key_of(request.scope), started_s)
        return AnswerResponse(gateway.sessions, gateway.ledger, answer)

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
    }

    @app.api_route("/v1/models", methods=READ)
    async def models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [model]})

    @app.api_route("/v1/models/{name:path}", methods=READ)
    async def one_model(name: str) -> JSONResponse:
        check_model(gateway, name)
        return JSONResponse(model)


def _add_operations(app: FastAPI, gateway: Gateway) -> None:
    """Add the routes for probes and Prometheus."""

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


async def _body(gateway: Gateway, request: Request) -> bytes:
    """Read the request's body. It is refused as soon as it is known to be too long or compressed."""
    limit, timeout_s = gateway.settings.max_body_bytes, gateway.settings.body_timeout_s
    if (encoding := request.headers.get("content-encoding", "identity").strip().lower()) not in ("identity", ""):
        text = f"the request's body has the encoding {encoding[:60]!r}; send it without compression"
        refused = {"accept-encoding": "identity"}
        raise ApiError(415, text, code="unsupported_content_encoding", extra=refused)

    def too_large() -> ApiError:
        return ApiError(413, f"the request's body is longer than {limit} bytes", code="request_too_large")

    if (length := request.headers.get("content-length", "")).isdecimal() and int(length[:20]) > limit:
        raise too_large()
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for part in request.stream():
                body += part
                if len(body) > limit:
                    raise too_large()
    except TimeoutError:
        raise ApiError(408, f"the request's body did not arrive in {timeout_s:g} s", code="request_timeout") from None
    except ClientDisconnect:
        raise ApiError(499, "the client went away before it had sent its request") from None
    return bytes(body)


async def _limits(gateway: Gateway, request: GenerationRequest) -> Limits:
    settings, folder = gateway.settings, gateway.model.folder
    context = min(folder.max_len, await gateway.upstream.longest_session(request.needs))
    return Limits(context, folder.vocab_size, settings.max_prompt_tokens, settings.max_output_tokens)


async def _api_error(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, error.headers)


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    """Answer a request that the framework refuses: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path[:200]}"
    if error.status_code == 404:
        answer = ApiError(404, f"unknown request: {where}", code="unknown_url")
    elif error.status_code == 405:
        answer = ApiError(405, f"this path does not take that method: {where}", code="method_not_allowed")
    else:
        answer = ApiError(error.status_code, str(error.detail))
    return JSONResponse(answer.body(), answer.status, error.headers)


async def _crash(_request: Request, _error: Exception) -> JSONResponse:
    return JSONResponse(internal_error().body(), 500)


class RequestScope:
    """ASGI middleware that gives every request an id, by default the client's own, and a log line."""

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

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            log = logging.get()
            try:
                await self._app(scope, receive, send_with_id)
            except Exception:
                log.exception("request crashed", path=scope["path"])
                if not status:
                    raise
            finally:
                quiet = is_open(scope["path"]) or scope["path"] == "/metrics"
                (log.debug if quiet else log.info)(
                    "request",
                    method=scope["method"],
                    path=scope["path"][:200],
                    status=status,
                    ms=round((monotonic() - started_s) * 1000, 1),
                )
