"""Messages, calls to Redis and CPU time of one token: in rounds, in runs and in centralized serving.

Some streams without drafts run at once on a suite with one process of each service. Messages and calls come from the
services' metrics, CPU time from the processes, brokers included. The use of an idle suite in the same time, above all
for heartbeats, is subtracted.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from services.tools.bench.load.client import LoadClient, http_client
from services.tools.bench.load.core.requests import LoadRequest
from services.tools.local.ports import LOOPBACK, free_ports
from services.tools.local.progress import Progress
from services.tools.local.stack import Stack
from shared.errors import WispError

RUNS, ROUNDS, CENTRALIZED = "runs", "rounds", "centralized"
WAYS = (RUNS, ROUNDS, CENTRALIZED)
"""The ways in which a token is made."""
SERVICES = ("gateway", "drafter", "scheduler", "estimator", "verifier")
IDLE_S = 3.0
"""Time in which the idle suite is measured."""
WARM_UP_TOKENS = 8
PROMPT = "Tell me about the history of {} in as much detail as you can."
SUBJECTS = ("the lighthouse", "the bicycle", "tea", "glass", "the compass", "paper", "bridges", "the clock")
PUBLISHED = "wisp_messages_published_total"
RECEIVED = "wisp_messages_received_total"
REDIS_CALLS = "wisp_redis_calls_total"


@dataclass(frozen=True)
class SuiteUsage:
    """Counts and CPU seconds since the start of the processes."""

    at_s: float
    published: float = 0.0
    received: float = 0.0
    redis_calls: float = 0.0
    cpu_s: Mapping[str, float] = field(default_factory=dict)
    """By process."""

    def since(self, before: SuiteUsage) -> SuiteUsage:
        """Return the usage after `before`; `at_s` is the time between."""
        return SuiteUsage(
            self.at_s - before.at_s,
            self.published - before.published,
            self.received - before.received,
            self.redis_calls - before.redis_calls,
            {name: used - before.cpu_s.get(name, 0.0) for name, used in self.cpu_s.items()},
        )


@dataclass(frozen=True)
class TokenCost:
    """Cost of one token, and the speed at which it was measured."""

    way: str
    tokens: int
    tokens_per_s: float
    published: float
    received: float
    redis_calls: float
    cpu_ms: Mapping[str, float]
    """By process."""

    @property
    def total_cpu_ms(self) -> float:
        """CPU time of all processes."""
        return sum(self.cpu_ms.values())


def token_cost(way: str, tokens: int, idle: SuiteUsage, busy: SuiteUsage) -> TokenCost:
    """Return the cost of a token. idle, busy: usage in some time without and with the streams."""
    share = busy.at_s / idle.at_s

    def each(used: float, without: float) -> float:
        return max(0.0, used - share * without) / tokens

    return TokenCost(
        way,
        tokens,
        tokens / busy.at_s,
        each(busy.published, idle.published),
        each(busy.received, idle.received),
        each(busy.redis_calls, idle.redis_calls),
        {name: 1000 * each(used, idle.cpu_s.get(name, 0.0)) for name, used in busy.cpu_s.items()},
    )


def columns_and_rows(costs: Sequence[TokenCost]) -> tuple[list[str], list[list[Any]]]:
    """Return the table of costs: a row for each way, and a column for the CPU time of each process."""
    names = list(dict.fromkeys(name for cost in costs for name in cost.cpu_ms))
    columns = ["tokens in", "tokens/s", "published", "received", "Redis calls", "CPU ms", *(f"{n} ms" for n in names)]
    rows = []
    for cost in costs:
        counts = [cost.published, cost.received, cost.redis_calls] if cost.way != CENTRALIZED else [None] * 3
        cpu = [cost.cpu_ms.get(name) for name in names]
        rows.append([cost.way, cost.tokens_per_s, *counts, cost.total_cpu_ms, *cpu])
    return columns, rows


def counted(texts: Iterable[str]) -> tuple[float, float, float]:
    """Return messages published and received, and calls to Redis, from the `/metrics` of all services."""
    sums: dict[str, float] = defaultdict(float)
    for text in texts:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                sums[sample.name] += sample.value
    return sums[PUBLISHED], sums[RECEIVED], sums[REDIS_CALLS]


async def measure(target: Path, ways: Sequence[str], streams: int, tokens: int, progress: Progress) -> list[TokenCost]:
    """Measure each way on a stack of its own, with `streams` answers of `tokens` tokens at once."""
    return [await _measure_one(target, way, streams, tokens, progress) for way in ways]


async def _measure_one(target: Path, way: str, streams: int, tokens: int, progress: Progress) -> TokenCost:
    ports = free_ports(len(SERVICES))
    env_of = {service: {"WISP_METRICS_PORT": str(port)} for service, port in zip(SERVICES, ports, strict=True)}
    # The gateway serves its metrics beside its API.
    del env_of["gateway"]
    env_of["scheduler"]["WISP_WITHOUT"] = '["runs"]' if way == ROUNDS else "[]"
    serving: Any = "centralized" if way == CENTRALIZED else "wisp"
    env = {"WISP_THREADS": "1", "WISP_ADMISSION": "false"}
    async with (
        Stack(
            "bench-rounds",
            target=target,
            env=env,
            env_of=env_of if serving == "wisp" else {},
            serving=serving,
            progress=progress,
        ) as stack,
        http_client(stack.url) as http,
        httpx.AsyncClient() as metrics_http,
    ):
        urls = []
        if serving == "wisp":
            urls = [stack.url.removesuffix("/v1") + "/metrics"]
            urls += [f"http://{LOOPBACK}:{port}/metrics" for port in ports[1:]]

        async def usage() -> SuiteUsage:
            texts = [(await metrics_http.get(url)).raise_for_status().text for url in urls]
            return SuiteUsage(time.perf_counter(), *counted(texts), _cpu_s(stack))

        client = await LoadClient.connect(http, pools=False)
        with progress.step(f"{streams} streams, tokens in {way}") as step:
            await stack.watch(_ask(client, streams, WARM_UP_TOKENS))
            before = await usage()
            await asyncio.sleep(IDLE_S)
            idle = (await usage()).since(before)
            before = await usage()
            made = await stack.watch(_ask(client, streams, tokens))
            busy = (await usage()).since(before)
            cost = token_cost(way, made, idle, busy)
            step.done(
                f"{made} tokens in {way}: {cost.tokens_per_s:.0f} a second, {cost.total_cpu_ms:.1f} ms of CPU each"
            )
        return cost


async def _ask(client: LoadClient, streams: int, tokens: int) -> int:
    """Send the requests at once; return the number of tokens of all answers. Raises WispError if one is incomplete."""
    now_s = time.perf_counter()
    records = await asyncio.gather(*(client.ask(_request(i, tokens), now_s, now_s) for i in range(streams)))
    if failed := [record.reason or str(record.ending) for record in records if record.tokens != tokens]:
        raise WispError(f"{len(failed)} of {streams} answers are incomplete: {failed[0]}")
    return sum(record.tokens for record in records)


def _request(session: int, tokens: int) -> LoadRequest:
    prompt = PROMPT.format(SUBJECTS[session % len(SUBJECTS)])
    return LoadRequest(
        session=session,
        number=0,
        messages=[{"role": "user", "content": prompt}],
        max_tokens=tokens,
        temperature=0.7,
        seed=session,
        ignore_eos=True,
        draft="none",
    )


def _cpu_s(stack: Stack) -> dict[str, float]:
    """Return the CPU time of each service and broker, children included."""
    processes = [(process.name.rpartition("-")[0], process.pid) for process in stack.processes()]
    if stack.serving == "wisp":
        for server in stack.brokers.servers:
            kind = "rabbitmq" if server.url.startswith("amqp") else "redis"
            processes += [(kind, process.pid) for process in server.processes if process.alive]
    used: dict[str, float] = defaultdict(float)
    for name, pid in processes:
        with suppress(psutil.Error):
            parent = psutil.Process(pid)
            for process in (parent, *parent.children(recursive=True)):
                with suppress(psutil.Error):
                    times = process.cpu_times()
                    used[name] += times.user + times.system
    return dict(used)
