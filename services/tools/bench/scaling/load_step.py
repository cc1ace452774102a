"""A load step: more sessions arrive than one verifier can serve, and the autoscaling rule starts a second one."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from services.tools.bench.load.client import LoadClient, http_client
from services.tools.bench.load.core.measures import Measures, Window, measure
from services.tools.bench.load.drive import PointRun
from services.tools.bench.load.workload import Workload
from services.tools.bench.scaling.core.autoscaling import (
    SCRAPE_S,
    SYNC_S,
    TRIGGERS,
    SchedulerMetrics,
    desired_verifiers,
)
from services.tools.local.ports import LOOPBACK, free_ports
from services.tools.local.progress import Progress
from services.tools.local.stack import Stack
from shared.errors import SettingsError

BATCHES = "wisp_verifier_batches_total"
SPAN_S = 15.0
"""Time before the decision, and after the new verifier serves, in which the clients' figures are measured."""
SETTLING_S = 5.0
"""Time between the new verifier's first batch and the second span."""
DRAIN_S = 15.0
"""Time for the requests of the second span to end."""
HISTORY_S = 60.0
"""Longest time that an average of the rule covers. The suite is idle before the step."""
LIMIT_S = 90.0
"""A load that has not triggered the rule by then never will."""
POLL_S = 0.02


@dataclass
class LoadStep:
    """The result of a load step."""

    events: dict[str, float]
    """Seconds after the step, by event."""
    trigger: str
    """The metric that asked for the second verifier."""
    clients: dict[str, Measures]
    """The clients' figures before the decision and after the second verifier serves."""


async def load_step(workload: Workload, target: Path, sessions: int, progress: Progress) -> LoadStep:
    """Put `sessions` sessions on a suite with one verifier, and start a second one when the rule asks for it.

    Raises SettingsError if it never does.
    """
    ports = free_ports(2)
    env = {"WISP_ADMISSION": "false", "WISP_THREADS": "1", "WISP_DRAFT_SOURCE": "lookup"}
    env_of = {"scheduler": _with_metrics(ports[0])}
    async with (
        Stack("bench-scaling", target=target, env=env, env_of=env_of, progress=progress) as stack,
        http_client(stack.url) as http,
        httpx.AsyncClient() as metrics_http,
    ):

        async def metrics_of(port: int) -> str:
            return (await metrics_http.get(f"http://{LOOPBACK}:{port}/metrics")).text

        client = await LoadClient.connect(http, pools=False)
        load = PointRun(client, workload, workload, sessions, 1, Window(warm_up_s=0, measure_s=3600, drain_s=0))
        idle = scheduler_metrics(await metrics_of(ports[0]))
        began = time.perf_counter()
        running = asyncio.create_task(load.run())
        try:
            with progress.step(f"load step to {sessions} sessions") as step:
                trigger = await _triggered(lambda: metrics_of(ports[0]), idle, began)
                events = {"decided": time.perf_counter() - began}
                step.detail(f"{trigger} asks for another verifier")
                events |= await _add_verifier(stack, ports[1], metrics_of, began)
                serving_s = events["new verifier serving"]
                step.detail("measuring the clients' figures with two verifiers")
                await asyncio.sleep(SETTLING_S + SPAN_S + DRAIN_S)
                step.done(f"a new verifier serves {serving_s:.1f} s after the step")
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
    spans = {"before": events["decided"] - SPAN_S, "after": serving_s + SETTLING_S}
    clients = {
        name: measure(load.records, Window(warm_up_s=max(0.0, start_s), measure_s=SPAN_S, drain_s=0))
        for name, start_s in spans.items()
    }
    return LoadStep(events, trigger, clients)


def scheduler_metrics(text: str) -> SchedulerMetrics:
    """Parse a scheduler's `/metrics`."""
    values = {
        (sample.name, sample.labels.get("deadline", "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }

    def value(trigger: str, label: str = "") -> float:
        return values.get((TRIGGERS[trigger].metric, label), 0.0)

    return SchedulerMetrics(
        queue_delay_s=value("queue-delay"),
        demand=value("demand"),
        met=value("deadlines-missed", "met"),
        missed=value("deadlines-missed", "missed"),
    )


async def _triggered(metrics: Callable[[], Awaitable[str]], idle: SchedulerMetrics, began: float) -> str:
    """Wait until the rule wants more than one verifier; return the trigger."""
    history = 1 + round(HISTORY_S / SCRAPE_S)
    samples = deque([idle] * history, maxlen=history)
    scrapes = 0
    while time.perf_counter() - began < LIMIT_S:
        scrapes += 1
        await asyncio.sleep(max(0.0, began + scrapes * SCRAPE_S - time.perf_counter()))
        samples.append(scheduler_metrics(await metrics()))
        if scrapes % round(SYNC_S / SCRAPE_S) == 0:
            desired, trigger = desired_verifiers(1, list(samples))
            if desired > 1:
                return trigger
    raise SettingsError(f"the rule asked for no second verifier within {LIMIT_S:g} s; add sessions with --step")


async def _add_verifier(
    stack: Stack, port: int, metrics_of: Callable[[int], Awaitable[str]], began: float
) -> dict[str, float]:
    """Start a verifier, wait for its first batch, and return when it was ready and when it served."""
    await stack.start("verifier", env=_with_metrics(port))
    ready_s = time.perf_counter() - began
    while not _batches(await metrics_of(port)):  # noqa: ASYNC110 - it happens in another process
        await asyncio.sleep(POLL_S)
    return {"new verifier ready": ready_s, "new verifier serving": time.perf_counter() - began}


def _with_metrics(port: int) -> dict[str, str]:
    return {"WISP_METRICS_PORT": str(port), "WISP_METRICS_HOST": LOOPBACK}


def _batches(text: str) -> float:
    """Return the number of batches that a verifier has run, from its `/metrics`."""
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == BATCHES
    )
