"""What a verification round costs outside the model: an idle suite, one stream, hop by hop.

Every service logs, at debug level, when a round passes through it, with the machine-wide monotonic clock; the hops are
the differences between those lines. The debug lines themselves cost some tens of microseconds each and are included.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import httpx
import psutil

from services.tools.bench.support.report import report
from services.tools.local.progress import Progress
from services.tools.local.stack import Stack

PROMPT = "Tell me about the history of the lighthouse, in as much detail as you can."
WARM_UP_ROUNDS = 10
REQUEST_TIMEOUT_S = 300.0

# Consecutive events of one round, and what happens between each and the one before it.
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

Times = dict[str, float]


def rounds_of(lines: Iterable[dict[str, object]]) -> list[Times]:
    """The times (ms) of each round's events, from the debug lines of all services, in order of the rounds.

    Only rounds that were alone in their batch and whose every event is there.
    """
    batches: dict[str, Times] = defaultdict(dict)
    rounds: dict[tuple[str, int], Times] = defaultdict(dict)
    batch_of: dict[tuple[str, int], str] = {}
    for line in lines:
        at, event = line.get("monotonic_ms"), line.get("event")
        if not isinstance(at, float) or not isinstance(event, str):
            continue
        session, number, batch = line.get("session"), line.get("round"), line.get("batch")
        if isinstance(session, str) and isinstance(number, int):
            rounds[session, number].setdefault(event, at)
        elif isinstance(batch, str):
            batches[batch].setdefault(event, at)
            jobs = line.get("jobs")
            if isinstance(jobs, list) and len(jobs) == 1:
                batch_of[jobs[0][0], jobs[0][1]] = batch
    whole = []
    for key, times in sorted(rounds.items(), key=lambda item: item[0]):
        merged = {**times, **batches.get(batch_of.get(key, ""), {})}
        if all(event in merged for event, _ in HOPS):
            whole.append(merged)
    return whole


def outside_model(times: Times) -> float:
    """Milliseconds of a round that the model did not take."""
    return times["round settled"] - times["round sent"] - (times["model done"] - times["model started"])


def _log_lines(folder: Path) -> Iterable[dict[str, object]]:
    for path in sorted(folder.glob("*.log")):
        for text in path.read_text(errors="replace").splitlines():
            if text.startswith("{"):
                line = json.loads(text)
                if isinstance(line, dict):
                    yield line


async def _measure(rounds: int, target: Path | None) -> None:
    env = {"WISP_LOG_LEVEL": "debug", "WISP_LOG_FORMAT": "json"}
    async with Stack("bench-rounds", target=target, env=env, progress=Progress()) as stack:
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
            [process.name, psutil.Process(process.pid).memory_full_info().uss / 1e6] for process in stack.processes()
        ]
        measured = rounds_of(_log_lines(stack.folder))[WARM_UP_ROUNDS:]
    if not measured:
        raise SystemExit("no complete round was logged; the answer may have ended at once: try another model")
    _print(measured, memory)


def _print(measured: list[Times], memory: list[list[object]]) -> None:
    rows: list[list[object]] = []
    for (before, _), (after, name) in itertools.pairwise(HOPS):
        if name is not None:
            rows.append([name, *_quantiles([times[after] - times[before] for times in measured])])
    rows.append(["outside the model", *_quantiles([outside_model(times) for times in measured])])
    to_gateway = [t["result received"] - t["results sent"] for t in measured if "result received" in t]
    if to_gateway:
        rows.append(["(beside it: verifier → gateway)", *_quantiles(to_gateway)])
    report(
        "rounds",
        f"One verification round by hop, {len(measured)} rounds of one stream, idle suite",
        ["hop", "median ms", "p90 ms", "p99 ms"],
        rows,
        facts={"rounds": len(measured)},
        notes=["aim: at most 5 ms outside the model at the median"],
    )
    report(
        "memory",
        "Memory of each process after one stream (unique set size)",
        ["process", "MB"],
        memory,
        notes=[
            "aim: gateway and scheduler at most 150 MB, a verifier of the default model in bfloat16 at most 1200 MB"
        ],
    )


def _quantiles(values: list[float]) -> tuple[float, float, float]:
    ordered = sorted(values)
    return (
        statistics.median(ordered),
        ordered[int(0.9 * (len(ordered) - 1))],
        ordered[int(0.99 * (len(ordered) - 1))],
    )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m services.tools.bench.rounds", description=__doc__)
    parser.add_argument("--rounds", type=int, default=200, help="rounds to measure")
    parser.add_argument("--target", type=Path, default=None, help="folder of the target model")
    options = parser.parse_args()
    asyncio.run(_measure(options.rounds, options.target))


if __name__ == "__main__":
    main()
