"""A gateway with its page on a port of its own, for tests in a browser: an answer at a pace, and a fleet made up."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import builders
from gateway_app import App
from gateway_peer import results_of

from services.gateway.app import create_app
from services.gateway.page.feed import FleetFeed
from services.gateway.server import listen, serve_http
from shared.broker.incoming import Handler
from shared.messages import ClassLoad, Generate, Message, Result
from shared.models.folder import ModelFolder

SOURCES = ("lookup", "hidden")


class MadeUpFleet:
    """Messages of a fleet: batches at a rate, over some sessions."""

    def __init__(self, batches_per_s: float = 20.0, sessions: int = 12, verifiers: int = 2, jobs: int = 4) -> None:
        self.batches_per_s = batches_per_s
        self.sessions = sessions
        self.verifiers = verifiers
        self.jobs = jobs
        self.listeners = 0
        self.connections = 0
        """Number of times that somebody began to listen."""
        self.problem: Exception | None = None

    async def listen(self, receive: Handler, listening: Callable[[], None]) -> None:
        if self.problem is not None:
            raise self.problem
        self.listeners += 1
        self.connections += 1
        try:
            listening()
            await self._speak(receive)
        finally:
            self.listeners -= 1

    async def _speak(self, receive: Handler) -> None:
        loop = asyncio.get_running_loop()
        started_s, sent = loop.time(), 0
        while True:
            due = math.ceil((loop.time() - started_s) * self.batches_per_s)
            for number in range(sent, due):
                for message in self._batch(number):
                    await receive(message)
            if sent == 0 or int(due / self.batches_per_s * 2) != int(sent / self.batches_per_s * 2):
                for message in self._state():
                    await receive(message)
            sent = due
            await asyncio.sleep(0.02)

    def _batch(self, number: int) -> list[Result]:
        verifier, span_ms = number % self.verifiers, 800 * self.verifiers / self.batches_per_s
        sessions = [(number * self.jobs + job) % self.sessions for job in range(1 + number % self.jobs)]
        return [
            builders.result(
                f"chatcmpl-{session:024x}",
                number,
                3,
                [1, 2, 3],
                verifier=f"verifier-{verifier}",
                batch=f"batch-{number}",
                accepted=2,
                trimmed_to=3,
                drafted=4,
                draft_ms=2.5,
                queue_ms=1.5,
                verify_ms=span_ms * (0.7 + 0.3 * (number % 5) / 5),
                predicted_ms=span_ms * 0.85,
            )
            for session in sessions
        ]

    def _state(self) -> list[Message]:
        classes = [
            ClassLoad(service_class="default", sessions=self.sessions, waiting=3, queue_ms=4.5, slack_ms=38.0),
            ClassLoad(service_class="priority", sessions=2, waiting=1, queue_ms=1.5, slack_ms=-6.0),
        ]
        return [
            *(
                builders.heartbeat(f"verifier-{i}", {f"s{s}": 1 for s in range(self.sessions)}, free_tokens=6200)
                for i in range(self.verifiers)
            ),
            *(builders.cost_model(f"verifier-{i}", ratio_p50=1.02) for i in range(self.verifiers)),
            builders.drafter_heartbeat("drafter-0", sessions=self.sessions),
            builders.drafter_heartbeat("scheduler-0", sessions=2, drafts=False),
            builders.load(0.2, classes=classes, policy="wisp", utilization=0.41, pending=4, queue_ms=3.5),
        ]


class PacedApp(App):
    """The application of the tests, whose rounds come one after another and name their sources."""

    def __init__(self, folder: ModelFolder, fleet: MadeUpFleet | None = None, **fields: Any) -> None:
        super().__init__(folder, **fields)
        self.pause_s = 0.01
        self.fleet = fleet or MadeUpFleet()
        self.feed = FleetFeed(self.fleet)
        self.gateway = replace(self.gateway, feed=self.feed)
        self.asgi = create_app(self.gateway)
        self._working: set[asyncio.Task[None]] = set()

    async def work(self, message: Message) -> None:
        assert isinstance(message, Generate)
        task = asyncio.create_task(self._answer(message))
        self._working.add(task)
        task.add_done_callback(self._working.discard)

    async def _answer(self, generate: Generate) -> None:
        plain = generate.draft == "none"
        script = replace(self.script, round_len=1, rejected=0, trimmed=0) if plain else self.script
        for result in results_of(generate, script, self.tokenizer):
            await asyncio.sleep(self.pause_s)
            sources = [SOURCES[result.round % 2]] * result.trimmed_to if generate.trace else []
            if result.tokens:
                await self.services.commit(generate.session, result.tokens, result.finish)
            await self.services.publish("g", result.model_copy(update={"sources": sources, "predicted_ms": 1.0}))


@asynccontextmanager
async def served(app: App) -> AsyncIterator[str]:
    """Serve an application on loopback, and give its address without a slash at the end."""
    listener, stop = listen("127.0.0.1", 0), asyncio.Event()
    port = listener.getsockname()[1]

    async def drain() -> None:
        if app.gateway.feed is not None:
            app.gateway.feed.closed = True

    serving = asyncio.create_task(serve_http(app.asgi, listener, stop, app.sessions.watch(), drain=drain))
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        stop.set()
        await serving
