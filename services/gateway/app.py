"""The HTTP API: routes, and what belongs to each request (its id, its log line, its error body)."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from secrets import randbits, token_hex
from time import monotonic, time

import structlog
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.gateway.core.cursor import Place
from services.gateway.core.slo import class_of, slo_of
from services.gateway.errors import ApiError, internal_error, invalid
from services.gateway.headers import draft_of, pool_of
from services.gateway.keys import Guard, KeyFile, key_of
from services.gateway.ledger import Ledger
from services.gateway.metrics import Metrics
from services.gateway.prompt import chat_prompt, text_prompt
from services.gateway.request import Limits, check_prompt, plan
from services.gateway.response import Answer, Order
from services.gateway.resume import LAST_EVENT_ID, Kept, holder_of, resume
from services.gateway.schema import ChatRequest, CompletionRequest, GenerationRequest, parse
from services.gateway.sessions import Backend
from services.gateway.settings import GatewaySettings
from services.gateway.stream import Reply
from shared.broker.topology import device_name
from shared.models.folder import ModelFolder
from shared.models.text import Tokenizer
from shared.runtime import logging

SEED_HEADER = "x-wisp-seed"


@dataclass(frozen=True)
class Gateway:
    """What the routes work with."""

    settings: GatewaySettings
    model: str
    """The model's name in the API."""
    folder: ModelFolder
    tokenizer: Tokenizer
    fingerprint: str
    backend: Backend
    longest_session: Callable[[], Awaitable[int]]
    """Most tokens of a session that some verifier takes. Raises ApiError where there is none."""
    missing: Callable[[], Awaitable[dict[str, str | None]]]
    """Each part that is needed, with what is wrong with it, or None."""
    metrics: Metrics
    ledger: Ledger
    keys: KeyFile | None = None
    """Whose requests are answered; None for everybody's."""


def create_app(gateway: Gateway) -> ASGIApp:
    """The API as an ASGI application."""
    app = FastAPI(title="WISP gateway", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _crash)
    created = int(time())
    model = {
        "id": gateway.model,
        "object": "model",
        "created": created,
        "owned_by": "wisp",
        "root": gateway.model,
        "parent": None,
        "max_model_len": gateway.folder.max_len,
    }

    @app.get("/v1/models")
    async def models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [model]})

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> JSONResponse:
        _check_model(gateway, name)
        return JSONResponse(model)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        started_s = monotonic()
        settings = gateway.settings
        body = await _body(request, settings.max_body_bytes, settings.body_timeout_s)
        if last_id := request.headers.get(LAST_EVENT_ID):
            return await resume(gateway, Place.parse(last_id), key_of(request.scope))
        chat = parse(ChatRequest, body)
        _check_model(gateway, chat.model)
        limits = await _limits(gateway)
        messages = [message.rendered() for message in chat.messages]
        texts = [text for message in chat.messages for text in message.texts()]
        prompt = await chat_prompt(gateway.tokenizer, limits, messages, texts)
        check_prompt(prompt, limits, "messages")
        return _answer(gateway, request, chat, limits, [prompt], [""], chat.limit, started_s)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        started_s = monotonic()
        settings = gateway.settings
        body = await _body(request, settings.max_body_bytes, settings.body_timeout_s)
        if last_id := request.headers.get(LAST_EVENT_ID):
            return await resume(gateway, Place.parse(last_id), key_of(request.scope))
        completion = parse(CompletionRequest, body)
        _check_model(gateway, completion.model)
        _check_choices(gateway, completion.n * len(completion.prompt))
        limits = await _limits(gateway)
        bos = gateway.folder.bos_id
        prompts, echoes = [], []
        for number, given in enumerate(completion.prompt):
            param = "prompt" if len(completion.prompt) == 1 else f"prompt[{number}]"
            ids = given if isinstance(given, list) else await text_prompt(gateway.tokenizer, limits, given, bos, param)
            check_prompt(ids, limits, param)
            prompts.append(ids)
            echoes.append("" if not completion.echo else given if isinstance(given, str) else decode(given))
        return _answer(gateway, request, completion, limits, prompts, echoes, completion.limit, started_s)

    decode = gateway.tokenizer.decode

    @app.get("/v1/streams/{name}")
    async def stream(name: str, request: Request) -> Response:
        place = Place.parse(request.headers.get(LAST_EVENT_ID) or f"{name}/")
        if place.name != name:
            raise invalid(f"Last-Event-ID is of the stream {place.name}, the address of another")
        return await resume(gateway, place, key_of(request.scope))

    @app.get("/health")
    async def health() -> JSONResponse:
        return JSONResponse({"status": "ok"})

    @app.get("/ready")
    async def ready(request: Request) -> JSONResponse:
        missing = await gateway.missing()
        is_ready = not any(missing.values())
        # A problem's text may name addresses: it is for those who have a key.
        told = gateway.keys is None or key_of(request.scope) is not None
        parts = {part: (problem if told else "not ok") if problem else "ok" for part, problem in missing.items()}
        return JSONResponse({"ready": is_ready, "parts": parts}, 200 if is_ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(gateway.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return RequestScope(app if gateway.keys is None else Guard(app, gateway.keys, gateway.metrics))


def _answer(
    gateway: Gateway,
    request: Request,
    asked: GenerationRequest,
    limits: Limits,
    prompts: list[list[int]],
    echoes: list[str],
    limit: int | None,
    started_s: float,
) -> Response:
    _check_choices(gateway, asked.n * len(prompts))
    chat = isinstance(asked, ChatRequest)
    name = f"{'chatcmpl' if chat else 'cmpl'}-{token_hex(12)}"
    seed = asked.seed if asked.seed is not None else randbits(63)
    classes = gateway.settings.slo_classes
    service_class = class_of(asked.service_tier, classes)
    plans = plan(
        asked,
        name,
        prompts,
        seed,
        limits,
        limit=limit,
        stop_ids=gateway.folder.eos_ids,
        slo=slo_of(request.headers, asked.service_tier, classes),
        service_class=service_class,
        pool=_pool(request, asked),
        draft=asked.wisp.draft or draft_of(request.headers),
        echoes=echoes,
    )
    reply = Reply(
        id=name,
        created=int(time()),
        model=gateway.model,
        fingerprint=f"fp_{gateway.fingerprint[:16]}",
        chat=chat,
        include_usage=asked.stream_options.include_usage,
        service_tier=None if asked.service_tier is None else service_class,
    )
    if asked.stream:
        kept = Kept(
            created=reply.created,
            model=gateway.model,
            chat=chat,
            include_usage=reply.include_usage,
            service_tier=reply.service_tier,
            service_class=service_class,
            trace=asked.wisp.trace,
            keep=asked.wisp.resumable,
            pool=plans[0].pool,
            seed=seed,
            stops=asked.stop,
            echoes=[one.echo for one in plans],
            prompt_tokens=sum(map(len, prompts)),
            holder=holder_of(key_of(request.scope)),
        )
        plans = [replace(one, streamed=True, keep=asked.wisp.resumable) for one in plans]
        plans[0] = replace(plans[0], kept=kept.pack())
    order = Order(
        plans,
        prompt_tokens=sum(map(len, prompts)),
        stream=asked.stream,
        trace=asked.wisp.trace,
        started_s=started_s,
        headers={SEED_HEADER: str(seed)},
        key=key_of(request.scope),
        reserved=sum(map(len, prompts)) + (0 if limit is None else sum(plan.max_tokens for plan in plans)),
    )
    return Answer(gateway.backend, gateway.ledger, reply, order)


def _pool(request: Request, asked: GenerationRequest) -> str:
    """Who drafts: the device whose key it is, else the pool that is asked for. The names of pools have no dots, so that
    nobody asks for a device that is not theirs."""
    key = key_of(request.scope)
    if key is not None and key.device is not None:
        return device_name(key.device)
    return asked.wisp.pool or pool_of(request.headers)


def _check_model(gateway: Gateway, name: str) -> None:
    if name != gateway.model:
        raise ApiError(
            404,
            f"the model {name[:200]!r} does not exist; this server has {gateway.model!r}",
            code="model_not_found",
            param="model",
        )


def _check_choices(gateway: Gateway, count: int) -> None:
    if count > (most := gateway.settings.max_choices):
        raise invalid(f"prompts times n is {count}, and one request may ask for {most} texts at most", "n")


async def _body(request: Request, limit: int, timeout_s: float) -> bytes:
    """The request's body, refused as soon as it is known to be too long."""

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


async def _limits(gateway: Gateway) -> Limits:
    settings = gateway.settings
    context = min(gateway.folder.max_len, await gateway.longest_session())
    return Limits(context, gateway.folder.vocab_size, settings.max_prompt_tokens, settings.max_output_tokens)


async def _api_error(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, error.headers)


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    """What the framework refuses: unknown paths and methods."""
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
    """Gives every request an id (the client's own where it sent one) and a log line."""

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
                quiet = scope["path"] in ("/health", "/ready", "/metrics")
                (log.debug if quiet else log.info)(
                    "request",
                    method=scope["method"],
                    path=scope["path"][:200],
                    status=status,
                    ms=round((monotonic() - started_s) * 1000, 1),
                )
