"""`wisp bench gateway`: streams of a gateway with real RabbitMQ and Redis, and a stub in place of the other services.

The stub takes the requests from the drafters' queue. At a fixed rate it publishes results of one token each, in groups
like those of a verifier's batches. No model runs, so the figures are those of one gateway process. On each stream, a
new request follows when the previous one has ended.

The time of a token runs from its result's publication to its event at the client. The stub gets a copy of each group
over the same exchange; the time from the copy to the event is what the gateway adds. Stub and clients share a process,
whose own delays are in these times.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated, Any
from urllib.parse import urlsplit

import psutil
import typer

from services.tools.bench.support.options import StreamsOption, run_program, target_folder, whole_numbers
from services.tools.bench.support.report import report, terminal
from services.tools.bench.support.words import random_words
from services.tools.cli.shared_options import TargetOption
from services.tools.cli.terminal import errors_shown, run
from services.tools.local.brokers import Brokers
from services.tools.local.progress import ConsoleProgress, Progress
from services.tools.local.stack import Stack
from shared.broker import topology
from shared.broker.client import Broker
from shared.broker.topology import Topology
from shared.errors import WispError
from shared.messages import Finish, Generate, Heartbeat, Message, Result, Status
from shared.models.folder import AUTO, ModelFolder
from shared.models.text import Tokenizer
from shared.state.store import Store

STUB = "bench"
AIM_RATE, AIM_MS = 2_000, 20.0
"""Tokens a second, and the 99th percentile of the time that the gateway adds."""
BEAT_S = 0.5
WARM_UP_S = 3.0
START_S = 60.0
"""Longest time until all streams have begun."""
MARK = b'"delta":{"content":"'
"""Start of the text in an event. The event with the role has no text."""
ID = b'"id":"'
RETRY_S = 1.0
LOOKS = 20
"""Looks at the gateway's memory during a rate: it has to stay flat over hours."""
COLUMNS = [
    "tokens/s",
    "received",
    "median ms",
    "99 % ms",
    "added, median ms",
    "added, 99 % ms",
    "gateway, % of a core",
    "us of CPU a token",
    "MB before",
    "MB after",
    "MB, largest",
    "refused",
]


@dataclass
class SentTokens:
    """Times of the tokens of the running sessions, in seconds of `time.perf_counter`."""

    at_s: dict[str, list[tuple[float, str]]] = field(default_factory=dict)
    """By session: the time at which each token was published, and its batch."""
    copied_s: dict[str, float] = field(default_factory=dict)
    """By batch: the time at which its copy arrived."""
    since_s: float = float("inf")
    """Tokens published before do not count."""
    refused: int = 0
    """Requests that the gateway refused while times were taken."""
    took_ms: list[float] = field(default_factory=list)
    added_ms: list[float] = field(default_factory=list)

    def over(self, session_id: str) -> None:
        """Forget a session's tokens, all of which have been received."""
        self.at_s.pop(session_id, None)

    def received(self, session_id: str, number: int, now_s: float) -> None:
        """Record the arrival of a session's token at its client."""
        sent_s, batch = self.at_s[session_id][number]
        if sent_s >= self.since_s:
            self.took_ms.append((now_s - sent_s) * 1000)
            self.added_ms.append((now_s - self.copied_s.get(batch, now_s)) * 1000)


class StreamClient(asyncio.Protocol):
    """Sends one request and records the time of each event with text. It parses as little as possible."""

    def __init__(self, request: bytes, sent: SentTokens) -> None:
        self._request = request
        self._sent = sent
        self._session_id = ""
        self._number = 0
        self._rest = b""
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the request."""
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Record the events that end in these bytes."""
        now_s = time.perf_counter()
        text = self._rest + data
        if not self._session_id:
            _, found, after = text.partition(ID)
            if not found or b'"' not in after:
                self._rest = text
                return
            self._session_id = after[: after.index(b'"')].decode()
        for _ in range(text.count(MARK)):
            self._sent.received(self._session_id, self._number, now_s)
            self._number += 1
        last = text.rfind(MARK)
        self._rest = text[max(last + len(MARK) if last >= 0 else 0, len(text) - len(MARK) + 1) :]

    def connection_lost(self, error: Exception | None) -> None:
        """End the stream."""
        self._sent.over(self._session_id)
        if not self._session_id and error is None:
            error = WispError(f"the gateway answered {self._rest[:300]!r}")
        if self.ended.done():
            return
        self.ended.set_exception(error) if error else self.ended.set_result(None)


class ServicesStub:
    """Replaces drafters, scheduler and verifiers: gives a token to each session in turn."""

    def __init__(self, broker: Broker, store: Store, fingerprint: str, words: list[int], answer: int) -> None:
        """words: ids of the tokens to send. answer: tokens of each answer."""
        self._broker = broker
        self._store = store
        self._words = words
        self._answer = answer
        self._sessions: deque[tuple[Generate, int]] = deque()
        """Running sessions with the number of their tokens, in the order of their turns."""
        self._begun: set[str] = set()
        self.sent = SentTokens()
        self.tokens = 0
        self._heartbeat = Heartbeat(
            verifier=STUB, fingerprint=fingerprint, max_len=8192, free_tokens=10_000_000, total_tokens=10_000_000
        )

    @property
    def running(self) -> int:
        """Number of running sessions."""
        return len(self._sessions)

    async def listen(self) -> None:
        """Receive requests and the copies of groups."""
        names = self._broker.topology
        await self._store.registry.beat(self._heartbeat)
        await self._broker.consume(names.generate_queue(), self._begin)
        await self._broker.consume(names.own_queue("stub", STUB, (topology.result(STUB),)), self._copied)

    async def beat(self) -> None:
        """Publish heartbeats until cancelled."""
        while True:
            await self._store.registry.beat(self._heartbeat)
            await asyncio.sleep(BEAT_S)

    async def serve(self, rate: int, batch: int, until: Callable[[], bool]) -> None:
        """Publish `rate` tokens a second in groups of `batch`, at most as many as there are streams."""
        next_s = time.perf_counter()
        number = 0
        while not until():
            next_s += batch / rate
            await asyncio.sleep(max(0.0, next_s - time.perf_counter()))
            number += 1
            results = [self._next(f"b{number}") for _ in range(min(batch, len(self._sessions)))]
            if results:
                key, copy = topology.result(results[0][0]), topology.result(STUB)
                await self._broker.publish_group([result for _, result in results], key, cc=(copy,))

    def _next(self, batch_id: str) -> tuple[str, Result]:
        """Return the gateway and the result of the next session's token."""
        generate, number = self._sessions.popleft()
        over = number + 1 == min(self._answer, generate.max_tokens)
        result = Result(
            session=generate.session,
            round=number,
            base_len=len(generate.prompt) + number,
            status=Status.COMMITTED,
            verifier=STUB,
            batch=batch_id,
            tokens=[self._words[(self.tokens + number) % len(self._words)]],
            finish=Finish.LENGTH if over else None,
            cached=len(generate.prompt) + number,
            new_tokens=1,
        )
        self.sent.at_s[generate.session].append((time.perf_counter(), batch_id))
        self.tokens += 1
        if not over:
            self._sessions.append((generate, number + 1))
        return generate.gateway, result

    async def _begin(self, message: Message) -> None:
        assert isinstance(message, Generate)
        if message.session in self._begun:  # RabbitMQ delivers at least once
            return
        self._begun.add(message.session)
        self.sent.at_s[message.session] = []
        self._sessions.append((message, 0))

    async def _copied(self, message: Message) -> None:
        assert isinstance(message, Result)
        self.sent.copied_s.setdefault(message.batch, time.perf_counter())


def main(
    streams: StreamsOption = 200,
    rates: Annotated[str, typer.Option(help="Tokens a second over all streams, comma-separated.")] = "1000,2000,4000",
    batch: Annotated[int, typer.Option(min=1, help="Results in a group.")] = 32,
    answer: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 256,
    seconds: Annotated[float, typer.Option(min=1, help="Duration of each rate.")] = 20.0,
    target: TargetOption = None,
) -> None:
    """Measure the speed of a gateway's streams."""
    with errors_shown():
        progress = ConsoleProgress(terminal())
        folder = target_folder(target, progress)
        asked = whole_numbers("--rates", rates, 1)
        rows = run(lambda: measure(folder, streams, asked, batch, answer, seconds, progress))
        report(
            "gateway",
            "A gateway's streams",
            COLUMNS,
            rows,
            facts={
                "model": folder.name,
                "streams": streams,
                "results in a group": batch,
                "tokens of an answer": answer,
            },
            notes=[
                "a stub publishes the results: no drafter, scheduler or verifier runs",
                *(_aim(row) for row in rows if row[0] == AIM_RATE),
            ],
        )


def _aim(row: list[Any]) -> str:
    met = row[1] >= 0.99 * AIM_RATE and row[5] <= AIM_MS
    return f"aim: {AIM_RATE:,} tokens/s, {AIM_MS:g} ms added at the 99th percentile; {'met' if met else 'missed'}"


async def measure(
    folder: Path,
    streams: int,
    rates: list[int],
    batch: int,
    answer: int,
    seconds: float,
    progress: Progress,
    brokers: Brokers | None = None,
) -> list[list[Any]]:
    """Return a row for each rate. brokers: by default, the suite has its own."""
    env = {"WISP_ADMISSION": "false", "WISP_DTYPE": AUTO, "WISP_MAX_SESSIONS": str(4 * streams)}
    rows = []
    async with Stack(
        "bench-gateway",
        brokers=brokers,
        drafters=0,
        schedulers=0,
        estimators=0,
        verifiers=0,
        target=folder,
        env=env,
        progress=progress,
    ) as stack:
        for rate in rates:
            with progress.step(f"{rate} tokens a second") as step:
                rows.append(await stack.watch(_measure(stack, streams, rate, batch, answer, seconds)))
                step.done(f"{rate} tokens a second: {rows[-1][1]:.0f} received")
    return rows


async def _measure(stack: Stack, streams: int, rate: int, batch: int, answer: int, seconds: float) -> list[Any]:
    model = ModelFolder(stack.target)
    words = Tokenizer(model).encode(random_words(random.Random(0), 500))
    broker = await Broker.connect(stack.brokers.amqp_url, Topology(stack.namespace), STUB)
    store = Store.connect(stack.brokers.redis_url, stack.namespace, 600)
    stub = ServicesStub(broker, store, model.fingerprint(AUTO), words, answer)
    over = False
    try:
        await stub.listen()
        async with asyncio.TaskGroup() as tasks:
            # The first answers are of all lengths: otherwise all streams would end, and ask again, at the same time.
            first = [2 + (answer - 2) * number // streams for number in range(streams)]
            clients = [
                tasks.create_task(_ask(stack, stub.sent, chain([length], repeat(answer)), lambda: over))
                for length in first
            ]
            beating = tasks.create_task(stub.beat())
            try:
                async with asyncio.timeout(START_S):
                    while stub.running < streams:  # noqa: ASYNC110 - polling is enough
                        await asyncio.sleep(0.05)
            except TimeoutError:
                raise WispError(
                    f"only {stub.running} of {streams} streams began within {START_S:g} s; ask for fewer: --streams"
                ) from None
            serving = tasks.create_task(
                stub.serve(rate, min(batch, streams), lambda: over and all(one.done() for one in clients))
            )
            await asyncio.sleep(WARM_UP_S)
            row = [rate, *await _observed(stack, stub, seconds)]
            over = True
            await serving
            beating.cancel()
        return row
    finally:
        await broker.close()
        await store.close()


async def _observed(stack: Stack, stub: ServicesStub, seconds: float) -> list[float]:
    """Observe the streams for `seconds`; return a row without its rate: tokens, latencies and the gateway's costs."""
    process = psutil.Process(stack.processes("gateway")[0].pid)
    began_s, used, memory = time.perf_counter(), process.cpu_times(), process.memory_info().rss
    stub.sent.since_s = began_s
    held = [memory]
    for look in range(1, LOOKS + 1):
        await asyncio.sleep(max(0.0, began_s + seconds * look / LOOKS - time.perf_counter()))
        held.append(process.memory_info().rss)
    spent_s, after = time.perf_counter() - began_s, process.cpu_times()
    took_ms, added_ms = list(stub.sent.took_ms), list(stub.sent.added_ms)
    cpu_s = after.user + after.system - used.user - used.system
    return [
        len(took_ms) / spent_s,
        median(took_ms),
        quantiles(took_ms, n=100)[98],
        median(added_ms),
        quantiles(added_ms, n=100)[98],
        100 * cpu_s / spent_s,
        1e6 * cpu_s / len(took_ms),
        memory / 1e6,
        held[-1] / 1e6,
        max(held) / 1e6,
        stub.sent.refused,
    ]


async def _ask(stack: Stack, sent: SentTokens, lengths: Iterator[int], over: Callable[[], bool]) -> None:
    """Send requests for answers of these lengths, one after the other."""
    address = urlsplit(stack.url)
    head = f"POST {address.path}/chat/completions HTTP/1.1\r\nHost: {address.netloc}\r\nConnection: close\r\n"
    loop = asyncio.get_running_loop()
    while not over():
        body = json.dumps(
            {
                "model": stack.target.name,
                "messages": [{"role": "user", "content": "Write a long text about a river."}],
                "max_tokens": next(lengths),
                "stream": True,
            }
        ).encode()
        request = f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
        _, client = await loop.create_connection(
            partial(StreamClient, request, sent), address.hostname or "", address.port or 0
        )
        try:
            await client.ended
        except WispError:
            # Beside other work RabbitMQ may be too slow for a request; a client sends such a request again.
            if sent.since_s == float("inf"):
                raise
            sent.refused += 1
            await asyncio.sleep(RETRY_S)


if __name__ == "__main__":
    run_program(main, "wisp bench gateway")
