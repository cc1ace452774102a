"""A rolling update: new processes beside the old ones, which then get SIGTERM while streams run. No stream may notice.

One process of each service, so that everything that an old one does has to move. The model is tiny and its batches take
a fixed time, so that streams last while processes come and go.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import httpx
import pytest
from asking import decode, watching
from patience import HANG_S

from services.tools.bench.support.tiny import tiny_model
from services.tools.local.brokers import Brokers
from services.tools.local.process import Process
from services.tools.local.service_commands import STOP_ORDER
from services.tools.local.stack import Stack
from shared.engine import Engine
from shared.messages import Sampling
from shared.models.folder import ModelFolder
from shared.models.text import Tokenizer

TOKENS = 96
BATCH_MS = 25
DRAIN_S = 60
QUESTIONS = ["the quick brown fox", "aaaa bbbb aaaa bbbb", "why is the sky blue?", "0123456789"]
SAMPLINGS = [Sampling(), Sampling(temperature=1.0, seed=7)]
SERVICES = ("gateway", "drafter", "scheduler", "estimator", "verifier")


@dataclass
class Stream:
    """One answer as its client received it; times are seconds of the performance counter."""

    case: int
    url: str
    began_s: float
    tokens: list[int] = field(default_factory=list)
    at_s: list[float] = field(default_factory=list)
    in_runs: int = 0
    """Reports of runs among its results."""
    ended: str = ""
    """The finish reason, or the error."""

    @property
    def longest_gap_s(self) -> float:
        """The longest time without a token."""
        return max(b - a for a, b in pairwise([self.began_s, *self.at_s]))


@dataclass
class Load:
    """Clients that send one streamed request after another to the gateway that accepts them."""

    http: httpx.AsyncClient
    stack: Stack
    prompts: list[list[int]]
    streams: list[Stream] = field(default_factory=list)
    stopping: bool = False

    async def client(self, number: int) -> None:
        case = number
        while not self.stopping:
            stream = Stream(case % (len(self.prompts) * len(SAMPLINGS)), self.stack.urls[-1], time.perf_counter())
            self.streams.append(stream)
            await self._ask(stream)
            case += len(SAMPLINGS) + 1

    async def _ask(self, stream: Stream) -> None:
        prompt, sampling = self.prompts[stream.case // len(SAMPLINGS)], SAMPLINGS[stream.case % len(SAMPLINGS)]
        body = {
            "model": self.stack.target.name,
            "prompt": prompt,
            "max_tokens": TOKENS,
            "stream": True,
            "ignore_eos": True,
            **sampling.model_dump(),
            "wisp": {"trace": True},
        }
        try:
            async with self.http.stream("POST", f"{stream.url}/completions", json=body) as answer:
                async for line in answer.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    event = json.loads(line.removeprefix("data: "))
                    if tokens := event.get("wisp", {}).get("tokens"):
                        stream.tokens += [token["id"] for token in tokens]
                        stream.at_s.append(time.perf_counter())
                    stream.in_runs += sum(one["run"] for one in event.get("wisp", {}).get("rounds", []))
                    if "error" in event:
                        stream.ended = str(event["error"])
                    for choice in event.get("choices", []):
                        stream.ended = choice["finish_reason"] or stream.ended
        except httpx.HTTPError as error:
            stream.ended = repr(error)

    def open(self) -> list[Stream]:
        """Streams with a first token that have not ended."""
        return [stream for stream in self.streams if stream.tokens and not stream.ended]

    async def until_open(self, since_s: float = 0.0) -> None:
        """Wait until each client has a stream with tokens that it requested after a given time."""
        async with asyncio.timeout(HANG_S):
            while len([s for s in self.open() if s.began_s > since_s]) < len(self.prompts):  # noqa: ASYNC110
                await asyncio.sleep(0.02)


@dataclass
class Suite:
    """The stack, the requests, and the target's own completions."""

    stack: Stack
    prompts: list[list[int]]
    expected: list[list[int]]


@pytest.fixture(scope="module")
async def suite(brokers: Brokers, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Suite]:
    folder = ModelFolder(tiny_model(tmp_path_factory.mktemp("models") / "tiny"))
    tokenizer = Tokenizer(folder)
    prompts = [tokenizer.encode(question) for question in QUESTIONS]
    engine = Engine(folder.path, dtype="float32", budget_tokens=1024)
    expected = [decode(engine, prompt, sampling, set(), length=TOKENS) for prompt in prompts for sampling in SAMPLINGS]
    env = {"WISP_DTYPE": "float32", "WISP_THREADS": "1", "WISP_DRAFT_SOURCE": "lookup", "WISP_ADMISSION": "false"}
    env_of = {
        "gateway": {"WISP_DRAIN_S": str(DRAIN_S)},
        "verifier": {"WISP_PROFILE": "false", "WISP_EMULATED_COST": json.dumps([BATCH_MS, 0, 0, 0, 0, 0, 0])},
    }
    async with Stack("test-rolling", brokers=brokers, target=folder.path, env=env, env_of=env_of) as stack:
        yield Suite(stack, prompts, expected)


@pytest.fixture
async def load(suite: Suite) -> AsyncIterator[Load]:
    async with httpx.AsyncClient(timeout=httpx.Timeout(120, connect=10)) as http:
        running = Load(http, suite.stack, suite.prompts)
        clients = [asyncio.create_task(running.client(number)) for number in range(len(suite.prompts))]
        await running.until_open()
        yield running
        running.stopping = True
        await asyncio.gather(*clients)


@pytest.mark.parametrize("updated", [("gateway",), ("verifier",), SERVICES], ids="-".join)
async def test_no_stream_notices_an_update(suite: Suite, load: Load, updated: Sequence[str]) -> None:
    stack = suite.stack
    old = {service: process for service in updated for process in stack.processes(service)}
    old_url = stack.url
    new = dict(zip(updated, await asyncio.gather(*(_started(stack, service) for service in updated)), strict=True))
    await load.until_open()
    crossing, began_s = load.open(), time.perf_counter()
    statuses = await asyncio.gather(
        *(stack.stop(old[service], grace_s=DRAIN_S + 10) for service in STOP_ORDER if service in updated),
        _refuses(load.http, old_url) if "gateway" in updated else asyncio.sleep(0, 0),
    )
    assert set(statuses) == {0}, "an old process did not leave in order"
    async with watching(stack) as seen:
        await load.until_open(time.perf_counter())
        load.stopping = True
        await _ended(load)
    assert len(crossing) == len(suite.prompts)
    assert all(stream.in_runs for stream in crossing), "the update meets runs"
    for stream in load.streams:
        assert stream.ended == "length"
        assert stream.tokens == suite.expected[stream.case]
    for service in updated:
        assert stack.processes(service) == [new[service]]
    assert seen.verifiers == {process.name for process in stack.processes("verifier")}
    assert seen.drafters == {process.name for process in stack.processes("drafter")}
    gap_ms = 1000 * max(stream.longest_gap_s for stream in load.streams if stream.at_s[-1] > began_s)
    print(f"{' '.join(updated)}: {len(load.streams)} streams, {len(crossing)} across; longest gap {gap_ms:.0f} ms")


async def _started(stack: Stack, service: str) -> Process:
    (process,) = await stack.start(service)
    return process


async def _refuses(http: httpx.AsyncClient, url: str) -> int:
    """A draining gateway accepts no new requests; return 0 then."""
    await asyncio.sleep(0.5)
    try:
        return (await http.get(f"{url.removesuffix('/v1')}/ready")).status_code - httpx.codes.SERVICE_UNAVAILABLE
    except httpx.ConnectError:
        return 0


async def _ended(load: Load) -> None:
    async with asyncio.timeout(HANG_S):
        while any(not stream.ended for stream in load.streams):  # noqa: ASYNC110 - a client has no event for it
            await asyncio.sleep(0.02)
