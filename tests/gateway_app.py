"""The gateway's application over a transport in memory, for tests without RabbitMQ and Redis."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, NoReturn

import httpx
from gateway_memory import MemoryServices, MemoryTransport
from gateway_peer import CONTEXT, Script, results_of, settings, tiny_target, with_tags
from patience import HANG_S
from prometheus_client import generate_latest

from services.gateway.app import create_app
from services.gateway.core.admission import Admission
from services.gateway.errors import unavailable
from services.gateway.gateway import Gateway
from services.gateway.keys import KeyFile
from services.gateway.ledger import Ledger
from services.gateway.model import ServedModel
from shared.messages import Generate, Message
from shared.messages.logprobs import from_text
from shared.models.folder import ModelFolder

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


def chunks_of(response: httpx.Response) -> list[dict[str, Any]]:
    return [json.loads(event.partition("data: ")[2]) for event in response.text.split("\n\n")[:-2]]


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
