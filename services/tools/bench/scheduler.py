"""`wisp bench scheduler`: time of the scheduler's decisions, and rounds a second that its service takes.

The first table has the decision alone: rounds wait for one verifier, the dispatcher plans a batch, its results come
back, and as many new rounds arrive. The second adds sessions that the verifier decodes in runs: their reports arrive
between the decisions. The third has a scheduler process behind RabbitMQ: this benchmark publishes rounds at a rate,
and acts as the verifier that receives the batches.
"""

from __future__ import annotations

import asyncio
import random
import time
from secrets import token_hex
from statistics import median, quantiles
from typing import Annotated, Any

import psutil
import typer

from services.scheduler.core.batching import BatchLimits
from services.scheduler.core.dispatch import Dispatcher, SchedulingRules
from services.scheduler.core.policies import POLICIES
from services.tools.bench.support.options import run_program, whole_numbers
from services.tools.bench.support.report import conclude, machine, records, table, terminal
from services.tools.cli.terminal import errors_shown, run
from services.tools.local.brokers import Brokers
from services.tools.local.folder import RunFolder
from services.tools.local.namespace import delete_namespace
from services.tools.local.progress import ConsoleProgress
from services.tools.local.stack import Stack
from shared.broker import topology
from shared.broker.client import Broker
from shared.broker.topology import Topology
from shared.messages import Batch, CostModel, Heartbeat, Message, Residency, Result, Status, Verify

AIMS_MS = {1_000: 1.0, 10_000: 10.0}
"""Longest median decision, by number of pending rounds."""
DECISION_COLUMNS = ["policy", "waiting", "median ms", "90 % ms", "99 % ms", "rounds in a batch", "arrival us"]
SERVICE_COLUMNS = ["rounds/s sent", "rounds/s in batches", "median ms", "99 % ms", "processor", "left at the end"]
RUN_COLUMNS = ["in runs", "rounds", "report us", "median ms", "90 % ms", "99 % ms", "load message ms"]
DECISIONS = 60
BASE_LEN = 300
RUN_TOKENS = 100
"""Tokens of each run: more than the decisions of a measurement, so that no run ends in it."""
ROUNDS_BESIDE_RUNS = 32
"""Pending rounds of other sessions at each decision."""
SECONDS = 5.0
"""Duration of each rate."""
HEARTBEAT_S = 0.5
TICK_S = 0.002
VERIFIER = "bench"
FAST = CostModel(
    verifier=VERIFIER,
    coefficients=[1.0, 0.01, 0.001, 0.0, 0.0],
    ratio_p50=1.0,
    ratio_p90=1.0,
    ratio_p99=1.0,
    samples=1,
    version=1,
)
"""Cost model of a verifier that never limits the rate."""


def main(
    pending: Annotated[str, typer.Option(help="Numbers of pending rounds, comma-separated.")] = "100,1000,10000",
    runs: Annotated[
        str, typer.Option(help="Numbers of sessions in runs, comma-separated; 0 leaves them out.")
    ] = "100,1000,10000",
    rates: Annotated[
        str, typer.Option(help="Rounds a second for the service, comma-separated; 0 leaves the service out.")
    ] = "250,500,1000,2000",
    seed: Annotated[int, typer.Option(help="Seed of the rounds.")] = 1,
) -> None:
    """Time the scheduler's decisions, and the service behind RabbitMQ."""
    with errors_shown():
        console = terminal()
        rows: list[list[Any]] = [
            [policy, count, *decisions(policy, count, seed)]
            for count in whole_numbers("--pending", pending, 1)
            for policy in POLICIES
        ]
        console.print(table("One decision", DECISION_COLUMNS, rows))
        in_runs = [[count, *beside_runs(count, seed)] for count in whole_numbers("--runs", runs, 0) if count]
        if in_runs:
            console.print(table("Decisions beside sessions in runs, policy wisp+", RUN_COLUMNS, in_runs))
        chosen = [rate for rate in whole_numbers("--rates", rates, 0) if rate]
        served = run(lambda: service(chosen, ConsoleProgress(console), seed)) if chosen else []
        if served:
            console.print(table("The service behind RabbitMQ, policy wisp+", SERVICE_COLUMNS, served))
        record = {
            "title": "Scheduler",
            "facts": machine(),
            "notes": _aims(rows),
            "decisions": records(DECISION_COLUMNS, rows),
            "runs": records(RUN_COLUMNS, in_runs),
            "service": records(SERVICE_COLUMNS, served),
        }
        conclude(console, "scheduler", record)


def _aims(rows: list[list[Any]]) -> list[str]:
    """Compare the slowest policy with each aim."""
    notes = []
    for count, aim in AIMS_MS.items():
        medians = {row[0]: row[2] for row in rows if row[1] == count}
        if medians:
            worst = max(medians, key=medians.__getitem__)
            verdict = "met" if medians[worst] <= aim else "missed"
            notes.append(
                f"aim with {count:,} pending rounds: {aim:g} ms at the median; {verdict} ({worst} {medians[worst]:.2f})"
            )
    return notes


def decisions(policy: str, pending: int, seed: int) -> tuple[float, float, float, float, float]:
    """Return median, 90th and 99th percentile of a decision in ms, mean rounds in a batch, mean µs to add a round."""
    rng = random.Random(seed)
    dispatcher = Dispatcher("bench", SchedulingRules(policy, BatchLimits(400.0, 2048)))
    names = [f"s{i}" for i in range(pending)]
    cached = {name: rng.choice((BASE_LEN - 1, BASE_LEN - 1, BASE_LEN - 1, 0)) for name in names}
    beat = _heartbeat(cached)
    dispatcher.on_heartbeat(beat, 0.0)
    rounds = dict.fromkeys(names, 0)
    now, took, sizes = 0.0, [], []

    def arrive(name: str) -> None:
        dispatcher.on_verify(_round(name, rounds[name], rng), now)

    started = time.perf_counter()
    for name in names:
        arrive(name)
    arrival_us = (time.perf_counter() - started) / pending * 1e6
    for _ in range(DECISIONS):
        now += 50.0
        dispatcher.fleet.verifiers[VERIFIER].seen_ms = now
        started = time.perf_counter()
        sends, _ = dispatcher.dispatch(now)
        elapsed_ms = (time.perf_counter() - started) * 1000
        if not sends:
            continue
        # With a full queue, one call makes two decisions: a batch to run, and one behind it.
        took.append(elapsed_ms / len(sends))
        for _, batch in sends:
            sizes.append(len(batch.jobs))
            for job in batch.jobs:
                dispatcher.on_result(_result(batch, job.session, job.round, job.prefill_to), now)
                if job.prefill_to is None:
                    rounds[job.session] += 1
                    arrive(job.session)
    cuts = quantiles(took, n=100)
    return median(took), cuts[89], cuts[98], sum(sizes) / len(sizes), arrival_us


def beside_runs(sessions: int, seed: int) -> tuple[int, float, float, float, float, float]:
    """Measure decisions beside this many sessions in runs.

    Returns the pending rounds at each decision, mean µs of a report, median, 90th and 99th percentile of a decision in
    ms, and mean ms of a load message.
    """
    rng = random.Random(seed)
    dispatcher = Dispatcher("bench", SchedulingRules("wisp+", BatchLimits(400.0, 10 * sessions + 2048)))
    dispatcher.on_cost_model(FAST, 0.0)
    names = [f"s{i}" for i in range(sessions)]
    others = [f"r{i}" for i in range(ROUNDS_BESIDE_RUNS)]
    dispatcher.on_heartbeat(_heartbeat(dict.fromkeys([*names, *others], BASE_LEN - 1)), 0.0)
    for name in names:
        dispatcher.on_verify(_round(name, 0, rng).model_copy(update={"run_tokens": RUN_TOKENS}), 0.0)
    state = dispatcher.fleet.verifiers[VERIFIER]
    now, length = 0.0, BASE_LEN
    while len(state.runs) < sessions:
        now += 1.0
        for _, batch in dispatcher.dispatch(now)[0]:
            for job in batch.jobs:
                dispatcher.on_result(_result(batch, job.session, job.round, None, run_left=RUN_TOKENS), now)
    length += 1
    took: list[float] = []
    reports_s = loads_s = 0.0
    rounds = dict.fromkeys(others, 0)
    for name in others:
        dispatcher.on_verify(_round(name, 0, rng), now)
    for step in range(DECISIONS):
        now += 20.0
        state.seen_ms = now
        reports = [_report(name, step + 1, length, RUN_TOKENS - step) for name in names]
        length += 1
        started = time.perf_counter()
        for report in reports:
            dispatcher.on_result(report, now)
        reports_s += time.perf_counter() - started
        started = time.perf_counter()
        sends, _ = dispatcher.dispatch(now)
        took.append((time.perf_counter() - started) * 1000)
        started = time.perf_counter()
        dispatcher.load(now)
        loads_s += time.perf_counter() - started
        for _, batch in sends:
            for job in batch.jobs:
                dispatcher.on_result(_result(batch, job.session, job.round, job.prefill_to), now)
                rounds[job.session] += 1
                dispatcher.on_verify(_round(job.session, rounds[job.session], rng), now)
    cuts = quantiles(took, n=100)
    report_us = reports_s / (DECISIONS * sessions) * 1e6
    return len(others), report_us, median(took), cuts[89], cuts[98], loads_s / DECISIONS * 1000


async def service(rates: list[int], progress: ConsoleProgress, seed: int) -> list[list[Any]]:
    """Return the rows of the third table."""
    rows = []
    with RunFolder("bench-scheduler") as folder:
        async with Brokers(folder.path, progress=progress) as brokers:
            for rate in rates:
                namespace = f"bench-{token_hex(4)}"
                async with Stack(
                    "bench-scheduler",
                    gateways=0,
                    drafters=0,
                    estimators=0,
                    verifiers=0,
                    brokers=brokers,
                    namespace=namespace,
                ) as stack:
                    rows.append(await stack.watch(_serve(stack, rate, progress, seed)))
                await delete_namespace(brokers.amqp_url, brokers.redis_url, namespace, brokers.tls)
    return rows


async def _serve(stack: Stack, rate: int, progress: ConsoleProgress, seed: int) -> list[Any]:
    """Publish rounds at a rate and answer every batch at once; return the row of this rate."""
    broker = await Broker.connect(stack.brokers.amqp_url, Topology(stack.namespace), VERIFIER)
    sent_s: dict[str, float] = {}
    waited_ms: list[float] = []

    async def answer(message: Message) -> None:
        assert isinstance(message, Batch)
        for job in message.jobs:
            if (at := sent_s.pop(job.session, None)) is not None:
                waited_ms.append((time.perf_counter() - at) * 1000)
            result = _result(message, job.session, job.round, job.prefill_to)
            await broker.publish(result, topology.RESULT_SCHEDULER)

    await broker.consume(broker.topology.own_queue("verifier", VERIFIER, (topology.batch(VERIFIER),)), answer)
    process = psutil.Process(stack.processes("scheduler")[0].pid)
    with progress.step(f"{rate} rounds a second") as step:
        await broker.publish(FAST, topology.costmodel(VERIFIER))
        await broker.publish(_heartbeat({}), topology.heartbeat(VERIFIER))
        await asyncio.sleep(0.5)
        before = process.cpu_times()
        began = time.perf_counter()
        count = await _publish(broker, rate, random.Random(seed), sent_s)
        spent = time.perf_counter() - began
        served = len(waited_ms)
        after = process.cpu_times()
        step.done(f"{rate} rounds a second: {served / spent:.0f} in batches")
    await broker.close()
    used = (after.user + after.system - before.user - before.system) / spent
    cuts = quantiles(waited_ms, n=100)
    return [count / spent, served / spent, median(waited_ms), cuts[98], f"{used:.0%}", count - served]


async def _publish(broker: Broker, rate: int, rng: random.Random, sent_s: dict[str, float]) -> int:
    """Publish rounds and heartbeats for `SECONDS`; return the number of rounds. `sent_s` gets the time of each."""
    began = beat_s = time.perf_counter()
    count = 0
    while (elapsed := time.perf_counter() - began) < SECONDS:
        if time.perf_counter() - beat_s >= HEARTBEAT_S:
            beat_s = time.perf_counter()
            await broker.publish(_heartbeat({}), topology.heartbeat(VERIFIER))
        while count < elapsed * rate:
            name = f"s{count}"
            sent_s[name] = time.perf_counter()
            await broker.publish(_round(name, 0, rng), topology.VERIFY)
            count += 1
        await asyncio.sleep(TICK_S)
    return count


def _round(name: str, round_: int, rng: random.Random) -> Verify:
    draft = rng.randint(0, 6)
    return Verify(
        session=name,
        round=round_,
        base_len=BASE_LEN + round_,
        draft=[7] * draft,
        acceptance=[rng.random() for _ in range(draft)],
        drafter="bench",
        gateway="bench",
        fingerprint="bench",
        slack_ms=rng.choice([None, rng.uniform(-100, 3000)]),
        tpot_ms=100.0,
    )


def _report(name: str, round_: int, base_len: int, left: int) -> Result:
    return Result(
        session=name,
        round=round_,
        base_len=base_len,
        status=Status.COMMITTED,
        verifier=VERIFIER,
        batch="run",
        tokens=[7],
        run=True,
        run_left=left,
        cached=base_len,
        new_tokens=1,
    )


def _result(batch: Batch, session_id: str, round_: int, prefill_to: int | None, run_left: int = 0) -> Result:
    prefilled = prefill_to is not None
    return Result(
        session=session_id,
        round=round_,
        base_len=BASE_LEN + round_,
        status=Status.PREFILLED if prefilled else Status.COMMITTED,
        verifier=VERIFIER,
        batch=batch.batch,
        tokens=[] if prefilled else [7],
        cached=prefill_to or BASE_LEN + round_,
        run_left=run_left,
    )


def _heartbeat(cached: dict[str, int]) -> Heartbeat:
    return Heartbeat(
        verifier=VERIFIER,
        fingerprint="bench",
        max_len=8192,
        free_tokens=10_000_000,
        total_tokens=10_000_000,
        residency=[Residency(session=name, cached=length) for name, length in cached.items()],
    )


if __name__ == "__main__":
    run_program(main, "wisp bench scheduler")
