"""Time per token with 1, 2, 4, … streams at once: with drafts allowed, without drafts, and with drafts forced.

The crossover is the number of streams from which on forced drafts no longer pay.

Drafts are forced on a suite of its own, whose drafter sends four tokens in each round and whose scheduler has neither
runs nor trimming. The other two ways share a suite and take turns, in another order with each repetition; the median
counts. All ways answer the same requests. Each prompt is sent once before, so that the streams start together with its
blocks in the prefix cache.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from services.tools.bench.load.campaign import ArmSettings
from services.tools.bench.load.client import LoadClient, http_client
from services.tools.bench.load.core.crossover import (
    ALLOWED,
    FORCED,
    PLAIN,
    WAYS,
    columns_and_rows,
    crossover,
    median_ms_per_token,
    ms_per_token,
    verdicts,
)
from services.tools.bench.load.core.record import Ending, RequestRecord
from services.tools.bench.load.core.requests import LoadRequest, first_number
from services.tools.bench.load.workload import Workload, workload_of
from services.tools.bench.support.report import conclude, records, table, written
from services.tools.local.progress import Progress
from services.tools.local.stack import Stack
from shared.errors import WispError

SESSIONS = "1,2,4,8,16,32"
WORKLOAD = """
ignore_eos = true
think_s = [{{distribution = "constant", value = 0}}]
prompt_tokens = [{{distribution = "constant", value = 50}}]
output_tokens = [{{distribution = "constant", value = {tokens}}}]
classes = [{{name = "all", ttft_ms = 1e6, tpot_ms = 1e6}}]
devices = [{{name = "none"}}]
"""
SUITES: dict[str, dict[str, dict[str, str]]] = {
    ALLOWED: {"scheduler": {"WISP_WITHOUT": "[]"}},
    FORCED: {
        "scheduler": {"WISP_WITHOUT": '["runs", "trimming"]'},
        "drafter": {"WISP_STOP_RULE": "fixed", "WISP_DRAFT_LENGTH": "4"},
    },
}
"""Settings by service of each suite."""
WARM_UP_TOKENS = 96
"""Tokens of a first stream, by which the drafter learns its times."""


def workload(tokens: int, seed: int | None) -> Workload:
    """Return the requests: answers of exactly this many tokens, at the temperatures of the packaged workload."""
    return workload_of(WORKLOAD.format(tokens=tokens), seed)


class CrossoverBench:
    """The measurement, and its times per token so far."""

    def __init__(
        self, asked: Workload, sessions: Sequence[int], repeats: int, settings: ArmSettings, progress: Progress
    ) -> None:
        """repeats: measurements of each way with each number of streams."""
        self.curves: dict[str, dict[int, float]] = {way: {} for way in WAYS}
        self.medians: dict[str, dict[int, float]] = {way: {} for way in WAYS}
        """Of the median stream."""
        self._asked = asked
        self._sessions = sessions
        self._repeats = repeats
        self._settings = settings
        self._progress = progress

    async def run(self) -> None:
        """Measure all ways, each on its suite."""
        for suite, env_of in SUITES.items():
            ways = (FORCED,) if suite == FORCED else (ALLOWED, PLAIN)
            async with Stack(
                "bench-crossover",
                target=self._settings.target,
                env=self._settings.env,
                env_of=env_of,
                progress=self._progress,
            ) as stack:
                await stack.watch(self._measure(stack.url, ways))

    async def _measure(self, url: str, ways: Sequence[str]) -> None:
        async with http_client(url) as http:
            client = await LoadClient.connect(http, pools=False)
            first = self._asked.request(0, 0).model_copy(update={"max_tokens": WARM_UP_TOKENS})
            await _ask_all(client, [first])
            for n in self._sessions:
                requests = [self._asked.request(session, first_number(n, 0)) for session in range(n)]
                with self._progress.step(f"{n} streams") as step:
                    await _ask_all(client, [one.model_copy(update={"max_tokens": 1}) for one in requests])
                    measured: dict[str, list[list[RequestRecord]]] = {way: [] for way in ways}
                    for repetition in range(self._repeats):
                        for way in ways if repetition % 2 == 0 else ways[::-1]:
                            step.detail(f"drafts {way}")
                            draft = PLAIN if way == PLAIN else ""
                            asked = [one.model_copy(update={"draft": draft}) for one in requests]
                            measured[way].append(await _ask_all(client, asked))
                    for way in ways:
                        self.curves[way][n] = median(map(ms_per_token, measured[way]))
                        self.medians[way][n] = median(map(median_ms_per_token, measured[way]))
                    shown = ", ".join(f"{way} {self.curves[way][n]:.1f}" for way in ways)
                    step.done(f"{n} streams: {shown} ms a token")

    def report(self, facts: dict[str, Any], name: str, console: Console) -> None:
        """Print the table, and write the results and the plot."""
        settings, asked = self._settings, self._asked.request(0, 0)
        facts = facts | {"model": settings.target.name, "dtype": settings.dtype, "tokens": asked.max_tokens}
        facts["repetitions"] = self._repeats
        columns, rows = columns_and_rows(self.curves, self.medians)
        console.print(table("time per token by drafts", columns, rows))
        record = {
            "facts": facts,
            "notes": verdicts(self.curves, self.medians),
            "crossover": crossover(self.curves),
            "rows": records(columns, rows),
        }
        path = conclude(console, name, record)
        picture = path.with_suffix(".svg")
        plot(self.curves, picture)
        written(console, picture)


async def _ask_all(client: LoadClient, requests: Sequence[LoadRequest]) -> list[RequestRecord]:
    """Send requests at once; return their records. Raises WispError if one is incomplete."""
    now_s = time.perf_counter()
    found = await asyncio.gather(*(client.ask(request, now_s, now_s) for request in requests))
    for record in found:
        if record.ending is not Ending.COMPLETE or not record.arrivals:
            raise WispError(f"a stream of {len(requests)} is incomplete: {record.reason or record.ending}")
    return found


def plot(curves: dict[str, dict[int, float]], path: Path) -> None:
    """Draw the time per token of each way over the number of streams, and mark the crossover."""
    from services.tools.bench.load.plot import COLOURS, GREY, MARKERS, axes_of

    labels = {ALLOWED: "drafts allowed", PLAIN: "no drafts", FORCED: "drafts forced"}
    with axes_of(path, "streams at once", "ms per token") as axes:
        for (way, curve), colour, marker in zip(curves.items(), COLOURS, MARKERS, strict=False):
            counts = sorted(curve)
            times = [curve[n] for n in counts]
            axes.plot(counts, times, color=colour, marker=marker, markersize=5, linewidth=1.8, label=labels[way])
        counts = sorted(curves[PLAIN])
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(counts, [str(n) for n in counts])
        axes.set_yticks(list(_ticks(curves)), [f"{tick:g}" for tick in _ticks(curves)])
        axes.minorticks_off()
        found = crossover(curves)
        if found is not None and found > 1:
            axes.axvline(found, color=GREY, linewidth=0.8, linestyle=(0, (4, 4)))
            axes.text(found, axes.get_ylim()[1], f" drafts pay below {found:.1f}", color=GREY, va="top")
        axes.legend(frameon=False)


def _ticks(curves: dict[str, dict[int, float]]) -> Iterator[float]:
    """Yield the round numbers 1, 2, 5, 10, … that span all times."""
    times = [ms for curve in curves.values() for ms in curve.values()]
    power = 0.1
    while power <= max(times) * 2:
        for digit in (1, 2, 5):
            if min(times) / 2 <= digit * power <= max(times) * 2:
                yield round(digit * power, 3)
        power *= 10
