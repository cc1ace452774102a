"""The load generator against a scripted server, and its observer at a real broker."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from patience import HANG_S

from services.drafter.core.profile import LinkProfile
from services.tools.bench.load.client import LoadClient, ServerUnusable, http_client
from services.tools.bench.load.core.measures import Window
from services.tools.bench.load.core.record import Ending
from services.tools.bench.load.drive import PointRun
from services.tools.bench.load.observe import observing
from services.tools.bench.load.workload import Workload, workload_of
from services.tools.local.ports import LOOPBACK
from shared.broker import topology
from shared.broker.client import Broker
from shared.broker.topology import Topology
from shared.cost.model import FALLBACK, shape_of
from shared.messages import Measurement, Sample

CLOSED = workload_of("[[think_s]]\ndistribution = 'constant'\nvalue = 0.01")
OPEN = workload_of("[arrivals]\nprocess = 'poisson'\nrate = 20")


@dataclass
class Server:
    """A minimal OpenAI server: an answer has two tokens, the second after `second_s`."""

    second_s: float = 0.0
    refuses: int = 0
    """Number of first requests that get status 429."""
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[str] = field(default_factory=list)
    running: int = 0
    most_running: int = 0

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                if head.startswith("get"):
                    await self._send(writer, "200 OK", {"data": [{"id": "m"}]})
                    continue
                length = next(line for line in head.splitlines() if line.startswith("content-length:"))
                self.bodies.append(json.loads(await reader.readexactly(int(length.partition(":")[2]))))
                self.headers.append(head)
                if len(self.bodies) <= self.refuses:
                    error = {"error": {"code": "overloaded", "message": "later"}}
                    await self._send(writer, "429 Too Many Requests", error, "retry-after: 60\r\n")
                else:
                    await self._stream(writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _stream(self, writer: asyncio.StreamWriter) -> None:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
            self._event(writer, {"choices": [{"delta": {"content": "a"}}]})
            await writer.drain()
            await asyncio.sleep(self.second_s)
            self._event(writer, {"choices": [{"delta": {"content": "b"}, "finish_reason": "stop"}]})
            writer.write(b"0\r\n\r\n")
            await writer.drain()
        finally:
            self.running -= 1

    @staticmethod
    def _event(writer: asyncio.StreamWriter, fields: dict[str, Any]) -> None:
        data = b"data: " + json.dumps(fields).encode() + b"\r\n\r\n"
        # In two parts, since an event need not arrive in one.
        for part in (data[:9], data[9:]):
            writer.write(b"%x\r\n%s\r\n" % (len(part), part))

    @staticmethod
    async def _send(writer: asyncio.StreamWriter, status: str, fields: dict[str, Any], headers: str = "") -> None:
        body = json.dumps(fields).encode()
        writer.write(f"HTTP/1.1 {status}\r\n{headers}content-length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()


@asynccontextmanager
async def serving(server: Server) -> AsyncIterator[Server]:
    listening = await asyncio.start_server(server.answer, LOOPBACK, 0)
    server.url = f"http://{LOOPBACK}:{listening.sockets[0].getsockname()[1]}/v1"
    try:
        yield server
    finally:
        listening.close()


async def measured(
    server: Server,
    workload: Workload,
    sessions: int,
    window: Window,
    *,
    pools: bool = False,
    uplinks: dict[str, LinkProfile] | None = None,
) -> PointRun:
    async with http_client(server.url) as http:
        client = await LoadClient.connect(http, pools=pools, uplinks=uplinks)
        point = PointRun(client, workload, workload, sessions, 7, window)
        await point.run()
    return point


async def test_a_session_sends_the_workloads_requests_one_by_one() -> None:
    async with serving(Server()) as server:
        point = await measured(server, CLOSED, 3, Window(warm_up_s=0.1, measure_s=0.9, drain_s=5), pools=True)
    assert server.most_running <= 3
    for session in range(3):
        mine = [one.number for one in point.records if one.session == session]
        assert mine[:2] == [7, 8]
    asked = CLOSED.request(0, 7)
    at = next(i for i, body in enumerate(server.bodies) if body["seed"] == asked.seed)
    body = server.bodies[at]
    assert (body["messages"], body["max_completion_tokens"]) == (asked.messages, asked.max_tokens)
    assert (body["service_tier"], body["wisp"]) == (asked.tier, {"trace": True, "pool": asked.device})
    assert asked.slo is not None
    assert f"x-slo-ttft-ms: {asked.slo.ttft_ms:g}" in server.headers[at]
    whole = [one for one in point.records if one.ending is Ending.COMPLETE]
    assert {one.tokens for one in whole} == {2}
    assert len(whole) >= 6


async def test_open_arrivals_do_not_wait_for_answers() -> None:
    async with serving(Server(second_s=0.5)) as server:
        point = await measured(server, OPEN, 2, Window(warm_up_s=0.0, measure_s=0.5, drain_s=5))
    assert server.most_running > 2
    due = [at_s for at_s, _, _ in until(OPEN.arrivals_s(2, 7), 0.5)]
    counted = sorted(one.start_s for one in point.records if point.window.counts(one.start_s))
    assert counted == pytest.approx(due, abs=1e-3), "times count from when a request was due"


def until(arrivals: Any, end_s: float) -> list[tuple[float, int, int]]:
    found = []
    for arrival in arrivals:
        if arrival[0] >= end_s:
            return found
        found.append(arrival)
    return found


async def test_the_load_continues_until_counted_requests_end() -> None:
    async with serving(Server(second_s=0.4)) as server:
        point = await measured(server, OPEN, 2, Window(warm_up_s=0.0, measure_s=0.5, drain_s=5))
    counted = [one for one in point.records if point.window.counts(one.start_s)]
    assert {one.ending for one in counted} == {Ending.COMPLETE}
    assert max(one.start_s + one.total_ms / 1000 for one in counted) > 0.5
    assert any(one.start_s >= 0.5 for one in point.records), "others arrive meanwhile"


async def test_a_request_past_the_drain_is_cut() -> None:
    async with serving(Server(second_s=60)) as server:
        point = await measured(server, CLOSED, 2, Window(warm_up_s=0.0, measure_s=0.2, drain_s=1.5))
    assert [one.ending for one in point.records] == [Ending.CUT, Ending.CUT]
    assert all(one.arrivals and not one.attained for one in point.records)


async def test_a_request_takes_the_time_of_its_uplink() -> None:
    far, near = CLOSED.hardware(0), CLOSED.hardware(1)
    async with serving(Server()) as server:
        window = Window(warm_up_s=0.0, measure_s=0.8, drain_s=5)
        point = await measured(server, CLOSED, 2, window, uplinks={far: LinkProfile(delay_ms=200, jitter_ms=1)})
    complete = [one for one in point.records if one.ending is Ending.COMPLETE]
    ttfts = {device: [one.ttft_ms or 0 for one in complete if one.device == device] for device in (far, near)}
    assert min(ttfts[far]) >= 200, "the uplink counts in the TTFT"
    assert min(ttfts[near]) < 200
    ways = [one for one in complete if one.device == far]
    assert all(one.lag_ms < one.total_ms - 199 for one in ways), "it is no lag of the generator"
    assert min(one.arrivals[-1][0] - one.arrivals[0][0] for one in ways) < 150, "it delays no single token"


async def test_a_refused_session_waits_for_the_retry_time() -> None:
    async with serving(Server(refuses=1)) as server:
        point = await measured(server, CLOSED, 1, Window(warm_up_s=0.0, measure_s=0.3, drain_s=0.1))
    assert [(one.ending, one.retry_after_s) for one in point.records] == [(Ending.REFUSED, 60.0)]


async def test_a_missing_server_is_named() -> None:
    async with http_client("http://127.0.0.1:9/v1") as http:
        with pytest.raises(ServerUnusable, match=r"127\.0\.0\.1:9/v1/models does not list a model"):
            await LoadClient.connect(http, pools=False)


async def test_the_observer_gets_batches_and_cost_models(amqp_url: str, namespace: str) -> None:
    broker = await Broker.connect(amqp_url, Topology(namespace), "suite")
    batch = Measurement(shape=shape_of([(3, 30, 3)]), measured_ms=40.0)
    try:
        async with observing(amqp_url, namespace) as observer:
            for profile in (True, False):
                await broker.publish(
                    Sample(verifier="v", batches=[batch], profile=profile), topology.SAMPLE, confirmed=True
                )
            for version in (1, 2):
                model = FALLBACK.model_copy(update={"verifier": "v", "version": version})
                await broker.publish(model, topology.costmodel("v"), confirmed=True)
            async with asyncio.timeout(HANG_S):
                while [model.version for model in observer.costs] != [2]:  # noqa: ASYNC110 - it has no event
                    await asyncio.sleep(0.01)
            assert observer.take() == [batch], "a start-up profile is no load"
            assert observer.take() == []
    finally:
        await broker.close()
