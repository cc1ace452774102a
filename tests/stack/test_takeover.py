"""Another process takes over from a frozen scheduler or a drafter without a network, and its return does no harm.

With a tiny model whose batches take a fixed time, so that answers last while something is frozen or cut; and with
traces, which go on where another process takes over.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from secrets import token_hex
from urllib.parse import urlsplit, urlunsplit

import httpx
import pytest
from asking import Traffic, progressed, watching
from otlp import Receiver, SeenSpan, receiving
from patience import HANG_S

from services.tools.bench.support.relay import DelayRelay
from services.tools.bench.support.tiny import tiny_model
from services.tools.chaos.client import ChaosClient
from services.tools.chaos.core.requests import ChaosRequest, Manner, load
from services.tools.chaos.core.verdicts import RequestVerdict
from services.tools.chaos.reference import References
from services.tools.local.brokers import Brokers
from services.tools.local.process import Process
from services.tools.local.stack import Stack

TOKENS = 64
REQUESTS = 8
BATCH_MS = 25
HEARTBEAT_S = 1
"""RabbitMQ drops a connection without traffic for two of these."""


@dataclass
class Suite:
    """A stack, its traffic, and a client."""

    stack: Stack
    seen: Traffic
    client: ChaosClient
    requests: list[ChaosRequest]
    collector: Receiver

    def ask(self, draft: str = "auto") -> asyncio.Task[set[RequestVerdict]]:
        """Send every request at once; return the completions."""

        async def all_of_them() -> set[RequestVerdict]:
            asked = [replace(request, draft=draft) for request in self.requests]
            return {outcome.verdict for outcome in await asyncio.gather(*map(self.client.ask, asked))}

        self.seen.clear()
        return asyncio.create_task(all_of_them())

    async def ask_and_stop(
        self, stop: Callable[[], object], resume: Callable[[], object], draft: str = "auto", after_s: float = 0.0
    ) -> asyncio.Task[set[RequestVerdict]]:
        """Send every request, and stop something within all answers; return the completions.

        after_s: the answers have not ended so long after the stop.
        """
        for _ in range(5):
            asking = self.ask(draft)
            await progressed(self.seen, REQUESTS + 2)
            stop()
            await asyncio.sleep(after_s)
            if not asking.done():
                return asking
            # This process was slower than the whole suite.
            resume()
            assert await asking == {RequestVerdict.RIGHT}
        pytest.fail("all answers ended before anything was stopped")


@pytest.fixture(scope="module")
def collector() -> Iterator[Receiver]:
    with receiving() as found:
        yield found


@pytest.fixture(scope="module")
async def suite(
    brokers: Brokers, collector: Receiver, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Suite]:
    folder = tiny_model(tmp_path_factory.mktemp("takeover") / "tiny")
    asked = load(7, questions=6, longest=TOKENS)
    references = References(folder, asked.questions, TOKENS)
    requests = [replace(asked.request(0, n), manner=Manner.STREAM, max_tokens=TOKENS) for n in range(REQUESTS)]
    async with (
        Stack(
            "takeover",
            brokers=brokers,
            target=folder,
            schedulers=2,
            env={
                "WISP_THREADS": "1",
                "WISP_ADMISSION": "false",
                "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
                "OTEL_BSP_SCHEDULE_DELAY": "100",
            },
            env_of={
                # Drafters take over from each other here: test_no_drafter.py has schedulers that stand in for them.
                "scheduler": {
                    "WISP_AMQP_URL": f"{brokers.amqp_url}?heartbeat={HEARTBEAT_S}",
                    "WISP_STAND_IN_POOLS": "[]",
                    # In runs a session goes on without its drafter: test_exactness_runs.py and others.
                    "WISP_WITHOUT": '["runs"]',
                },
                "verifier": {
                    "WISP_PROFILE": "false",
                    "WISP_EMULATED_COST": json.dumps([BATCH_MS, 0, 0, 0, 0, 0, 0]),
                },
            },
        ) as stack,
        watching(stack) as seen,
    ):
        yield Suite(stack, seen, ChaosClient(folder.name, lambda: stack.urls, references), requests, collector)


async def test_a_standby_takes_over_from_a_frozen_scheduler(suite: Suite) -> None:
    def active() -> Process:
        (scheduler,) = [one for one in suite.stack.processes("scheduler") if one.name in suite.seen.schedulers]
        return scheduler

    asking = await suite.ask_and_stop(lambda: active().send(signal.SIGSTOP), lambda: active().send(signal.SIGCONT))
    frozen = active()
    try:
        assert await asking == {RequestVerdict.RIGHT}
        assert len(suite.seen.schedulers) == 2
        more = suite.ask()
        await progressed(suite.seen, REQUESTS + 2)
    finally:
        frozen.send(signal.SIGCONT)
    assert await more == {RequestVerdict.RIGHT}
    assert frozen.alive

    def taken_over() -> bool:
        """The rounds that the frozen scheduler swallowed were sent again, and their traces went on with the other."""
        spans = list(suite.collector.spans)
        again = {span.span_id for span in spans if "sent again" in span.events}
        standby = {span.parent_id for span in spans if span.name == "queue" and span.instance != frozen.name}
        return bool(again & standby)

    await until(taken_over)
    assert await suite.ask() == {RequestVerdict.RIGHT}


CLIENT_SPAN = "b7ad6b7169203331"


async def ask_traced(suite: Suite, trace_id: str, tokens: int, **options: object) -> httpx.Response:
    """Ask as a client that has a trace."""
    body = {
        "model": suite.stack.target.name,
        "prompt": [5, 6, 7, 8, 9] * 10,
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0.0,
        "wisp": {"trace": True, "draft": "lookup"},
        **options,
    }
    async with httpx.AsyncClient(timeout=HANG_S) as http:
        headers = {"traceparent": f"00-{trace_id}-{CLIENT_SPAN}-01"}
        return await http.post(f"{suite.stack.url}/completions", json=body, headers=headers)


async def until(holds: Callable[[], object]) -> None:
    """Wait for the spans that processes export from time to time."""
    async with asyncio.timeout(HANG_S):
        while not holds():  # noqa: ASYNC110 - the receiver has no event
            await asyncio.sleep(0.05)


def children(spans: Sequence[SeenSpan], parent: SeenSpan) -> dict[str, str]:
    """Return the names of a span's children, each with its service."""
    return {span.name: span.service for span in spans if span.parent_id == parent.span_id}


async def test_one_request_is_one_trace_with_a_span_for_each_round(suite: Suite) -> None:
    trace_id, collector = token_hex(16), suite.collector
    answer = await ask_traced(suite, trace_id, 24)
    assert answer.status_code == 200, answer.text
    about = answer.json()["wisp"]["summary"]
    await until(lambda: sum(span.name in ("verify", "prefill") for span in collector.of(trace_id)) >= about["rounds"])
    await until(lambda: any(span.parent_id == CLIENT_SPAN for span in collector.of(trace_id)))
    await until(lambda: sum(span.name == "round" for span in collector.of(trace_id)) >= about["rounds"])
    await until(lambda: sum(span.name == "queue" for span in collector.of(trace_id)) >= about["rounds"])
    spans = collector.of(trace_id)
    (request,) = [span for span in spans if span.parent_id == CLIENT_SPAN]
    assert (request.name, request.service, request.kind) == ("POST /v1/completions", "gateway", 2)
    ids = {span.span_id: span for span in spans}
    for span in spans:
        assert span is request or span.parent_id in ids, span
        assert span.start_ns <= span.end_ns
        assert not span.failed, span
    expected = {
        "http.request.method": "POST",
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.model": suite.stack.target.name,
        "gen_ai.request.max_tokens": 24,
        "gen_ai.request.temperature": 0.0,
        "gen_ai.response.id": answer.json()["id"],
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.usage.input_tokens": 50,
        "gen_ai.usage.output_tokens": 24,
    }
    assert {name: request.attributes.get(name) for name in expected} == expected
    assert children(spans, request) == {"admission": "gateway", "completion": "gateway"}
    (completion,) = [span for span in spans if span.name == "completion"]
    assert completion.events == ["first token"]
    assert children(spans, completion) == {"take session": "drafter", "round": "drafter"}
    rounds = sorted((span for span in spans if span.name == "round"), key=lambda span: span.start_ns)
    assert [span.attributes["wisp.round"] for span in rounds] == list(range(about["rounds"]))
    assert sum(span.attributes["wisp.tokens"] for span in rounds) == 24
    assert sum(span.attributes["wisp.accepted"] for span in rounds) == about["accepted"]
    for number, span in enumerate(rounds):
        verify = "verify" if number else "prefill"
        assert children(spans, span) == {"draft": "drafter", "queue": "scheduler", verify: "verifier"}
    texts = [value for span in spans for value in span.attributes.values() if isinstance(value, str)]
    assert answer.json()["choices"][0]["text"] not in texts
    assert {span.resource["service.name"] for span in spans} == {
        f"wisp-{service}" for service in ("gateway", "drafter", "scheduler", "verifier")
    }
    assert collector.paths == {"/v1/traces"}


async def test_the_trace_goes_on_when_the_drafter_is_killed(suite: Suite) -> None:
    stack, trace_id, collector = suite.stack, token_hex(16), suite.collector
    await stack.start("drafter")
    asking = asyncio.create_task(ask_traced(suite, trace_id, 120))
    await until(lambda: any(span.name == "round" for span in collector.of(trace_id)))
    serving = next(span.instance for span in collector.of(trace_id) if span.name == "round")
    (killed,) = [process for process in stack.processes("drafter") if process.name == serving]
    assert not asking.done(), "it must be killed while there is work"
    await stack.stop(killed, signal.SIGKILL)
    answer = await asking
    assert answer.json()["usage"]["completion_tokens"] == 120
    await until(lambda: any(span.parent_id == CLIENT_SPAN for span in collector.of(trace_id)))
    spans = collector.of(trace_id)
    (completion,) = [span for span in spans if span.name == "completion"]
    rounds = [span for span in spans if span.name == "round"]
    assert len({span.instance for span in rounds}) == 2
    assert {span.parent_id for span in rounds} == {completion.span_id}


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def tc(*words: str) -> None:
    subprocess.run(["tc", "qdisc", *words], check=True, capture_output=True)


@dataclass
class Network:
    """A network namespace and its link to this one."""

    name: str
    cable: str
    here: str
    """Address of this end."""

    @property
    def under(self) -> Sequence[str]:
        """Return a command line that runs a command in the namespace."""
        return "ip", "netns", "exec", self.name

    def cut(self) -> None:
        ip("link", "set", self.cable, "down")

    def mend(self) -> None:
        ip("link", "set", self.cable, "up")

    @contextmanager
    def slow(self) -> Iterator[None]:
        """Limit incoming traffic to the speed of an old telephone line."""
        tc("add", "dev", self.cable, "root", "tbf", *["rate", "256kbit", "burst", "8kb", "latency", "400ms"])
        yield
        tc("del", "dev", self.cable, "root")


@pytest.fixture
def network() -> Iterator[Network]:
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("tc") is None:
        pytest.skip("needs root and iproute2, to make a network namespace")
    tag = token_hex(3)
    subnet = f"10.231.{random.randrange(256)}"
    made = Network(f"wisp-{tag}", f"wisp{tag}a", f"{subnet}.1")
    ip("netns", "add", made.name)
    try:
        ip("link", "add", made.cable, "type", "veth", "peer", "name", f"wisp{tag}b", "netns", made.name)
        ip("addr", "add", f"{subnet}.1/30", "dev", made.cable)
        ip("-n", made.name, "addr", "add", f"{subnet}.2/30", "dev", f"wisp{tag}b")
        ip("-n", made.name, "link", "set", f"wisp{tag}b", "up")
        made.mend()
        yield made
    finally:
        ip("netns", "del", made.name)


@asynccontextmanager
async def reachable(network: Network, brokers: Brokers) -> AsyncIterator[dict[str, str]]:
    """Return the brokers' addresses for a process in the namespace."""
    found = {}
    async with AsyncExitStack() as relays:
        for name, url in (("WISP_AMQP_URL", brokers.amqp_url), ("WISP_REDIS_URL", brokers.redis_url)):
            parts = urlsplit(url)
            assert parts.hostname is not None
            assert parts.port is not None
            relay = await relays.enter_async_context(DelayRelay(parts.hostname, parts.port, 0.0, listen=network.here))
            user = parts.netloc.rpartition("@")[0]
            query = f"heartbeat={HEARTBEAT_S}" if parts.scheme == "amqp" else ""
            found[name] = urlunsplit(parts._replace(netloc=f"{user}@{network.here}:{relay.port}", query=query))
        yield found


async def test_a_drafter_behind_a_slow_network_that_then_drops_everything(
    suite: Suite, brokers: Brokers, network: Network
) -> None:
    stack = suite.stack
    async with reachable(network, brokers) as addresses:
        (near,) = stack.processes("drafter")
        (far,) = await stack.start("drafter", 1, addresses, network.under)
        await stack.stop(near)
        with network.slow():
            assert await suite.ask("lookup") == {RequestVerdict.RIGHT}
        assert suite.seen.drafters == {far.name}
        # Shorter than RabbitMQ waits: late, by the same drafter.
        asking = await suite.ask_and_stop(network.cut, network.mend, "lookup", after_s=HEARTBEAT_S)
        network.mend()
        assert await asking == {RequestVerdict.RIGHT}
        assert suite.seen.drafters == {far.name}
        # So long that another one takes over.
        asking = await suite.ask_and_stop(network.cut, network.mend, "lookup")
        (near,) = await stack.start("drafter")
        assert await asking == {RequestVerdict.RIGHT}
        assert suite.seen.drafters == {far.name, near.name}
        network.mend()
        assert await suite.ask() == {RequestVerdict.RIGHT}
        await stack.stop(far)
