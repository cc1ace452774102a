"""`wisp bench handoff`: longest gap in streams whose verifier leaves, by the way in which KV is handed over.

A suite with two verifiers serves streams with long prompts. When all streams have begun, the benchmark ends the
verifier that holds most of them, by SIGTERM (it drains) or by SIGKILL. Only streams whose KV it held count. Then the
benchmark starts another verifier for the next repetition. The answers must be the same in every arm.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import httpx
import typer

from services.tools.bench.support.options import StreamsOption, run_program, target_folder
from services.tools.bench.support.report import report, terminal
from services.tools.bench.support.words import random_words
from services.tools.cli.shared_options import TargetOption
from services.tools.cli.terminal import errors_shown, run
from services.tools.local.process import Process
from services.tools.local.progress import ConsoleProgress, Progress
from services.tools.local.stack import Stack
from shared.models.folder import ModelFolder
from shared.models.text import Tokenizer
from shared.state.store import Store

ARMS = (
    ("off", signal.SIGTERM),
    ("drain", signal.SIGTERM),
    ("write-through", signal.SIGTERM),
    ("off", signal.SIGKILL),
    ("write-through", signal.SIGKILL),
)
BEGUN = 8
"""Events after which a stream counts as begun."""
TIMEOUT_S = 300.0
COLUMNS = (
    "KV handed over",
    "ended by",
    "streams moved",
    "longest gap ms (median)",
    "worst",
    "usual gap ms",
    "verifier left after s",
)


@dataclass
class Stream:
    """One answer: its tokens, and the time of each event (seconds of `time.perf_counter`)."""

    tokens: list[int] = field(default_factory=list)
    at_s: list[float] = field(default_factory=list)
    session_id: str = ""

    def longest_gap_ms(self, since_s: float) -> float:
        """Return the longest time without an event after `since_s`."""
        after = [at for at in self.at_s if at >= since_s]
        return max((b - a for a, b in pairwise([since_s, *after])), default=0.0) * 1000

    def usual_gap_ms(self, until_s: float) -> float:
        """Return the median time between events before `until_s`."""
        before = [at for at in self.at_s if at < until_s]
        return statistics.median(b - a for a, b in pairwise(before)) * 1000


@dataclass
class HandoffMeasurements:
    """The measurements of one arm."""

    longest_ms: list[float] = field(default_factory=list)
    usual_ms: list[float] = field(default_factory=list)
    left_s: list[float] = field(default_factory=list)
    completions: list[list[int]] = field(default_factory=list)


def main(
    streams: StreamsOption = 4,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 500,
    tokens: Annotated[int, typer.Option(min=2 * BEGUN, help="Tokens of each answer.")] = 96,
    repetitions: Annotated[int, typer.Option(min=1, help="Verifiers that leave in each arm.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the prompts.")] = 0,
    target: TargetOption = None,
) -> None:
    """Measure the gaps. Exit status 1 if an answer differs between arms."""
    with errors_shown():
        progress = ConsoleProgress(terminal())
        folder = target_folder(target, progress)
        tokenizer = Tokenizer(ModelFolder(folder))
        prompts = [[_prompt(tokenizer, seed, r, s, prompt) for s in range(streams)] for r in range(repetitions)]
        arms = [run(partial(measure, folder, *arm, prompts, tokens, progress)) for arm in ARMS]
        same = all(arm.completions == arms[0].completions for arm in arms)
        report(
            "handoff",
            "A verifier leaves while it serves streams",
            COLUMNS,
            [_row(*arm, found) for arm, found in zip(ARMS, arms, strict=True)],
            facts={"model": folder.name, "streams": streams, "prompt tokens": prompt, "verifiers": 2},
            notes=[
                "longest gap: between events of a stream, from the signal to its verifier on",
                f"same completions in all arms: {'yes' if same else 'NO'}",
            ],
        )
        if not same:
            raise typer.Exit(1)


def _row(setting: str, number: signal.Signals, arm: HandoffMeasurements) -> tuple[object, ...]:
    median = statistics.median
    gaps = (median(arm.longest_ms), max(arm.longest_ms)) if arm.longest_ms else (None, None)
    return setting, number.name, len(arm.longest_ms), *gaps, median(arm.usual_ms), median(arm.left_s)


def _prompt(tokenizer: Tokenizer, seed: int, repetition: int, stream: int, length: int) -> list[int]:
    draw = random.Random(f"handoff-{seed}-{repetition}-{stream}")
    return tokenizer.encode(random_words(draw, length))[:length]


async def measure(
    folder: Path,
    setting: str,
    number: signal.Signals,
    repetitions: Sequence[Sequence[list[int]]],
    tokens: int,
    progress: Progress,
) -> HandoffMeasurements:
    """Measure one arm, in a suite of its own."""
    env = {"WISP_KV_HANDOFF": setting, "WISP_ADMISSION": "false"}
    arm = HandoffMeasurements()
    async with (
        Stack("handoff", target=folder, verifiers=2, env=env) as stack,
        httpx.AsyncClient(timeout=TIMEOUT_S) as http,
    ):
        with progress.step(f"KV handoff: {setting}, ended by {number.name}") as step:
            for prompts in repetitions:
                await _once(stack, http, number, prompts, tokens, arm)
                await stack.start("verifier")
            step.done(f"{len(repetitions)} times")
    return arm


async def _once(
    stack: Stack,
    http: httpx.AsyncClient,
    number: signal.Signals,
    prompts: Sequence[list[int]],
    tokens: int,
    arm: HandoffMeasurements,
) -> None:
    """Start the streams, end a verifier, and wait for the streams to end."""
    streams = [Stream() for _ in prompts]
    async with asyncio.TaskGroup() as tasks:
        for stream, prompt in zip(streams, prompts, strict=True):
            tasks.create_task(_ask(http, stack, prompt, tokens, stream))
        while any(len(stream.at_s) < BEGUN for stream in streams):  # noqa: ASYNC110 - polling is enough
            await asyncio.sleep(0.01)
        leaves, held = await _busiest(stack)
        began_s = time.perf_counter()
        await stack.stop(leaves, number, TIMEOUT_S)
        arm.left_s.append(time.perf_counter() - began_s)
    arm.completions += [stream.tokens for stream in streams]
    for stream in streams:
        arm.usual_ms.append(stream.usual_gap_ms(began_s))
        if stream.session_id in held:
            arm.longest_ms.append(stream.longest_gap_ms(began_s))


async def _busiest(stack: Stack) -> tuple[Process, set[str]]:
    """Return the verifier that holds most sessions, and those sessions."""
    store = Store.connect(stack.brokers.redis_url, stack.namespace, 60)
    try:
        beats = await store.registry.heartbeats()
    finally:
        await store.close()
    most = max(beats, key=lambda beat: len(beat.residency))
    (process,) = [process for process in stack.processes("verifier") if process.name == most.verifier]
    return process, {held.session for held in most.residency}


async def _ask(http: httpx.AsyncClient, stack: Stack, prompt: list[int], tokens: int, stream: Stream) -> None:
    body = {
        "model": stack.target.name,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "wisp": {"trace": True},
    }
    async with http.stream("POST", f"{stack.url}/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            fields = json.loads(line.removeprefix("data: "))
            stream.session_id = fields["id"]
            if made := fields.get("wisp", {}).get("tokens"):
                stream.tokens += [token["id"] for token in made]
                stream.at_s.append(time.perf_counter())


if __name__ == "__main__":
    run_program(main, "wisp bench handoff")
