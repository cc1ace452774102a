"""A load step: too many sessions for one verifier come, and a second one starts when the autoscaler would say so."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from services.tools.bench.load.client import Client, http_client
from services.tools.bench.load.core.measures import Measures, Window, measure
from services.tools.bench.load.drive import Point
from services.tools.bench.load.workload import Workload
from services.tools.bench.scaling.core.autoscaling import SCRAPE_S, SYNC_S, Seen, seen, wanted
from services.tools.local.ports import LOOPBACK, free_ports
from services.tools.local.progress import Progress
from services.tools.local.stack import Stack
from shared.errors import SettingsError

BATCHES = "wisp_verifier_batches_total"
SPAN_S = 15.0
"""Time before the decision, and after the new verifier serves, of which the clients' figures are told."""
SETTLING_S = 5.0
"""Between the new verifier's first batch and that time."""
DRAIN_S = 15.0
"""For the requests of that time to end."""
HISTORY_S = 60.0
"""Farthest that the rule's averages reach back. The suite was idle before the step."""
LIMIT_S = 90.0
"""A load that has not called for another verifier until then will not."""


async def load_step(
    workload: Workload, target: Path, sessions: int, progress: Progress
) -> tuple[dict[str, float], str, dict[str, Measures]]:
    """What happened when, in seconds after the load's step; the trigger that called for the verifier; and what the
    clients saw before it was called for and after it served."""
    ports = free_ports(2)

    def with_metrics(port: int) -> dict[str, str]:
        return {"WISP_METRICS_PORT": str(port), "WISP_METRICS_HOST": LOOPBACK}

    env = {"WISP_ADMISSION": "false", "WISP_THREADS": "1", "WISP_DRAFT_SOURCE": "lookup"}
    env_of = {"scheduler": with_metrics(ports[0])}
    async with (
        Stack("bench-scaling", target=target, env=env, env_of=env_of, progress=progress) as stack,
        http_client(stack.url) as http,
        httpx.AsyncClient() as asking,
    ):
        client = await Client.connect(http, pools=False)
        endless = Window(warm_up_s=0, measure_s=3600, drain_s=0)
        load = Point(client, workload, workload, sessions, 1, endless)

        async def metrics(port: int) -> str:
            return (await asking.get(f"http://{LOOPBACK}:{port}/metrics")).text

        idle = seen(await metrics(ports[0]))
        began = time.perf_counter()
        running = asyncio.create_task(load.run())
        events: dict[str, float] = {}
        try:
            with progress.step(f"load step to {sessions} sessions") as step:
                trigger = await _decided(ports[0], metrics, idle, began)
                events["decided"] = time.perf_counter() - began
                step.detail(f"another verifier is called for by {trigger}")
                await stack.start("verifier", env=with_metrics(ports[1]))
                events["new verifier ready"] = time.perf_counter() - began
                while not _batches(await metrics(ports[1])):  # noqa: ASYNC110 - it happens in another process
                    await asyncio.sleep(0.02)
                events["new verifier serving"] = serving_s = time.perf_counter() - began
                step.detail("measuring what the clients get now")
                await asyncio.sleep(SETTLING_S + SPAN_S + DRAIN_S)
                step.done(f"a new verifier serves {serving_s:.1f} s after the load came")
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
    spans = {"before": events["decided"] - SPAN_S, "after": serving_s + SETTLING_S}
    told = {
        name: measure(load.records, Window(warm_up_s=max(0.0, start_s), measure_s=SPAN_S, drain_s=0))
        for name, start_s in spans.items()
    }
    return events, trigger, told


async def _decided(port: int, metrics: Any, idle: Seen, began: float) -> str:
    """Wait until the rule wants more than one verifier; returns the trigger that does."""
    samples = deque([idle], maxlen=1 + round(HISTORY_S / SCRAPE_S))
    samples.extend([idle] * round(HISTORY_S / SCRAPE_S))
    scrapes = 0
    while time.perf_counter() - began < LIMIT_S:
        scrapes += 1
        await asyncio.sleep(max(0.0, began + scrapes * SCRAPE_S - time.perf_counter()))
        samples.append(seen(await metrics(port)))
        if scrapes % round(SYNC_S / SCRAPE_S) == 0:
            number, trigger = wanted(1, list(samples))
            if number > 1:
                return trigger
    raise SettingsError("the load's step called for no second verifier; give it more sessions with --step")


def _batches(text: str) -> float:
    """Batches that a verifier has run, by its `/metrics`."""
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == BATCHES
    )
