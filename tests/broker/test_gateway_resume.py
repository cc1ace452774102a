"""Resuming of broken streams at another gateway or the same one, over RabbitMQ and Redis."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from gateway_peer import Script, eventually
from gateway_suite import MODEL, Start, Suite, answers, free_port, started
from patience import HANG_S

from shared.models.folder import ModelFolder
from shared.state.sessions import SessionStatus

TEXT = "It goes on: naïve 🙂🙃 日本語, word after word, to the very end."


@dataclass
class ConnectionEvents:
    """The events of one connection, with id and fields."""

    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    done: bool = False

    @property
    def last_id(self) -> str:
        return self.events[-1][0]

    def text(self, index: int = 0) -> str:
        choices = [choice for _, fields in self.events for choice in fields["choices"] if choice["index"] == index]
        return "".join(choice.get("text", "") or choice.get("delta", {}).get("content", "") for choice in choices)

    @property
    def finishes(self) -> list[str]:
        return [c["finish_reason"] for _, fields in self.events for c in fields["choices"] if c["finish_reason"]]

    @property
    def tokens(self) -> list[int]:
        return [token["id"] for _, fields in self.events for token in fields.get("wisp", {}).get("tokens", [])]


class Broken(Exception):
    """The stream ended in an error event with this code."""


async def events(response: httpx.Response) -> AsyncIterator[str]:
    """Yield the events of a stream as text."""
    rest = ""
    async for text in response.aiter_text():
        *whole, rest = (rest + text).split("\n\n")
        for event in whole:
            yield event


async def read(stream: AsyncIterator[str], part: ConnectionEvents, until: int | None = None) -> None:
    """Read events up to the end or to the `until`th. Raises Broken or httpx.TransportError."""
    async for event in stream:
        if event == "data: [DONE]":
            part.done = True
            return
        *ids, data = event.split("\n")
        fields = json.loads(data.removeprefix("data: "))
        if "error" in fields:
            raise Broken(fields["error"]["code"])
        (event_id,) = ids
        part.events.append((event_id.removeprefix("id: "), fields))
        if until is not None and len(part.events) >= until:
            return


def body(**more: Any) -> dict[str, Any]:
    options = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 200}
    asked = {} if "messages" in more else {"prompt": "x"}
    return {"model": MODEL, **asked, **options, **more}


async def whole(suite: Suite, path: str = "/v1/completions", **more: Any) -> ConnectionEvents:
    part = ConnectionEvents()
    async with suite.http.stream("POST", path, json=body(**more)) as response:
        await read(events(response), part)
    assert part.done
    return part


async def resumed(http: httpx.AsyncClient, last_id: str, path: str = "/v1/completions") -> ConnectionEvents:
    part = ConnectionEvents()
    async with http.stream("POST", path, json=body(), headers={"last-event-id": last_id}) as response:
        assert response.status_code == 200, await response.aread()
        await read(events(response), part)
    assert part.done
    return part


@pytest.fixture
async def suite(shared: Suite) -> Suite:
    await shared.peer.reset()
    shared.peer.script = Script(text=TEXT, round_len=3)
    return shared


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gateway in this process looks for sessions without a gateway again and again."""
    monkeypatch.setattr("services.gateway.service.REAP_S", 0.2)


@asynccontextmanager
async def process(suite: Suite, namespace: str, target: ModelFolder, urls: tuple[str, str]) -> AsyncIterator[Any]:
    """A gateway's process beside the suite's gateway, and a client of it."""
    port = free_port()
    environment = os.environ | {"WISP_AMQP_URL": urls[0], "WISP_REDIS_URL": urls[1], "WISP_NAMESPACE": namespace}
    environment |= {"WISP_TARGET": str(target.path), "WISP_INSTANCE": "gateway-other", "WISP_RESUME_S": "1"}
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.gateway", "--port", str(port), env=environment
    )
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=HANG_S) as http:
            await answers(http, "/ready")
            yield child, http
    finally:
        if child.returncode is None:
            child.kill()
        await child.wait()


async def test_another_gateway_resumes_a_stream_of_a_killed_one(
    start: Start, namespace: str, target: ModelFolder, amqp_url: str, redis_url: str
) -> None:
    async with start() as suite, process(suite, namespace, target, (amqp_url, redis_url)) as (child, other):
        suite.peer.script = Script(text=TEXT, round_len=2, pause_s=0.05)
        first = ConnectionEvents()
        asked = body(wisp={"trace": True})
        async with other.stream("POST", "/v1/completions", json=asked) as response:
            stream = events(response)
            await read(stream, first, until=4)
            child.send_signal(signal.SIGKILL)
            with pytest.raises(httpx.TransportError):
                await read(stream, first)
        rest = await resumed(suite.http, first.last_id)
        assert first.text()
        assert first.text() + rest.text() == TEXT
        wanted = suite.peer.tokenizer.encode(TEXT)
        assert first.tokens + rest.tokens == wanted
        assert rest.finishes == ["stop"]
        assert rest.events[-1][1]["usage"]["completion_tokens"] == len(wanted)
        assert {fields["id"] for _, fields in first.events} == {fields["id"] for _, fields in rest.events}


async def test_an_uncollected_session_of_a_dead_gateway_is_cancelled(
    start: Start, namespace: str, target: ModelFolder, amqp_url: str, redis_url: str, soon: None
) -> None:
    async with start() as suite, process(suite, namespace, target, (amqp_url, redis_url)) as (child, other):
        suite.peer.script = Script(text="x" * 400, round_len=1, pause_s=0.05)
        asking = asyncio.create_task(other.post("/v1/completions", json=body(stream=False, max_tokens=400)))
        await eventually(lambda: bool(suite.peer.generated))
        child.kill()
        with pytest.raises(httpx.TransportError):
            await asking
        await eventually(lambda: suite.peer.refused == [suite.peer.generated[0].session])


async def test_another_gateway_reaps_a_session_that_nobody_works_on(
    start: Start, namespace: str, target: ModelFolder, amqp_url: str, redis_url: str, soon: None
) -> None:
    async with start() as suite, process(suite, namespace, target, (amqp_url, redis_url)) as (child, other):
        suite.peer.script = Script(pause_s=3600)
        asking = asyncio.create_task(other.post("/v1/completions", json=body(stream=False)))
        await eventually(lambda: bool(suite.peer.generated))
        child.kill()
        with pytest.raises(httpx.TransportError):
            await asking
        name = suite.peer.generated[0].session
        async with asyncio.timeout(HANG_S):
            while (await suite.peer.store.progress(name, 1)).status is not SessionStatus.CANCELLED:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        assert await suite.peer.store._redis.zcard(suite.peer.store._deadlines) == 0


@pytest.mark.parametrize(
    ("path", "options"),
    [
        ("/v1/completions", {"n": 2, "echo": True, "wisp": {"trace": True}}),
        ("/v1/completions", {"stop": ["word after"], "wisp": {"trace": True}}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
    ],
)
async def test_resuming_from_any_event_gives_exactly_the_rest(suite: Suite, path: str, options: dict[str, Any]) -> None:
    full = await whole(suite, path, **options)
    count = options.get("n", 1)
    for place, (last_id, _) in enumerate(full.events):
        had = ConnectionEvents(full.events[: place + 1])
        rest = await resumed(suite.http, last_id, path)
        for index in range(count):
            assert had.text(index) + rest.text(index) == full.text(index), last_id
        assert had.tokens + rest.tokens == full.tokens or count > 1
        assert sorted(had.finishes + rest.finishes) == sorted(full.finishes)
        usages = [fields["usage"] for part in (had, rest) for _, fields in part.events if fields.get("usage")]
        assert usages == [full.events[-1][1]["usage"]]


async def test_the_client_of_a_resumable_stream_may_come_back(suite: Suite) -> None:
    suite.peer.script = Script(text=TEXT, round_len=2, pause_s=0.05)
    first = ConnectionEvents()
    async with suite.http.stream("POST", "/v1/completions", json=body(wisp={"resumable": True})) as response:
        await read(events(response), first, until=3)
    rest = await resumed(suite.http, first.last_id)
    assert first.text() + rest.text() == TEXT
    assert suite.peer.cancelled == []


async def test_a_resumable_stream_without_a_client_is_cancelled(start: Start) -> None:
    async with start(resume_s=1) as suite:
        suite.peer.script = Script(text="x" * 400, round_len=1, pause_s=0.05)
        part = ConnectionEvents()
        asked = body(max_tokens=400, wisp={"resumable": True})
        async with suite.http.stream("POST", "/v1/completions", json=asked) as response:
            await read(events(response), part, until=3)
        await eventually(lambda: suite.peer.refused == [suite.peer.generated[0].session])


async def test_resuming_does_not_prolong_the_stall_timeout(start: Start) -> None:
    async with start(stall_timeout_s=2) as suite:
        suite.peer.script = Script(text="and then silence", ends=False)
        asked = body(wisp={"resumable": True})
        part = ConnectionEvents()
        async with suite.http.stream("POST", "/v1/completions", json=asked) as response:
            await read(events(response), part, until=1)
        codes = []
        for _ in range(8):  # each connection lasts less than the timeout
            try:
                async with asyncio.timeout(0.8):
                    await resumed(suite.http, part.last_id)
            except TimeoutError:
                continue
            except Broken as error:
                codes.append(str(error))
                break
        assert codes == ["timeout"]


async def test_other_streams_are_cancelled_with_their_connection(suite: Suite) -> None:
    suite.peer.script = Script(text="x" * 400, round_len=1, pause_s=0.05)
    part = ConnectionEvents()
    async with suite.http.stream("POST", "/v1/completions", json=body(max_tokens=400)) as response:
        await read(events(response), part, until=3)
    await eventually(lambda: suite.peer.refused == [suite.peer.generated[0].session])
    with pytest.raises(Broken, match="cancelled"):
        await resumed(suite.http, part.last_id)


async def test_the_last_connection_gets_the_stream(suite: Suite) -> None:
    suite.peer.script = Script(text=TEXT, round_len=1, pause_s=0.05)
    first = ConnectionEvents()
    async with suite.http.stream("POST", "/v1/completions", json=body()) as response:
        stream = events(response)
        await read(stream, first, until=3)
        again = asyncio.create_task(resumed(suite.http, first.events[0][0]))
        with pytest.raises(Broken, match="resumed"):
            await read(stream, ConnectionEvents())
    second = await again
    assert ConnectionEvents(first.events[:1]).text() + second.text() == TEXT


async def test_a_stream_can_be_read_by_its_path(suite: Suite) -> None:
    full = await whole(suite)
    name = full.events[0][1]["id"]
    part = ConnectionEvents()
    async with suite.http.stream("GET", f"/v1/streams/{name}") as response:
        await read(events(response), part)
    assert part.text() == TEXT
    wrong = await suite.http.get("/v1/streams/another", headers={"last-event-id": full.last_id})
    assert wrong.status_code == 400


@pytest.mark.parametrize(("last_id", "status", "code"), [("?", 400, "invalid_event_id"), ("x/", 404, "stream_gone")])
async def test_an_unknown_or_invalid_event_id_is_refused(suite: Suite, last_id: str, status: int, code: str) -> None:
    answer = await suite.http.post("/v1/chat/completions", json={}, headers={"last-event-id": last_id})
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


async def test_a_stream_survives_the_drain_of_its_gateway(
    start: Start, amqp_url: str, redis_url: str, namespace: str, target: ModelFolder
) -> None:
    async with start() as suite:
        urls = (amqp_url, redis_url)
        async with started(*urls, namespace, target, peer=suite.peer, instance="gateway-b", drain_s=0.2) as leaving:
            suite.peer.script = Script(text=TEXT, round_len=1, pause_s=0.05)
            first = ConnectionEvents()
            async with leaving.http.stream("POST", "/v1/completions", json=body()) as response:
                stream = events(response)
                await read(stream, first, until=3)
                leaving.stop.set()
                with pytest.raises(Broken, match="shutting_down"):
                    await read(stream, first)
            rest = await resumed(suite.http, first.last_id)
    assert first.text() + rest.text() == TEXT


async def test_the_previous_gateway_does_not_cancel_a_resumed_stream(
    start: Start, amqp_url: str, redis_url: str, namespace: str, target: ModelFolder
) -> None:
    async with (
        start() as suite,
        started(amqp_url, redis_url, namespace, target, peer=suite.peer, instance="gateway-b") as other,
    ):
        suite.peer.script = Script(text=TEXT, round_len=2, pause_s=0.05)
        first = ConnectionEvents()
        async with other.http.stream("POST", "/v1/completions", json=body()) as response:
            stream = events(response)
            await read(stream, first, until=3)
            again = asyncio.create_task(resumed(suite.http, first.last_id))
            await asyncio.sleep(0.2)  # the first connection breaks while the second has the stream
        rest = await again
        assert first.text() + rest.text() == TEXT
        assert suite.peer.cancelled == []
