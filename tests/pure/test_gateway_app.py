"""The HTTP application over a transport in memory: refusals, errors and metrics."""

from __future__ import annotations

import asyncio
import gzip
import json
import threading
from collections.abc import AsyncIterator, Collection
from contextlib import suppress
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from time import monotonic
from typing import Any, NoReturn

import builders
import httpx
import memory_store
import openai
import pytest
import structlog
from gateway_memory import MemoryServices, MemoryTransport
from gateway_peer import CONTEXT, Script, eventually, results_of, settings, tiny_target, with_tags
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from patience import HANG_S
from prometheus_client import generate_latest

from services.gateway import sessions, silence
from services.gateway.app import create_app
from services.gateway.core.admission import Admission
from services.gateway.core.reasoning import TAGS
from services.gateway.core.turns import TurnOrder
from services.gateway.errors import unavailable
from services.gateway.gateway import Gateway
from services.gateway.keys import KeyFile, new_key, render
from services.gateway.ledger import Ledger
from services.gateway.model import ServedModel
from services.gateway.stream import Chunks
from shared.broker import topology
from shared.errors import BrokersError, Unroutable
from shared.messages import Generate, Load, Message, ReasoningBudget, Result, Slo
from shared.messages.logprobs import from_text
from shared.models.folder import ModelFolder
from shared.models.text import Tokenizer
from shared.state.sessions import SessionStatus

MODEL = "tiny"
JSON_TYPE = [(b"content-type", b"application/json")]
HELLO = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}


class NoCounters:
    """Counters that are never used, because no key has limits."""

    async def take(self, *_: object) -> NoReturn:
        raise AssertionError

    join = settle = renew = take


class Upstream:
    """The services behind the gateway."""

    def __init__(self) -> None:
        self.verifiers = True
        self.problems: dict[str, str | None] = {"redis": None}

    async def longest_session(self, needs: Collection[str] = ()) -> int:
        if not self.verifiers:
            raise unavailable("no verifier is running")
        return CONTEXT

    async def missing(self) -> dict[str, str | None]:
        return dict(self.problems)


class App:
    """The application, a client, and services in memory that answer by a script."""

    def __init__(self, folder: ModelFolder, **fields: Any) -> None:
        self.settings = settings(folder.path, **fields)
        model = ServedModel.load(self.settings, MODEL)
        self.tokenizer = model.tokenizer
        self.script = Script()
        self.silent = False
        """True if results are lost; committed tokens are not."""
        self.running_in: set[str] = set()
        """Arithmetics of the usable verifiers."""
        self.upstream = Upstream()
        self.services = MemoryServices(draft=self.work)
        self.transport = MemoryTransport(self.services, "g")
        self.gateway = Gateway.assemble(
            self.settings,
            "g",
            model,
            self.transport,
            self.upstream,
            ledger=Ledger(NoCounters(), self.settings.key_limits),
            keys=KeyFile(self.settings.api_keys_file) if self.settings.api_keys_file else None,
            admission=Admission(
                self.settings.slo_classes,
                self.settings.max_sessions,
                self.settings.max_backlog_ms,
                self.settings.admission,
            ),
            idle_check_s=self.settings.idle_check_s,
            arithmetics=lambda: self.running_in,
        )
        self.sessions = self.gateway.sessions
        self.transport.deliver_to(self.sessions.receive)
        self.asgi = create_app(self.gateway)
        transport = httpx.ASGITransport(self.asgi, raise_app_exceptions=False)
        self.http = httpx.AsyncClient(
            transport=transport,
            base_url="http://127.0.0.1:8000",
            headers={"content-type": "application/json"},
            timeout=HANG_S,
        )

    async def work(self, message: Message) -> None:
        """Generate a session's tokens, like drafter and verifier."""
        assert isinstance(message, Generate)
        results = results_of(message, self.script, self.tokenizer)
        for result in results:
            if result.tokens:
                records = from_text(result.logprobs)
                await self.services.commit(message.session, result.tokens, result.finish, result.committed_in, records)
        for result in [] if self.silent else self.script.reorder(results):
            await self.services.publish("g", result)

    @property
    def generated(self) -> list[Generate]:
        """The sessions handed to drafters."""
        return [generate for _, generate in self.services.generated]

    async def chat(self, **options: Any) -> httpx.Response:
        return await self.http.post("/v1/chat/completions", json=HELLO | options)


def samples() -> dict[str, float]:
    """Return the exported samples of our metrics, by name and labels."""
    lines = generate_latest().decode().splitlines()
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("wisp_")}


def grown(before: dict[str, float]) -> dict[str, float]:
    """Return the growth of every sample."""
    return {name: value - before.get(name, 0.0) for name, value in samples().items()}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return tiny_target(tmp_path_factory.mktemp("models") / MODEL)


@pytest.fixture
async def app(folder: ModelFolder) -> AsyncIterator[App]:
    app = App(folder)
    watching = asyncio.create_task(app.sessions.watch())
    yield app
    watching.cancel()
    await app.http.aclose()


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """Return the error of a response, checked for OpenAI's shape."""
    assert response.status_code == status
    assert response.headers["content-type"].startswith("application/json")
    assert response.headers["x-request-id"]
    body = response.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


async def test_an_answer_reports_its_seed_and_the_request_id(app: App) -> None:
    response = await app.http.post("/v1/chat/completions", json=HELLO, headers={"x-request-id": "mine-1"})
    assert response.status_code == 200
    assert response.headers["x-request-id"] == "mine-1"
    assert int(response.headers["x-wisp-seed"]) == app.generated[0].sampling.seed
    again = await app.chat(seed=-5)
    assert again.headers["x-wisp-seed"] == "-5"
    assert again.headers["x-request-id"].startswith("req_")


async def test_requests_without_a_seed_get_different_ones(app: App) -> None:
    assert len({(await app.chat()).headers["x-wisp-seed"] for _ in range(5)}) == 5


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH"])
async def test_other_methods_are_refused(app: App, method: str) -> None:
    response = await app.http.request(method, "/v1/chat/completions")
    error = error_of(response, 405)
    assert error["code"] == "method_not_allowed"
    assert error["message"] == f"{method} /v1/chat/completions is not allowed; send POST"
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize("path", ["/nothing", "/v1", "/v1/embeddings", "/v1/chat/completions/x", "/docs2", "/%ff"])
async def test_unknown_paths_are_refused(app: App, path: str) -> None:
    assert error_of(await app.http.post(path, json=HELLO), 404)["code"] == "unknown_url"


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/chat/completions", "/v1/chat/completions"),
        ("/v1/v1/chat/completions", "/v1/chat/completions"),
        ("/models/tiny/", "/v1/models/tiny"),
        ("/embeddings", None),
        (f"/models/{'x' * 1000}", None),
    ],
)
async def test_an_unknown_path_names_the_one_that_was_meant(app: App, path: str, meant: str | None) -> None:
    message = error_of(await app.http.post(path, json=HELLO), 404)["message"]
    assert ("did you mean " in message) == (meant is not None)
    assert meant is None or f"did you mean {meant}? The base URL ends with /v1 for clients of OpenAI's API" in message
    assert len(message) < 400


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"model": "x" * 5000}, 404),
        ({"wisp": {"draft": "x" * 5000}}, 400),
        ({"wisp": {"x" * 5000: True}}, 400),
        ({"seed": 10**250}, 400),
        ({"messages": [{"role": "user", "content": [{"type": "x" * 5000}]}]}, 400),
        ({"chat_template_kwargs": {"x" * 5000: 1}}, 400),
        ({"tool_choice": {"type": "function", "function": {"name": "x" * 5000}}}, 400),
        ({"guided_regex": "(" * 5000}, 400),
    ],
)
async def test_errors_show_the_beginning_of_long_values(app: App, body: dict[str, Any], status: int) -> None:
    error = error_of(await app.http.post("/v1/chat/completions", json=HELLO | body), status)
    assert len(error["message"]) <= 1001
    assert len(error["param"] or "") <= 201
    assert "x" * 101 not in error["message"]


async def test_a_slash_at_the_end_of_a_path_changes_nothing(app: App) -> None:
    assert (await app.http.post("/v1/chat/completions/", json=HELLO)).status_code == 200
    assert (await app.http.get("/v1/models//")).status_code == 200


async def test_options_lists_the_methods_of_a_path(app: App) -> None:
    answer = await app.http.options("/v1/chat/completions")
    assert (answer.status_code, answer.headers["allow"], answer.content) == (204, "POST, OPTIONS", b"")
    assert error_of(await app.http.options("/nowhere"), 404)["code"] == "unknown_url"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"])
@pytest.mark.parametrize("options", [{}, {"stream": True}, {"top_k": "wrong"}, {"model": "other"}])
async def test_no_text_of_users_or_models_is_logged(app: App, path: str, options: dict[str, Any]) -> None:
    app.script = Script("an answer of its own")
    body = {"model": MODEL, "input": "my words", "prompt": "my words", "max_tokens": 30}
    body |= {"messages": [{"role": "user", "content": "my words"}]}
    kept = {"input", "model"} if path == "/v1/responses" else body.keys()
    asked = {name: value for name, value in body.items() if name in kept} | options
    with structlog.testing.capture_logs([structlog.contextvars.merge_contextvars]) as logs:
        await app.http.post(path, json=asked, headers={"x-request-id": "mine"})
    assert {entry["request_id"] for entry in logs if entry["event"] == "request"} == {"mine"}
    assert "my words" not in str(logs)
    assert "of its own" not in str(logs)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"])
async def test_options_that_look_misspelt_are_named(app: App, path: str) -> None:
    body = HELLO | {"prompt": "x", "input": "x", "max_tokens": 5}
    if path == "/v1/responses":
        body = {"model": MODEL, "input": "x"}
    harmless = {"user": "u", "metadata": {}, "stream": False, "models": [], "no_such_option": 1, "n" * 99: 1}
    with structlog.testing.capture_logs() as logs:
        answer = await app.http.post(path, json=body | harmless)
        assert answer.status_code == 200, answer.text
        assert "x-wisp-ignored" not in answer.headers
        assert [entry for entry in logs if entry["log_level"] == "warning"] == []
        answer = await app.http.post(path, json=body | harmless | {"temprature": 0, "Top-P": "secret"})
    assert answer.status_code == 200
    told = "temprature (did you mean temperature?), Top-P (did you mean top_p?)"
    assert answer.headers["x-wisp-ignored"] == told
    (entry,) = [entry for entry in logs if entry["log_level"] == "warning"]
    assert entry["options"] == {"temprature": "temperature", "Top-P": "top_p"}
    assert "secret" not in str(entry)
    stream = await app.http.post(path, json=body | {"stream": True, "temper\u00e4ture\n": 0})
    assert stream.headers["x-wisp-ignored"] == "temper\\xe4ture\\n (did you mean temperature?)"
    assert "x-wisp-ignored" not in (await app.http.post(path, json=body)).headers


async def test_an_unknown_model_is_refused(app: App) -> None:
    for path in ("/v1/chat/completions", "/v1/completions"):
        response = await app.http.post(path, json=HELLO | {"model": "gpt-9", "prompt": "x"})
        assert error_of(response, 404)["code"] == "model_not_found"
    assert error_of(await app.http.get("/v1/models/gpt-9"), 404)["code"] == "model_not_found"


async def test_models_are_listed(app: App) -> None:
    listed = (await app.http.get("/v1/models")).json()
    assert [model["id"] for model in listed["data"]] == [MODEL]
    assert (await app.http.get(f"/v1/models/{MODEL}")).json() == listed["data"][0]
    assert listed["data"][0]["max_model_len"] == listed["data"][0]["context_window"] == CONTEXT
    capabilities = listed["data"][0]["capabilities"]
    assert {name for name, offered in capabilities.items() if offered} >= {"logprobs", "structured_output", "tools"}


FOREIGN_TYPES = (
    "text/plain",
    "text/plain; application/json",
    "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=x",
    "text/json",
    "",
)
"""The first, third and fourth are those that a page in a browser may send without being asked."""


@pytest.mark.parametrize("content_type", FOREIGN_TYPES)
async def test_without_keys_only_json_types_are_taken(app: App, content_type: str) -> None:
    for path in ("/v1/chat/completions", "/v1/completions"):
        body = json.dumps(HELLO | {"prompt": "x"}).encode()
        response = await app.http.post(path, content=body, headers={"content-type": content_type})
        assert error_of(response, 415)["code"] == "unsupported_content_type"
    assert app.generated == []
    for kind in ("application/json", "Application/JSON; charset=utf-8", "application/vnd.api+json"):
        body = json.dumps(HELLO).encode()
        assert (
            await app.http.post("/v1/chat/completions", content=body, headers={"content-type": kind})
        ).status_code == 200


@pytest.mark.parametrize("content_type", FOREIGN_TYPES)
async def test_with_a_key_the_content_type_does_not_matter(guarded: tuple[App, str], content_type: str) -> None:
    app, key = guarded
    headers = {"content-type": content_type, "authorization": f"Bearer {key}", "host": "evil.example"}
    response = await app.http.post("/v1/chat/completions", content=json.dumps(HELLO).encode(), headers=headers)
    assert response.status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "localhost.evil.example", "notlocalhost", "", "["]
)
async def test_without_keys_foreign_host_names_are_refused(app: App, host: str) -> None:
    for method, path in (("POST", "/v1/chat/completions"), ("GET", "/v1/models"), ("GET", "/ready"), ("GET", "/")):
        response = await app.http.request(method, path, json=HELLO, headers={"host": host})
        assert error_of(response, 403)["code"] == "host_not_allowed"
        assert "WISP_ALLOWED_HOSTS" in response.text
    assert app.generated == []


@pytest.mark.parametrize(
    "host",
    [
        *("localhost", "LOCALHOST:8000", "localhost.", "wisp.localhost"),
        *("127.0.0.1:8000", "[::1]:8000", "10.0.0.7:8000", "[fe80::1]"),
    ],
)
async def test_without_keys_loopback_names_and_addresses_are_served(app: App, host: str) -> None:
    """A page cannot make an address its name, so addresses are harmless."""
    assert (await app.http.get("/v1/models", headers={"host": host})).status_code == 200


async def test_a_setting_allows_more_host_names(folder: ModelFolder) -> None:
    app = App(folder, allowed_hosts="gateway, wisp.example.org")
    for host, status in (("gateway:8000", 200), ("WISP.example.org", 200), ("localhost", 200), ("other", 403)):
        assert (await app.http.get("/v1/models", headers={"host": host})).status_code == status
    app = App(folder, allowed_hosts="*")
    assert (await app.http.get("/v1/models", headers={"host": "anything.example"})).status_code == 200


ASKS = {"origin": "https://chat.example.org", "access-control-request-method": "POST"}


async def test_cors_is_off_by_default(app: App) -> None:
    response = await app.http.options("/v1/chat/completions", headers=ASKS)
    assert response.headers["allow"] == "POST, OPTIONS"
    answered = await app.http.post("/v1/chat/completions", json=HELLO, headers={"origin": ASKS["origin"]})
    for headers in (response.headers, answered.headers):
        assert not any(name.startswith("access-control-") for name in headers)


@pytest.mark.parametrize("origins", ["https://chat.example.org", "http://localhost:3000,https://chat.example.org", "*"])
async def test_pages_of_allowed_origins_may_use_the_api(folder: ModelFolder, tmp_path: Path, origins: str) -> None:
    text, key = new_key("tests", datetime.now(UTC))
    (tmp_path / "keys.json").write_text(render([key]))
    for fields, more in (({}, {}), ({"api_keys_file": tmp_path / "keys.json"}, {"authorization": f"Bearer {text}"})):
        app = App(folder, cors_origins=origins, **fields)
        wanted = ASKS | {"access-control-request-headers": "authorization, content-type, x-stainless-lang"}
        asked = await app.http.options("/v1/chat/completions", headers=wanted)
        assert asked.status_code == 200
        assert asked.headers["access-control-allow-origin"] in (ASKS["origin"], "*")
        assert "POST" in asked.headers["access-control-allow-methods"]
        assert "authorization" in asked.headers["access-control-allow-headers"]
        origin = {"origin": ASKS["origin"]}
        for stream in (False, True):
            answer = await app.http.post("/v1/chat/completions", json=HELLO | {"stream": stream}, headers=origin | more)
            assert answer.status_code == 200
            assert answer.headers["access-control-allow-origin"] in (ASKS["origin"], "*")
            assert "x-wisp-seed" in answer.headers["access-control-expose-headers"]
        refused = await app.http.post("/v1/chat/completions", content=b"{", headers=origin | more)
        assert refused.status_code == 400
        assert "access-control-allow-origin" in refused.headers


async def test_pages_of_other_origins_may_not(folder: ModelFolder) -> None:
    app = App(folder, cors_origins="https://chat.example.org")
    asked = await app.http.options("/v1/chat/completions", headers=ASKS | {"origin": "https://evil.example"})
    assert asked.status_code == 400
    assert "access-control-allow-origin" not in asked.headers


async def test_readable_paths_answer_head_requests(app: App) -> None:
    for path in ("/health", "/ready", "/v1/models", f"/v1/models/{MODEL}", "/metrics"):
        assert (await app.http.head(path)).status_code == 200
    app.upstream.problems = {"verifier": "none"}
    assert (await app.http.head("/ready")).status_code == 503


@pytest.mark.parametrize("encoding", ["br", "zstd", "deflate, gzip", "gzip, gzip"])
async def test_other_compressions_are_refused(app: App, encoding: str) -> None:
    for path in ("/v1/chat/completions", "/v1/completions"):
        response = await app.http.post(path, content=b"\x1f\x8b", headers={"content-encoding": encoding})
        assert error_of(response, 415)["code"] == "unsupported_content_encoding"
        assert response.headers["accept-encoding"] == "gzip, identity"
    plain = await app.http.post("/v1/chat/completions", json=HELLO, headers={"content-encoding": "identity"})
    assert plain.status_code == 200


async def test_gzip_bodies_are_unpacked_up_to_the_limit(folder: ModelFolder) -> None:
    app = App(folder, max_body_bytes=5000)
    body = gzip.compress(json.dumps(HELLO).encode())
    for encoding in ("gzip", "GZIP", "x-gzip"):
        answer = await app.http.post("/v1/chat/completions", content=body, headers={"content-encoding": encoding})
        assert answer.status_code == 200
    bomb = gzip.compress(b" " * 50_000_000)
    assert len(bomb) > 5000
    assert error_of(await gzipped(app, bomb), 413)["code"] == "request_too_large"
    assert error_of(await gzipped(app, gzip.compress(b" " * 5001)), 413)["code"] == "request_too_large"
    assert error_of(await gzipped(app, b"no gzip"), 400)["code"] == "invalid_encoding"
    assert error_of(await gzipped(app, body[:-9]), 400)["code"] == "invalid_encoding"


async def gzipped(app: App, body: bytes) -> httpx.Response:
    return await app.http.post("/v1/chat/completions", content=body, headers={"content-encoding": "gzip"})


class Pinging(httpx.AsyncBaseTransport):
    """A proxy that keeps streams alive with comments, between events and before the first one."""

    def __init__(self, gateway: httpx.AsyncBaseTransport) -> None:
        self._gateway = gateway

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await self._gateway.handle_async_request(request)
        body = await response.aread()
        pinged = b": ping\n\n" + body.replace(b"\n\n", b"\n\n: ping\n\n")
        return httpx.Response(response.status_code, headers=response.headers, content=pinged)


async def test_comments_of_a_proxy_do_not_break_the_official_client(app: App) -> None:
    proxy = httpx.AsyncClient(transport=Pinging(httpx.ASGITransport(app.asgi)))
    client = openai.AsyncOpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none", max_retries=0, http_client=proxy)
    text = ""
    async for chunk in await client.chat.completions.create(model=MODEL, messages=HELLO["messages"], stream=True):
        text += chunk.choices[0].delta.content or ""
    assert text == app.script.text
    await client.close()


@pytest.mark.parametrize(
    ("accept", "resumable", "has_ids"),
    [
        ("*/*", False, True),
        ("text/event-stream", False, True),
        ("application/json, text/event-stream;q=0.9", False, True),
        ("application/json", False, False),
        ("application/json", True, True),
    ],
)
async def test_events_have_ids_for_clients_that_may_use_them(
    app: App, accept: str, resumable: bool, has_ids: bool
) -> None:
    body = HELLO | {"stream": True, "wisp": {"resumable": resumable}}
    response = await app.http.post("/v1/chat/completions", json=body, headers={"accept": accept})
    *events, done = response.text.split("\n\n")[:-1]
    assert done == "data: [DONE]"
    assert {event.startswith("id: ") for event in events} == {has_ids}


async def test_a_prompt_longer_than_the_context_is_refused_with_the_numbers(app: App) -> None:
    text = "x" * (CONTEXT + 5)
    for path, body, tokens in (
        ("/v1/completions", {"prompt": text}, len(text)),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}, len(text) + 19),
    ):
        error = error_of(await app.http.post(path, json={"model": MODEL} | body), 400)
        assert error["code"] == "context_length_exceeded"
        # litellm and LangChain know the error by these words.
        assert error["message"].startswith(f"This model's maximum context length is {CONTEXT} tokens. ")
        assert f"your {error['param']} resulted in {tokens} tokens" in error["message"]


async def test_a_crash_in_the_middle_of_a_stream_is_an_error_event(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(self: Chunks, index: int, finish: str) -> Any:
        raise ZeroDivisionError("a defect")

    async def one_by_one(message: Message) -> None:
        assert isinstance(message, Generate)
        for result in results_of(message, app.script, app.tokenizer):
            asyncio.get_running_loop().call_later(0.01 * result.base_len, send, result)

    def send(result: Result) -> None:
        sending.append(asyncio.ensure_future(app.sessions.receive(result)))

    sending: list[Any] = []
    monkeypatch.setattr(Chunks, "closing", crash)
    app.services.draft = one_by_one
    response = await app.chat(stream=True)
    assert response.status_code == 200
    *events, error, done = response.text.strip().split("\n\n")
    assert len(events) > 1
    assert json.loads(error.removeprefix("data: "))["error"]["type"] == "server_error"
    assert done == "data: [DONE]"


@pytest.mark.parametrize("text", ["word " * 100_000, "x" * 40_000])
async def test_a_far_too_long_prompt_is_refused_without_tokenizing_it(
    app: App, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []
    encode = Tokenizer.encode

    def encode_and_measure(self: Tokenizer, text: str) -> list[int]:
        lengths.append(len(text))
        return encode(self, text)

    monkeypatch.setattr(Tokenizer, "encode", encode_and_measure)
    for path, body in (
        ("/v1/completions", {"prompt": text}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}),
    ):
        response = await app.http.post(path, json={"model": MODEL} | body)
        error = error_of(response, 400)
        assert error["code"] == "context_length_exceeded"
        assert f"more than {2 * CONTEXT}" in error["message"]
    assert max(lengths) < 20_000
    assert sum(lengths) < 40_000


@pytest.mark.parametrize("echo", [True, False])
async def test_token_ids_outside_the_vocabulary_are_refused(app: App, echo: bool) -> None:
    for token in (-1, 259, 2**31, 2**63, 2**70):
        body = {"model": MODEL, "prompt": [5, token], "echo": echo}
        assert error_of(await app.http.post("/v1/completions", json=body), 400)["param"] == "prompt"
    body = {"model": MODEL, "prompt": ["fine", "x" * CONTEXT]}
    assert error_of(await app.http.post("/v1/completions", json=body), 400)["param"] == "prompt[1]"


async def test_an_empty_prompt_becomes_the_beginning_of_text_token(app: App) -> None:
    response = await app.http.post("/v1/completions", json={"model": MODEL, "prompt": ""})
    assert response.json()["usage"]["prompt_tokens"] == 1


async def test_a_client_that_goes_away_while_sending_gets_a_499(app: App) -> None:
    events = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]
    sent: list[Any] = []

    async def receive() -> Any:
        return events.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": JSON_TYPE, "query_string": b""}
    await app.asgi(scope, receive, send)
    assert sent[0]["status"] == 499


async def test_a_client_that_goes_away_during_the_start_ends_its_session(app: App) -> None:
    starting = asyncio.Event()

    async def deaf(message: Message) -> None:
        starting.set()
        with suppress(asyncio.CancelledError):  # like a library that receives its answer at this moment
            await asyncio.sleep(60)

    async def receive() -> Any:
        if not sent:
            sent.append("body")
            return {"type": "http.request", "body": json.dumps(HELLO).encode()}
        await starting.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message["type"])

    sent: list[str] = []
    app.services.draft = deaf
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/chat/completions",
        "headers": JSON_TYPE,
        "query_string": b"",
    }
    request = asyncio.create_task(app.asgi(scope, receive, send))
    await eventually(request.done)
    assert app.sessions.running == 0
    await eventually(lambda: len(app.services.cancelled) == 1)
    assert sent == ["body"]


async def test_too_many_completions_are_refused(app: App) -> None:
    assert error_of(await app.chat(n=100), 400)["param"] == "n"
    response = await app.http.post("/v1/completions", json={"model": MODEL, "prompt": ["x"] * 100})
    assert error_of(response, 400)["param"] == "n"


async def test_bad_headers_are_refused(app: App) -> None:
    for header, value in (
        ("x-slo-ttft-ms", "soon"),
        ("x-llm-d-slo-tpot-ms", "-1"),
        ("x-wisp-draft", "magic"),
        ("x-wisp-pool", "a.b"),
    ):
        response = await app.http.post("/v1/chat/completions", json=HELLO, headers={header: value})
        assert error_of(response, 400)["param"] == header


async def test_a_body_with_too_large_a_content_length_is_not_read(folder: ModelFolder) -> None:
    app = App(folder, max_body_bytes=1024)
    read = 0

    async def parts() -> AsyncIterator[bytes]:
        nonlocal read
        read += 1
        yield b"x" * 5000

    response = await app.http.post("/v1/chat/completions", content=parts(), headers={"content-length": "5000"})
    assert error_of(response, 413)["code"] == "request_too_large"
    assert read == 0


async def test_a_body_that_grows_too_long_is_not_read_to_its_end(folder: ModelFolder) -> None:
    app = App(folder, max_body_bytes=1024)
    read = 0

    async def parts() -> AsyncIterator[bytes]:
        nonlocal read
        for _ in range(1000):
            read += 1
            yield b"x" * 500

    assert error_of(await app.http.post("/v1/completions", content=parts()), 413)["code"] == "request_too_large"
    assert read <= 4


async def test_a_body_that_never_comes_times_out(folder: ModelFolder) -> None:
    app = App(folder, body_timeout_s=0.05)

    async def parts() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(60)

    assert error_of(await app.http.post("/v1/completions", content=parts()), 408)["code"] == "request_timeout"


async def test_without_a_verifier_requests_get_a_503(app: App) -> None:
    app.upstream.verifiers = False
    response = await app.chat()
    error_of(response, 503)
    assert int(response.headers["retry-after"]) >= 1


@pytest.mark.parametrize(
    ("error", "code"), [(Unroutable("no queue"), "no_drafter"), (BrokersError("down"), "brokers_unavailable")]
)
@pytest.mark.parametrize("stream", [True, False])
async def test_without_a_drafter_or_broker_requests_get_a_503(
    app: App, error: Exception, code: str, stream: bool
) -> None:
    app.services.error = error
    response = await app.chat(stream=stream)
    assert error_of(response, 503)["code"] == code
    assert int(response.headers["retry-after"]) >= 1
    assert app.sessions.running == 0


async def test_too_many_sessions_are_refused_and_leave_nothing_behind(folder: ModelFolder) -> None:
    app = App(folder, max_sessions=2)
    response = await app.chat(n=3)
    assert error_of(response, 429)["type"] == "rate_limit_error"
    assert int(response.headers["retry-after"]) >= 1
    assert app.sessions.running == 0
    assert (await app.chat(n=2)).status_code == 200
    assert (await app.chat(n=2)).status_code == 200


def full(**fields: Any) -> Load:
    """Return the Load of a scheduler whose verifiers are promised to 85%."""
    plain = {"scheduler": "s", "price_ms": 0.0, "queue_ms": 0.0, "pending": 0, "draft_cap": 8, "verifiers": 1}
    others = {"service_class": "default", "sessions": 9, "waiting": 0, "queue_ms": 0.0}
    return Load.model_validate(plain | {"utilization": 0.85, "round_ms": 1.0, "classes": [others]} | fields)


async def test_a_full_fleet_refuses_promises_with_a_reason_and_a_retry_time(app: App) -> None:
    await app.sessions.receive(full(utilization=0.95))
    for stream in (True, False):
        response = await app.chat(service_tier="default", n=2, stream=stream)
        error = error_of(response, 429)
        assert (error["type"], error["code"]) == ("rate_limit_error", "slo_unattainable_now")
        assert "'default' are promised up to 90%" in error["message"]
        assert response.headers["x-wisp-refused"] == "slo_unattainable_now"
        assert response.headers["x-llm-d-request-dropped-reason"] == "rejected-saturated"
        assert 1 <= int(response.headers["retry-after"]) <= 60
    assert (await app.chat(service_tier="priority")).status_code == 200
    assert len(app.generated) == 1


async def test_a_full_fleet_serves_clients_that_ask_for_no_promise(app: App) -> None:
    await app.sessions.receive(full(utilization=9.0, backlog_ms=60_000.0))
    for options in ({}, {"service_tier": "auto"}, {"service_tier": "flex"}, {"stream": True}):
        assert (await app.chat(**options)).status_code == 200
    assert [generate.slo for generate in app.generated] == [None] * 4
    await app.sessions.receive(full(backlog_ms=1e6))
    assert error_of(await app.chat(), 429)["code"] == "overloaded"


async def test_an_slo_header_does_not_change_the_class(app: App) -> None:
    headers = {"x-llm-d-slo-ttft-ms": "60000", "x-llm-d-slo-tpot-ms": "500"}
    response = await app.http.post(
        "/v1/chat/completions", json=HELLO | {"service_tier": "flex", "wisp": {"trace": True}}, headers=headers
    )
    summary = response.json()["wisp"]["summary"]
    assert summary["service_class"] == "flex"
    assert summary["slo"] == {"ttft_ms": 60000, "tpot_ms": 500}
    assert summary["attained"] is True
    await app.sessions.receive(full())
    refused = await app.http.post("/v1/chat/completions", json=HELLO | {"service_tier": "flex"}, headers=headers)
    assert error_of(refused, 429)["code"] == "slo_unattainable_now"
    assert (await app.http.post("/v1/chat/completions", json=HELLO, headers=headers)).status_code == 200


async def test_the_answer_names_the_tier_used_if_the_request_names_one(app: App) -> None:
    for asked, used in (("priority", "priority"), ("auto", "default"), ("gold", "default"), (None, None)):
        assert (await app.chat(service_tier=asked)).json().get("service_tier") == used
        streamed = await app.chat(service_tier=asked, stream=True)
        chunks = [json.loads(event.partition("data: ")[2]) for event in streamed.text.split("\n\n")[:-2]]
        assert {chunk.get("service_tier") for chunk in chunks} == {used}


async def test_a_request_goes_to_its_pool(app: App) -> None:
    app.services.pools |= {"phones", "cars"}
    await app.chat()
    await app.chat(wisp={"pool": "phones"})
    await app.http.post("/v1/chat/completions", json=HELLO, headers={"x-wisp-pool": "cars"})
    await app.http.post(
        "/v1/chat/completions", json=HELLO | {"wisp": {"pool": "phones"}}, headers={"x-wisp-pool": "cars"}
    )
    assert [pool for pool, _ in app.services.generated] == [topology.DEFAULT_POOL, "phones", "cars", "phones"]
    app.services.pools.remove("phones")
    response = await app.chat(wisp={"pool": "phones"})
    assert "pool 'phones'" in error_of(response, 503)["message"]


async def test_every_completion_is_reported_and_counted_once(folder: ModelFolder) -> None:
    app = App(folder, max_sessions=3, stall_timeout_s=0.2)
    before = samples()
    watching = asyncio.create_task(app.sessions.watch())
    await app.chat(n=2, service_tier="default")
    slow = {"x-slo-ttft-ms": "1e-9", "x-slo-tpot-ms": "1"}
    await app.http.post("/v1/chat/completions", json=HELLO | {"service_tier": "priority"}, headers=slow)
    error_of(await app.chat(n=5, service_tier="flex"), 429)
    app.silent, app.script = True, Script(text="", ends=False)
    error_of(await app.chat(service_tier="flex"), 504)
    await eventually(lambda: len(app.services.ended) == 9)
    watching.cancel()
    ended = app.services.ended
    text = len(Script().text)
    assert len({one.session for one in ended}) == 9
    assert [(one.service_class, one.reason, one.attained, one.tokens) for one in ended] == (
        [("default", "stop", True, text)] * 2
        + [("priority", "stop", False, text)]
        + [("flex", "refused", False, 0)] * 5
        + [("flex", "error", False, 0)]
    )
    assert [one.slo for one in ended[1:4]] == [Slo(ttft_ms=2000, tpot_ms=200), Slo(ttft_ms=1e-9, tpot_ms=1), None]
    assert all(one.ttft_ms is not None and one.tpot_ms is not None for one in ended[:3])
    assert all(one.prompt_tokens == ended[0].prompt_tokens > 0 for one in ended)
    values = grown(before)

    def value(name: str, **labels: str) -> float:
        label = ",".join(f'{key}="{text}"' for key, text in sorted({"model_name": MODEL, **labels}.items()))
        return values[f"wisp_{name}_total{{{label}}}"]

    assert value("slo_requests", service_class="default", attained="true") == 2
    assert value("slo_requests", service_class="priority", attained="false") == 1
    assert value("slo_requests", service_class="flex", attained="false") == 1
    assert value("goodput_tokens", service_class="default") == 2 * text
    assert value("goodput_tokens", service_class="priority") == 0
    assert value("requests_refused", service_class="flex", reason="too_many_sessions") == 5
    of_slo = sum(number for name, number in values.items() if name.startswith("wisp_slo_requests_total"))
    of_success = sum(number for name, number in values.items() if name.startswith("wisp_request_success_total"))
    assert of_slo == of_success == 4


async def test_a_stalled_session_times_out_and_is_cancelled(folder: ModelFolder) -> None:
    app = App(folder, stall_timeout_s=0.3)
    app.silent = True
    app.script = Script(text="")
    watching = asyncio.create_task(app.sessions.watch())
    for stream in (True, False):
        assert error_of(await app.chat(stream=stream), 504)["code"] == "timeout"
    await eventually(lambda: len(app.services.cancelled) == 2)
    watching.cancel()


def chunks_of(response: httpx.Response) -> list[dict[str, Any]]:
    return [json.loads(event.partition("data: ")[2]) for event in response.text.split("\n\n")[:-2]]


@pytest.mark.parametrize("silent", [False, True])
async def test_an_answer_of_mixed_arithmetic_reports_it(folder: ModelFolder, silent: bool) -> None:
    app = App(folder, idle_check_s=0.1)
    app.silent = silent
    app.script = Script(arithmetics=("wisp-1", "other"))
    watching = asyncio.create_task(app.sessions.watch())
    assert (await app.chat()).json()["wisp"] == {"arithmetic": ["wisp-1", "other"]}
    *before, last = chunks_of(await app.chat(stream=True))
    assert last["wisp"] == {"arithmetic": ["wisp-1", "other"]}
    assert not any("wisp" in chunk for chunk in before)
    watching.cancel()


async def test_an_answer_of_one_arithmetic_names_it_only_in_a_trace(app: App) -> None:
    app.script = Script(arithmetics=("wisp-1",))
    assert "wisp" not in (await app.chat()).json()
    assert not any("wisp" in chunk for chunk in chunks_of(await app.chat(stream=True)))
    assert (await app.chat(wisp={"trace": True})).json()["wisp"]["arithmetic"] == ["wisp-1"]
    assert chunks_of(await app.chat(stream=True, wisp={"trace": True}))[-1]["wisp"]["arithmetic"] == ["wisp-1"]


@pytest.mark.parametrize(
    ("running_in", "mixes", "code"),
    [
        ({"other", "a third"}, False, "arithmetic_unavailable"),
        ({"other", "wisp-1"}, False, "timeout"),
        ({"other", ""}, False, "timeout"),
        ({"other"}, True, "timeout"),
        (set(), False, "timeout"),
    ],
)
async def test_a_session_that_waits_for_its_arithmetic_ends_with_that_reason(
    folder: ModelFolder, running_in: set[str], mixes: bool, code: str
) -> None:
    app = App(folder, stall_timeout_s=0.3)
    app.script = Script(text="Hello there", ends=False, arithmetics=("wisp-1",))
    app.running_in = running_in
    await app.sessions.receive(builders.load(mixed_arithmetic=mixes))
    watching = asyncio.create_task(app.sessions.watch())
    error = error_of(await app.chat(), 503 if code == "arithmetic_unavailable" else 504)
    assert error["code"] == code
    if code == "arithmetic_unavailable":
        assert (
            "computed in the arithmetic wisp-1, and the running verifiers have another (a third; other)"
            in error["message"]
        )
    await eventually(lambda: len(app.services.cancelled) == 1)
    watching.cancel()


async def test_a_long_prompt_in_prefill_chunks_is_not_given_up(
    folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    skipped_s = 0.0
    for module in (sessions, silence):
        monkeypatch.setattr(module, "monotonic", lambda: monotonic() + skipped_s)
    app = App(folder, stall_timeout_s=60)

    async def work(message: Message) -> None:
        nonlocal skipped_s
        assert isinstance(message, Generate)
        chunk, *rounds = results_of(message, app.script, app.tokenizer)
        for number in range(3):
            skipped_s += 50
            await asyncio.sleep(2 * silence.WATCH_INTERVAL_S)
            await app.services.publish("g", chunk.model_copy(update={"batch": f"chunk{number}"}))
        for result in rounds:
            await app.services.commit(message.session, result.tokens, result.finish)
            await app.services.publish("g", result)

    app.services.draft = work
    watching = asyncio.create_task(app.sessions.watch())
    response = await app.chat()
    watching.cancel()
    assert response.json()["choices"][0]["message"]["content"] == app.script.text


class Clock:
    """The clock of the sessions and of the services behind them. It stands still until a test sets it forward."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._now_s = monotonic()
        self._looks = 0
        for module in (sessions, silence, memory_store):
            monkeypatch.setattr(module, "monotonic", lambda: self._now_s)
        monkeypatch.setattr(silence, "WATCH_INTERVAL_S", 0.005)
        forget = TurnOrder.forget

        def look(turns: TurnOrder, before_s: float) -> None:
            self._looks += 1
            forget(turns, before_s)

        monkeypatch.setattr(TurnOrder, "forget", look)

    async def _watched(self) -> None:
        """Wait until the watch has looked at all sessions, and what it began has ended."""
        wanted = self._looks + 3
        await eventually(lambda: self._looks >= wanted)

    async def skip(self, seconds: float) -> None:
        """Let time pass in steps that are no pause, and the watch look at each."""
        for _ in range(round(seconds / 0.9)):
            self._now_s += 0.9
            await self._watched()

    async def pause(self, seconds: float) -> None:
        """Let the whole process stand still for so long."""
        self._now_s += seconds
        await self._watched()


async def serve_in_turn(app: App, clock: Clock, count: int, each_s: float) -> list[httpx.Response]:
    """Send requests at once, of which one is served after the other."""
    app.services.draft = None
    asking = [asyncio.create_task(app.chat()) for _ in range(count)]
    await eventually(lambda: len(app.generated) == count)
    await clock.pause(0)  # all of them wait
    for generate in app.generated:
        await clock.skip(each_s)
        await app.work(generate)
    return await asyncio.gather(*asking)


async def test_waiting_behind_others_is_no_stall(folder: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    app, clock = App(folder, stall_timeout_s=5), Clock(monkeypatch)
    watching = asyncio.create_task(app.sessions.watch())
    responses = await serve_in_turn(app, clock, 10, 3.6)
    watching.cancel()
    assert [response.status_code for response in responses] == [200] * 10


async def test_waiting_behind_others_has_a_limit_of_its_own(
    folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    app, clock = App(folder, stall_timeout_s=5, queue_timeout_s=10), Clock(monkeypatch)
    watching = asyncio.create_task(app.sessions.watch())
    responses = await serve_in_turn(app, clock, 4, 3.6)
    watching.cancel()
    assert [response.status_code for response in responses] == [200, 200, 503, 503]
    error = error_of(responses[2], 503)
    assert error["code"] == "queue_timeout"
    assert "WISP_QUEUE_TIMEOUT_S" in error["message"]
    assert responses[2].headers["retry-after"] == "10"
    await eventually(lambda: len(app.services.cancelled) == 2)


async def test_a_session_on_which_nobody_works_stalls_beside_others(
    folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    app, clock = App(folder, stall_timeout_s=5), Clock(monkeypatch)
    watching = asyncio.create_task(app.sessions.watch())
    app.script = Script(text="", ends=False)
    stuck = asyncio.create_task(app.chat())
    await eventually(lambda: len(app.generated) == 1)
    app.script = Script()
    for _ in range(14):
        await clock.skip(0.9)
        assert (await app.chat()).status_code == 200
    error = error_of(await asyncio.wait_for(stuck, HANG_S), 504)
    watching.cancel()
    assert error["code"] == "timeout"


async def test_a_pause_of_the_process_is_no_stall(folder: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    app, clock = App(folder, stall_timeout_s=5), Clock(monkeypatch)
    app.services.draft = None
    watching = asyncio.create_task(app.sessions.watch())
    asking = asyncio.create_task(app.chat())
    await eventually(lambda: len(app.generated) == 1)
    for _ in range(3):
        await clock.pause(40)
    await app.work(app.generated[0])
    assert (await asking).status_code == 200
    stuck = asyncio.create_task(app.chat())
    await eventually(lambda: len(app.generated) == 2)
    await clock.skip(6)
    watching.cancel()
    assert error_of(await stuck, 504)["code"] == "timeout"


async def test_the_backlog_of_other_gateways_is_waited_for(
    folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    app, clock = App(folder, stall_timeout_s=5), Clock(monkeypatch)
    app.services.draft = None
    watching = asyncio.create_task(app.sessions.watch())
    asking = asyncio.create_task(app.chat())
    await eventually(lambda: len(app.generated) == 1)
    await app.sessions.receive(builders.load(backlog_ms=4000.0, verifiers=1))
    await clock.skip(11)
    assert not asking.done()
    await clock.skip(4)
    watching.cancel()
    assert error_of(await asking, 504)["code"] == "timeout"


async def test_waiting_behind_another_gateways_sessions_is_no_stall(
    folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    app, clock = App(folder, stall_timeout_s=5), Clock(monkeypatch)
    app.services.draft = None
    other = MemoryTransport(app.services, "other")
    await other.start(builders.generate("older", gateway="other"), topology.DEFAULT_POOL)
    watching = asyncio.create_task(app.sessions.watch())
    asking = asyncio.create_task(app.chat())
    await eventually(lambda: len(app.generated) == 2)
    await other.start(builders.generate("younger", gateway="other"), topology.DEFAULT_POOL)
    for session_id, passes_s in (("older", 13.5), ("younger", 1.8)):
        for _ in range(round(passes_s / 0.9)):
            await app.services.commit(session_id, [7])
            await clock.skip(0.9)
        assert not asking.done()
    await clock.skip(4.5)
    watching.cancel()
    assert error_of(await asking, 504)["code"] == "timeout"


async def test_a_session_without_results_is_answered_from_its_state(folder: ModelFolder) -> None:
    app = App(folder, idle_check_s=0.1)
    app.silent = True
    watching = asyncio.create_task(app.sessions.watch())
    response = await app.chat()
    watching.cancel()
    assert response.json()["choices"][0]["message"]["content"] == app.script.text


def delay_start(app: App, monkeypatch: pytest.MonkeyPatch, delay_s: float) -> None:
    """Let every session take this long to be stored."""
    start = app.transport.start

    async def slow(generate: Generate, pool: str, resume_record: bytes = b"") -> None:
        await asyncio.sleep(delay_s)
        await start(generate, pool, resume_record)

    monkeypatch.setattr(app.transport, "start", slow)


async def test_sessions_that_are_stored_late_are_not_lost(folder: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    app = App(folder, idle_check_s=0.1)
    delay_start(app, monkeypatch, 0.6)
    watching = asyncio.create_task(app.sessions.watch())
    response = await app.chat(n=3)
    watching.cancel()
    assert [choice["message"]["content"] for choice in response.json()["choices"]] == [app.script.text] * 3


async def test_a_session_that_ends_while_it_is_stored_is_cancelled(
    folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = App(folder)
    app.services.draft = None
    start = app.transport.start

    async def unconfirmed(generate: Generate, pool: str, resume_record: bytes = b"") -> None:
        await start(generate, pool, resume_record)
        await asyncio.Event().wait()  # as long as RabbitMQ is frozen

    monkeypatch.setattr(app.transport, "start", unconfirmed)
    asking = asyncio.create_task(app.chat())
    await eventually(lambda: app.sessions.running == 1 and bool(app.services.store.sessions))
    await app.sessions.drain(0)
    error = error_of(await asyncio.wait_for(asking, HANG_S), 503)
    assert error["code"] == "shutting_down"
    await eventually(lambda: {one.status for one in app.services.store.sessions.values()} == {SessionStatus.CANCELLED})


async def test_a_crash_is_a_500_with_openais_error_body(app: App) -> None:
    app.services.error = ZeroDivisionError("a defect")
    error = error_of(await app.chat(), 500)
    assert "defect" not in error["message"]


async def test_readiness_names_what_is_missing(app: App) -> None:
    assert (await app.http.get("/ready")).json() == {"ready": True, "parts": {"redis": "ok", "gateway": "ok"}}
    app.upstream.problems = {"redis": None, "verifier": "none"}
    response = await app.http.get("/ready")
    assert response.status_code == 503
    assert response.json() == {"ready": False, "parts": {"redis": "ok", "verifier": "none", "gateway": "ok"}}
    assert (await app.http.get("/health")).status_code == 200


async def test_readiness_names_pools_that_are_served_without_drafters(app: App) -> None:
    await app.sessions.receive(builders.load(without_drafters=["pool"]))
    answer = await app.http.get("/ready")
    assert (answer.status_code, answer.json()["without_drafters"]) == (200, ["pool"])
    await app.sessions.receive(builders.load())
    assert "without_drafters" not in (await app.http.get("/ready")).json()


async def test_readiness_names_no_pool_once_schedulers_are_silent(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.gateway.sessions.LOAD_VALID_S", 0.05)
    await app.sessions.receive(builders.load(without_drafters=["pool"]))
    await asyncio.sleep(0.1)
    assert "without_drafters" not in (await app.http.get("/ready")).json()


async def test_counters_agree_with_the_answers(app: App) -> None:
    before = samples()
    app.script = Script(text="abcdefgh", round_len=3)
    usage = (await app.chat()).json()["usage"]
    summary = (await app.chat(wisp={"trace": True})).json()["wisp"]["summary"]
    values = grown(before)
    label = f'{{model_name="{MODEL}"}}'
    assert values[f"wisp_prompt_tokens_total{label}"] == 2 * usage["prompt_tokens"]
    assert values[f"wisp_generation_tokens_total{label}"] == 2 * usage["completion_tokens"] == 16
    assert values[f"wisp_spec_decode_num_drafts_total{label}"] == 2 * summary["rounds"]
    assert values[f"wisp_spec_decode_num_draft_tokens_total{label}"] == 2 * summary["verified"]
    assert values[f"wisp_spec_decode_num_accepted_tokens_total{label}"] == 2 * summary["accepted"] == 12
    by_position = "wisp_spec_decode_num_accepted_tokens_per_pos_total"
    assert [values[f'{by_position}{{model_name="{MODEL}",position="{n}"}}'] for n in (0, 1)] == [6, 6]
    assert values[f'wisp_request_success_total{{finished_reason="stop",model_name="{MODEL}"}}'] == 2
    assert values[f"wisp_num_requests_running{label}"] == 0
    assert values[f"wisp_time_to_first_token_seconds_count{label}"] == 2
    assert values[f"wisp_e2e_request_latency_seconds_count{label}"] == 2


VALUE = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | st.sampled_from(["", "user", MODEL, "\u2028x"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "trace", "draft"]), inner, max_size=3)
    ),
    max_leaves=8,
)
NAMES = ["model", "messages", "prompt", "stream", "n", "stop", "seed", "max_tokens", "temperature", "wisp", "echo"]


@given(
    fields=st.dictionaries(st.sampled_from(NAMES), VALUE, max_size=4),
    path=st.sampled_from(["/v1/chat/completions", "/v1/completions"]),
)
@hypothesis_settings(
    max_examples=3 * hypothesis_settings.default.max_examples // 2,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
async def test_any_body_is_answered_or_refused(app: App, fields: dict[str, Any], path: str) -> None:
    body = json.dumps(HELLO | {"prompt": "x"} | fields).encode()
    response = await app.http.post(path, content=body)
    if response.status_code != 200:
        error_of(response, response.status_code)
        assert response.status_code in (400, 404)


def test_the_peers_folder_has_one_token_per_byte(folder: ModelFolder) -> None:
    assert len(Tokenizer(folder).encode("a🙂")) == 5
    assert Path(folder.path).name == MODEL


@pytest.fixture
async def guarded(folder: ModelFolder, tmp_path: Path) -> AsyncIterator[tuple[App, str]]:
    """An application with API keys, and a valid key."""
    text, key = new_key("tests", datetime.now(UTC))
    (tmp_path / "keys.json").write_text(render([key]))
    app = App(folder, api_keys_file=tmp_path / "keys.json")
    yield app, text
    await app.http.aclose()


@pytest.mark.parametrize("path", ["/v1/models", "/v1/chat/completions", "/v1/completions", "/metrics", "/nowhere"])
@pytest.mark.parametrize("header", [None, "Bearer wisp-nonsense", "Basic d2lzcA==", "Bearer ", "bearer \xe9", "Bearer"])
async def test_without_a_valid_key_nothing_is_served(guarded: tuple[App, str], path: str, header: str | None) -> None:
    app, _ = guarded
    headers = {} if header is None else {"authorization": header.encode("latin-1")}
    response = await app.http.post(path, json=HELLO, headers=headers)  # type: ignore[arg-type]
    error = error_of(response, 401)
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
    assert response.headers["www-authenticate"] == "Bearer"
    assert app.generated == []


async def test_only_the_exact_key_is_accepted(guarded: tuple[App, str]) -> None:
    app, key = guarded
    good = {"authorization": f"Bearer {key}"}
    assert (await app.http.post("/v1/chat/completions", json=HELLO, headers=good)).status_code == 200
    for wrong in (key[:-1], key + "A", key[:-1] + ("A" if key[-1] != "A" else "B"), key.replace("wisp", "wosp")):
        answer = await app.http.get("/v1/models", headers={"authorization": f"Bearer {wrong}"})
        assert error_of(answer, 401)["code"] == "invalid_api_key"
        assert wrong not in answer.text


async def test_probes_need_no_key_and_get_no_addresses(guarded: tuple[App, str]) -> None:
    app, key = guarded
    app.upstream.problems = {"redis": "10.1.2.3 does not answer"}
    assert (await app.http.get("/health")).status_code == 200
    stranger = await app.http.get("/ready")
    assert stranger.status_code == 503
    assert stranger.json()["parts"] == {"redis": "not ok", "gateway": "ok"}
    holder = await app.http.get("/ready", headers={"authorization": f"Bearer {key}"})
    assert holder.json()["parts"] == {"redis": "10.1.2.3 does not answer", "gateway": "ok"}


async def test_the_gateways_limits_on_prompt_and_output_hold(folder: ModelFolder) -> None:
    app = App(folder, max_prompt_tokens=40, max_output_tokens=5)
    short = {"model": MODEL, "prompt": "Hi"}
    long = await app.http.post("/v1/completions", json=short | {"prompt": "x" * 41, "max_tokens": 5})
    assert error_of(long, 400)["code"] == "context_length_exceeded"
    assert (
        f"maximum context length is {CONTEXT} tokens, and prompts here may have 40 of"
        in long.json()["error"]["message"]
    )
    much = await app.http.post("/v1/completions", json=short | {"max_tokens": 6})
    assert error_of(much, 400)["param"] == "max_tokens"
    assert (await app.http.post("/v1/completions", json=short | {"max_tokens": 5})).status_code == 200
    assert (await app.http.post("/v1/completions", json=short)).status_code == 400  # OpenAI's default is 16
    await app.chat(messages=[{"role": "user", "content": ""}])
    assert [generate.max_tokens for generate in app.generated] == [5, 5]
    await app.http.aclose()


@pytest.mark.parametrize(("setting", "sampling"), [("auto", (0.6, 0.9, 20)), ("ignore", (1.0, 1.0, 0))])
async def test_requests_default_to_the_models_sampling(
    tmp_path: Path, setting: str, sampling: tuple[float, float, int]
) -> None:
    folder = tiny_target(tmp_path / MODEL)
    (folder.path / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 0.9, "top_k": 20}')
    app = App(ModelFolder(folder.path), generation_config=setting)
    assert (await app.chat(max_tokens=1)).status_code == 200
    assert (await app.chat(max_tokens=1, temperature=0)).status_code == 200
    named = [generate.sampling for generate in app.generated]
    assert (named[0].temperature, named[0].top_p, named[0].top_k) == sampling
    assert named[1].temperature == 0


async def test_the_tokens_of_a_chat_have_log_probabilities(app: App) -> None:
    app.script = Script("Hello", round_len=2)
    client = openai.AsyncOpenAI(api_key="none", base_url="http://127.0.0.1:8000/v1", http_client=app.http)
    messages: Any = HELLO["messages"]
    answer = await client.chat.completions.create(model=MODEL, messages=messages, logprobs=True, top_logprobs=2)
    (choice,) = answer.choices
    start = len(app.generated[-1].prompt)
    assert choice.logprobs is not None
    content = choice.logprobs.content or []
    assert [one.token for one in content] == list("Hello")
    assert [one.logprob for one in content] == [-(start + i) / 8 for i in range(5)]
    assert all(len(one.top_logprobs) == 2 for one in content)
    streamed = await client.chat.completions.create(model=MODEL, messages=messages, logprobs=True, stream=True)
    parts = [chunk.choices[0] async for chunk in streamed if chunk.choices]
    assert [one.token for part in parts if part.logprobs for one in part.logprobs.content or []] == list("Hello")
    assert "".join(part.delta.content or "" for part in parts) == "Hello"


@pytest.mark.parametrize("silent", [False, True])
async def test_an_echo_has_those_of_the_prompt(folder: ModelFolder, silent: bool) -> None:
    """lm-eval's requests. Records of lost results come from Redis, as their tokens do."""
    app = App(folder, idle_check_s=0.05)
    app.silent = silent
    app.script = Script("yes", ends=False)
    watching = asyncio.create_task(app.sessions.watch())
    body = {"model": MODEL, "prompt": "abc", "echo": True, "logprobs": 1}
    for max_tokens, text in ((0, "abc"), (1, "abcy")):
        answer = await app.http.post("/v1/completions", json=body | {"max_tokens": max_tokens})
        (choice,) = answer.json()["choices"]
        assert (choice["text"], choice["finish_reason"]) == (text, "length")
        logprobs = choice["logprobs"]
        assert logprobs["tokens"] == list(text)
        assert logprobs["token_logprobs"] == [None, *(-at / 8 for at in range(1, len(text)))]
        assert logprobs["text_offset"] == list(range(len(text)))
        assert logprobs["top_logprobs"][0] is None
        assert answer.json()["usage"]["completion_tokens"] == max_tokens
    watching.cancel()


async def test_an_echo_in_a_stream_has_them_with_its_text(app: App) -> None:
    app.script = Script("yes", round_len=1)
    body = {"model": MODEL, "prompt": "abc", "echo": True, "logprobs": 0, "stream": True}
    lines = (await app.http.post("/v1/completions", json=body)).text.splitlines()
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    tokens, offsets = [], []
    for chunk in chunks:
        if (logprobs := chunk["choices"][0]["logprobs"]) is not None:
            tokens += logprobs["tokens"]
            offsets += logprobs["text_offset"]
    assert (tokens, offsets) == (list("abcyes"), list(range(6)))


async def test_prompt_logprobs_are_those_of_vllm(app: App) -> None:
    app.script = Script("y")
    body = {"model": MODEL, "prompt": "abc", "prompt_logprobs": 1}
    (choice,) = (await app.http.post("/v1/completions", json=body)).json()["choices"]
    first, *others = choice["prompt_logprobs"]
    assert first is None
    assert [[one["decoded_token"] for one in position.values()] for position in others] == [["b"], ["c"]]
    answer = (await app.chat(prompt_logprobs=0)).json()
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]


async def test_a_resumed_stream_has_the_log_probabilities_of_its_rest(app: App) -> None:
    app.script = Script("Hello", round_len=1)
    body = HELLO | {"logprobs": True, "stream": True, "wisp": {"resumable": True}}
    first = (await app.http.post("/v1/chat/completions", json=body)).text
    events = [event for event in first.split("\n\n") if event.startswith("id: ")]
    last_id = events[2].splitlines()[0].removeprefix("id: ")
    rest = await app.http.get(f"/v1/streams/{last_id.split('/')[0]}", headers={"last-event-id": last_id})
    for text in (first, rest.text):
        chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        choices = [choice for chunk in chunks for choice in chunk["choices"]]
        shown = "".join(choice["delta"].get("content", "") for choice in choices)
        contents = [choice["logprobs"]["content"] for choice in choices if choice["logprobs"]]
        assert "".join(one["token"] for content in contents for one in content) == shown
    assert shown == "llo"


async def test_texts_and_conversations_are_tokenized(app: App) -> None:
    made = (await app.http.post("/tokenize", json={"prompt": "ab", "return_token_strs": True})).json()
    ids = app.tokenizer.encode("ab")
    assert made == {"count": 2, "max_model_len": CONTEXT, "tokens": ids, "token_strs": ["a", "b"]}
    chat = (await app.http.post("/tokenize", json=HELLO)).json()
    assert chat["tokens"] == app.tokenizer.render_chat(HELLO["messages"])
    open_ = (await app.http.post("/tokenize", json=HELLO | {"add_generation_prompt": False})).json()
    assert chat["tokens"][: open_["count"]] == open_["tokens"] != chat["tokens"]
    assert (await app.http.post("/detokenize", json={"tokens": ids})).json() == {"prompt": "ab"}
    for path, body, status in (
        ("/detokenize", {"tokens": [10**6]}, 400),
        ("/detokenize", {"tokens": "x"}, 400),
        ("/detokenize", {"tokens": None}, 400),
        ("/tokenize", {}, 400),
        ("/tokenize", {"prompt": "a", "model": "gpt-9"}, 404),
    ):
        error_of(await app.http.post(path, json=body), status)


async def test_an_answer_may_continue_the_last_message(app: App) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well, "}]
    answer = await app.chat(messages=messages, continue_final_message=True, add_generation_prompt=False)
    assert answer.status_code == 200
    assert app.tokenizer.decode(app.generated[-1].prompt).endswith("Well, ")
    with_prompt = await app.chat(messages=messages)
    assert with_prompt.json()["usage"]["prompt_tokens"] > answer.json()["usage"]["prompt_tokens"]


async def test_variables_that_the_template_lacks_are_refused(app: App) -> None:
    for options, param in (
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ):
        error = error_of(await app.chat(**options), 400)
        assert (error["code"], error["param"]) == ("unsupported_parameter", param)


THINKING = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}"
    "<think></think>{% elif reasoning_effort %}({{ reasoning_effort }})<think>{% endif %}{% endif %}"
)


async def thinking_app(path: Path, template: str = THINKING, *, tags: str = "tokens") -> App:
    """Return the gateway of a model whose template knows reasoning. tags: what they are in its vocabulary."""
    folder = tiny_target(path / MODEL)
    (folder.path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return App(ModelFolder(folder.path) if tags == "text" else with_tags(folder, special=tags == "control tokens"))


@pytest.mark.parametrize("tags", ["text", "tokens", "control tokens"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("options", "text", "reasoning", "content"),
    [
        ({}, "<think>why</think>so", "why", "so"),
        ({"reasoning_effort": "low"}, "why</think>so", "why", "so"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "so</think>", "", "so</think>"),
        ({}, "<think>why", "why", ""),
    ],
)
async def test_reasoning_is_apart_from_the_content(
    tmp_path: Path, tags: str, stream: bool, options: dict[str, Any], text: str, reasoning: str, content: str
) -> None:
    thinker = await thinking_app(tmp_path, tags=tags)
    thinker.script = Script(text, round_len=2)
    answer = await thinker.chat(stream=stream, stream_options={"include_usage": True}, **options)
    chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    usage = (chunks[-1] if stream else answer.json())["usage"]
    assert usage["completion_tokens_details"] == {"reasoning_tokens": len(reasoning)}
    if not stream:
        message = answer.json()["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == (reasoning or None, content)
        return
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == reasoning
    assert "".join(delta.get("content", "") for delta in deltas) == content


@pytest.mark.parametrize("tags", ["tokens", "control tokens"])
async def test_a_budget_of_reasoning_begins_where_the_reasoning_does(tmp_path: Path, tags: str) -> None:
    thinker = await thinking_app(tmp_path, tags=tags)
    (opening,), (closing,) = (thinker.tokenizer.encode_part(tag) for tag in TAGS)
    blank = [token for space in "\n\r\t \v\f\x1c\x1d\x1e\x1f" for token in thinker.tokenizer.encode_plain(space)]
    begins = ReasoningBudget(most=7, opening=opening, blank=sorted(blank), closing=closing)
    opened = ReasoningBudget(most=7, opening=None, closing=closing)
    for options, budget in (({}, begins), ({"reasoning_effort": "low"}, opened)):
        assert (await thinker.chat(thinking_token_budget=7, **options)).status_code == 200
        rules = thinker.generated[-1].sampling.rules
        assert rules is not None
        assert rules.reasoning == budget


async def test_the_vocabulary_is_read_in_a_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    thinker, readers = await thinking_app(tmp_path, tags="tokens"), list[threading.Thread]()

    def found(self: Tokenizer) -> list[int]:
        readers.append(threading.current_thread())
        return []

    blank_ids = cached_property(found)
    blank_ids.__set_name__(Tokenizer, "blank_ids")
    monkeypatch.setattr(Tokenizer, "blank_ids", blank_ids)
    assert (await thinker.chat(thinking_token_budget=7)).status_code == 200
    (reader,) = readers
    assert reader is not threading.main_thread()


async def test_a_budget_is_refused_where_tags_are_no_tokens(app: App, tmp_path: Path) -> None:
    for one, reason in ((app, "marks no reasoning"), (await thinking_app(tmp_path, tags="text"), "no tokens")):
        error = error_of(await one.chat(thinking_token_budget=7), 400)
        assert (error["code"], error["param"]) == ("unsupported_parameter", "thinking_token_budget")
        assert reason in error["message"]


async def test_metrics_of_speculation_come_where_asked_for(app: App) -> None:
    assert "metrics" not in (await app.chat()).json()
    metrics = (await app.chat(wisp={"metrics": True})).json()["metrics"]["speculative_decoding"]
    assert metrics["num_accepted_draft_tokens"] == sum(i * n for i, n in enumerate(metrics["acceptance_histogram"]))
    assert metrics["num_spec_steps"] == sum(metrics["acceptance_histogram"]) > 0
    assert (await app.chat(wisp={"metrics": True}, n=2)).json()["metrics"] is None
    for options in ({}, {"stream_options": {"include_usage": True}}):
        text = (await app.chat(wisp={"metrics": True}, stream=True, **options)).text
        chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        assert [chunk["metrics"]["speculative_decoding"] for chunk in chunks if "metrics" in chunk] == [metrics]


async def test_usage_counts_predicted_tokens(app: App) -> None:
    app.script = Script("Hello there")
    prediction = {"type": "content", "content": "Hello where"}
    usage = (await app.chat(prediction=prediction)).json()["usage"]
    assert usage["completion_tokens_details"] == {
        "reasoning_tokens": 0,
        "accepted_prediction_tokens": 10,
        "rejected_prediction_tokens": 1,
    }
    assert app.generated[-1].prediction == app.tokenizer.encode("Hello where")
    assert (await app.chat()).json()["usage"]["completion_tokens_details"] == {"reasoning_tokens": 0}
