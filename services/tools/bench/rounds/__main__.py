"""`wisp bench rounds`: time of a verification round outside the model, and the cost of a token.

The first table has the hops of a round, in a suite that serves only one stream. Every service logs each round that
passes through it, at debug level and with the monotonic clock that all processes of the machine share. A hop is the
difference between two of these lines. Writing a line takes some tens of microseconds, which are included. The second
table has the memory of each process, the third the messages, Redis calls and CPU time of a token in rounds, in runs and
in centralized serving (`token_costs`).
"""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import httpx
import psutil
import typer

from services.tools.bench.load.core.measures import quantile
from services.tools.bench.rounds import token_costs
from services.tools.bench.support.options import let_idle_threads_sleep, run_program, target_folder
from services.tools.bench.support.report import report, terminal
from services.tools.cli.shared_options import TargetOption
from services.tools.cli.terminal import errors_shown, run
from services.tools.local.brokers import Brokers
from services.tools.local.progress import ConsoleProgress, Progress
from services.tools.local.stack import Stack
from shared.errors import SettingsError

PROMPT = "Tell me about the history of the lighthouse, in as much detail as you can."
WARM_UP_ROUNDS = 10
REQUEST_TIMEOUT_S = 300.0

HOPS = (
    ("round sent", None),
    ("round received", "drafter → scheduler"),
    ("batch sent", "scheduler decides"),
    ("batch received", "scheduler → verifier"),
    ("model started", "verifier prepares"),
    ("model done", "model"),
    ("batch committed", "commit in Redis"),
    ("results sent", "verifier publishes"),
    ("round settled", "verifier → drafter"),
)
"""Consecutive log events of one round, each with the name of the hop that ends with it."""

Times = dict[str, float]
"""Milliseconds of the monotonic clock, by event."""


def rounds_of(lines: Iterable[dict[str, object]]) -> list[Times]:
    """Return the times of each round's events, from the debug lines of all services, in the order of rounds.

    Rounds that shared their batch or lack an event are left out.
    """
    batches: dict[str, Times] = defaultdict(dict)
    rounds: dict[tuple[str, int], Times] = defaultdict(dict)
    batch_of: dict[tuple[str, int], str] = {}
    for line in lines:
        at, event = line.get("monotonic_ms"), line.get("event")
        if not isinstance(at, float) or not isinstance(event, str):
            continue
        session_id, number, batch_id = line.get("session"), line.get("round"), line.get("batch")
        if isinstance(session_id, str) and isinstance(number, int):
            rounds[session_id, number].setdefault(event, at)
        elif isinstance(batch_id, str):
            batches[batch_id].setdefault(event, at)
            jobs = line.get("jobs")
            if isinstance(jobs, list) and len(jobs) == 1:
                batch_of[jobs[0][0], jobs[0][1]] = batch_id
    complete = []
    for key, times in sorted(rounds.items(), key=lambda item: item[0]):
        merged = {**times, **batches.get(batch_of.get(key, ""), {})}
        if all(event in merged for event, _ in HOPS):
            complete.append(merged)
    return complete


def outside_model(times: Times) -> float:
    """Return the milliseconds of a round outside the model."""
    return times["round settled"] - times["round sent"] - (times["model done"] - times["model started"])


def main(
    rounds: Annotated[int, typer.Option(min=0, help="Rounds to time; 0 leaves them out.")] = 200,
    streams: Annotated[int, typer.Option(min=0, help="Streams for the cost of a token; 0 leaves it out.")] = 8,
    tokens: Annotated[int, typer.Option(min=16, help="Tokens of each of these streams.")] = 96,
    target: TargetOption = None,
) -> None:
    """Time the hops of a verification round, and measure the cost of a token and the memory of each process."""
    with errors_shown():
        let_idle_threads_sleep()
        progress = ConsoleProgress(terminal())
        folder = target_folder(target, progress)
        if rounds:
            measured, memory = run(lambda: measure(rounds, folder))
            if not measured:
                raise SettingsError(
                    "no complete round was logged: the answer may have ended at once; try another --target"
                )
            _report(measured, memory, folder.name)
        if streams:
            costs = run(lambda: token_costs.measure(folder, token_costs.WAYS, streams, tokens, progress))
            _report_costs(costs, streams, tokens, folder.name)


async def measure(
    rounds: int, target: Path, brokers: Brokers | None = None
) -> tuple[list[Times], list[tuple[str, float]]]:
    """Return the times of each round, and the memory of each process in MB.

    Runs are left out: without drafts, a session would decode in a run and make no rounds.
    """
    env = {"WISP_LOG_LEVEL": "debug", "WISP_LOG_FORMAT": "json", "WISP_WITHOUT": '["runs"]'}
    async with Stack("bench-rounds", brokers=brokers, target=target, env=env, progress=Progress()) as stack:
        async with httpx.AsyncClient(timeout=REQUEST_TIMEOUT_S) as http:
            body = {
                "model": stack.target.name,
                "messages": [{"role": "user", "content": PROMPT}],
                "max_tokens": rounds + WARM_UP_ROUNDS,
                "temperature": 0,
                "wisp": {"draft": "none"},
            }
            answer = await http.post(f"{stack.url}/chat/completions", json=body)
            answer.raise_for_status()
        memory = [
            (process.name, psutil.Process(process.pid).memory_full_info().uss / 1e6) for process in stack.processes()
        ]
        return rounds_of(_log_lines(stack.folder))[WARM_UP_ROUNDS:], memory


def _log_lines(folder: Path) -> Iterable[dict[str, object]]:
    for path in sorted(folder.glob("*.log")):
        for text in path.read_text(errors="replace").splitlines():
            if text.startswith("{"):
                line = json.loads(text)
                if isinstance(line, dict):
                    yield line


def _report(measured: list[Times], memory: list[tuple[str, float]], model: str) -> None:
    rows: list[tuple[object, ...]] = []
    for (before, _), (after, name) in itertools.pairwise(HOPS):
        rows.append((name, *_quantiles([times[after] - times[before] for times in measured])))
    rows.append(("outside the model", *_quantiles([outside_model(times) for times in measured])))
    to_gateway = [t["result received"] - t["results sent"] for t in measured if "result received" in t]
    if to_gateway:
        rows.append(("(beside it: verifier → gateway)", *_quantiles(to_gateway)))
    report(
        "rounds",
        f"One verification round by hop, {len(measured)} rounds of one stream, idle suite",
        ["hop", "median ms", "p90 ms", "p99 ms"],
        rows,
        facts={"model": model, "rounds": len(measured)},
        notes=["aim: at most 5 ms outside the model at the median"],
    )
    report(
        "memory",
        "Memory of each process after one stream (unique set size)",
        ["process", "MB"],
        memory,
        facts={"model": model},
        notes=[
            "aim: gateway and scheduler at most 150 MB, a verifier of the default model in bfloat16 at most 1200 MB"
        ],
    )


def _report_costs(costs: list[token_costs.TokenCost], streams: int, tokens: int, model: str) -> None:
    columns, rows = token_costs.columns_and_rows(costs)
    report(
        "token-costs",
        f"Cost of a token, {streams} streams of {tokens} tokens without drafts",
        columns,
        rows,
        facts={"model": model, "streams": streams, "tokens": tokens},
        notes=[
            "published, received: messages of all services; a group of results counts once",
            "CPU time includes the prompts; what the idle suite needs is subtracted",
        ],
    )


def _quantiles(values: list[float]) -> tuple[float, float, float]:
    return quantile(values, 0.5), quantile(values, 0.9), quantile(values, 0.99)


if __name__ == "__main__":
    run_program(main, "wisp bench rounds")
