"""How well a batch's time is predicted: the start-up profile alone, the model after live batches, and a plain line.

A verifier's engine is profiled as at its start, then runs a stream of batches as live traffic makes them, from which
the model learns as the estimator does. Then come held-out batches of all kinds, from which nothing is learnt. Every
session has its own cached tokens. The plain line has no rows of logits and one price for all new tokens, and is fitted
at once to all that the other models have seen.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.progress import Progress

from services.tools.bench.support.report import report
from services.tools.local.folder import state_folder
from services.verifier.profile import profile
from shared import cost
from shared.cost.fit import VerifierFit, non_negative
from shared.engine import Engine, Step
from shared.messages import CostModel, Measurement
from shared.models.prepare import prepare

DECODE, VERIFY, PREFILL, MIXED = KINDS = ("decode", "verify", "prefill chunk", "mixed")
TRAFFIC = (0.3, 0.5, 0.1, 0.1)
"""Shares of the kinds in the live stream."""
SESSIONS = 32
SHORTEST, LONGEST = 16, 1500
DRAFT = 8
CHUNKS = (16, 256)
LEARN_EVERY = 4
"""Live batches between two models, as an estimator publishes them at about this rate."""
PROFILE_ONLY, ONLINE, LINE = "start-up profile", "after live batches", "plain line"
COLUMNS = ["kind", "model", "batches", "median %", "p90 %", "p95 %", "p99 %"]

Batch = list[tuple[int, int, int]]
"""Session, new tokens, rows of logits."""


def batch_of(kind: str, rng: random.Random) -> Batch:
    """A random batch of a kind; small ones are as likely as large ones."""
    count = 1 if kind == PREFILL else round(2 ** rng.uniform(0, np.log2(SESSIONS)))
    sessions = rng.sample(range(SESSIONS), count)
    drafts = [0 if kind == DECODE else rng.randint(0, DRAFT) for _ in sessions]
    batch = [(session, draft + 1, draft + 1) for session, draft in zip(sessions, drafts, strict=True)]
    if kind in (PREFILL, MIXED):
        batch[0] = (sessions[0], rng.randint(*CHUNKS), 0)
    return batch


class FilledEngine:
    """Sessions of different lengths, filled once with tokens of their own."""

    def __init__(self, engine: Engine, rng: random.Random) -> None:
        self._engine = engine
        steps = SESSIONS - 1
        self.lengths = [round(SHORTEST * (LONGEST / SHORTEST) ** (i / steps)) for i in range(SESSIONS)]
        self._tokens = [
            [rng.randrange(engine.vocab_size) for _ in range(length + max(CHUNKS))] for length in self.lengths
        ]

    def fill(self, session: int) -> None:
        """Compute a session's tokens."""
        self._engine.attach(str(session), [])
        self._engine.forward([Step(str(session), self._tokens[session][: self.lengths[session]], rows=0)])

    def measure(self, batch: Batch) -> Measurement:
        """Run a batch; the sessions are cut back to their length afterwards."""
        steps = []
        for session, new, rows in batch:
            length = self.lengths[session]
            steps.append(Step(str(session), self._tokens[session][length : length + new], rows))
        started = time.perf_counter()
        self._engine.forward(steps).logits.argmax(-1).tolist()
        took_ms = (time.perf_counter() - started) * 1000
        for session, _, _ in batch:
            self._engine.truncate(str(session), self.lengths[session])
        shape = cost.shape_of((new, self.lengths[session] + new, rows) for session, new, rows in batch)
        return Measurement(shape=shape, measured_ms=took_ms)


def plain_line(measured: Sequence[Measurement]) -> CostModel:
    """The five-coefficient model with the least relative error."""
    rows = np.array([[x / one.measured_ms for x in cost.features(one.shape)] for one in measured])
    rows[:, 2] += rows[:, 6]
    rows = rows[:, :5]
    found = non_negative(rows.T @ rows, rows.sum(0))
    return cost.FALLBACK.model_copy(update={"coefficients": [*map(float, found), 0.0, float(found[2])]})


def errors(model: CostModel, measured: Sequence[Measurement]) -> list[float]:
    """Median, 90th, 95th and 99th percentile of the absolute error, in percent of the measured time."""
    found = [abs(cost.predict_ms(model, one.shape) / one.measured_ms - 1) * 100 for one in measured]
    return [float(q) for q in np.quantile(found, (0.5, 0.9, 0.95, 0.99))]


def table_of(models: dict[str, CostModel], held_out: dict[str, list[Measurement]]) -> list[list[Any]]:
    """One row per kind and model, all kinds together last."""
    kinds = {**held_out, "all": [one for measured in held_out.values() for one in measured]}
    return [
        [kind, name, len(measured), *errors(model, measured)]
        for kind, measured in kinds.items()
        for name, model in models.items()
    ]


def call_us(model: CostModel, measured: Sequence[Measurement], calls: int = 100_000) -> float:
    """Microseconds of one prediction."""
    shapes = [one.shape for one in measured]
    started = time.perf_counter()
    for i in range(calls):
        cost.predict_ms(model, shapes[i % len(shapes)])
    return (time.perf_counter() - started) * 1e6 / calls


def solve_us(fit: VerifierFit, measured: Sequence[Measurement]) -> float:
    """Microseconds of learning one batch and making a model, publishing left aside."""
    started = time.perf_counter()
    for one in measured:
        fit.add(one)
        fit.model()
    return (time.perf_counter() - started) * 1e6 / len(measured)


def main(
    model: Annotated[str, typer.Option(help="packaged model or a Hugging Face folder")] = "smollm2-135m-instruct",
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32")] = "bfloat16",
    threads: Annotated[int, typer.Option(help="CPU threads, 0 for all cores", min=0)] = 1,
    live: Annotated[int, typer.Option(help="batches of the live stream", min=1)] = 200,
    held: Annotated[int, typer.Option(help="held-out batches of each kind", min=1)] = 60,
    seed: Annotated[int, typer.Option(help="of the batches")] = 1,
) -> None:
    """Measure and report."""
    rng = random.Random(seed)
    threads = threads or torch.get_num_threads()
    folder = prepare(model, state_folder() / "models")
    engine = Engine(folder, dtype=dtype, threads=threads, budget_tokens=SESSIONS * (LONGEST + max(CHUNKS)))
    fit = VerifierFit("bench")
    held_out: dict[str, list[Measurement]] = {kind: [] for kind in KINDS}
    with Progress(transient=True) as progress:
        bar = progress.add_task("start-up profile", total=None)
        started = time.perf_counter()
        seen = list(profile(engine))
        profile_s = time.perf_counter() - started
        profiled = len(seen)
        fit.start_from(seen)
        models = {PROFILE_ONLY: fit.model()}
        progress.remove_task(bar)
        bench = FilledEngine(engine, rng)
        bar = progress.add_task("filling the cache", total=sum(bench.lengths))
        for session, length in enumerate(bench.lengths):
            bench.fill(session)
            progress.advance(bar, length)
        bar = progress.add_task("live batches", total=live)
        for i in range(live):
            measured = bench.measure(batch_of(rng.choices(KINDS, TRAFFIC)[0], rng))
            fit.add(measured)
            seen.append(measured)
            if i % LEARN_EVERY == LEARN_EVERY - 1:
                fit.model()
            progress.advance(bar)
        models |= {ONLINE: fit.model(), LINE: plain_line(seen)}
        bar = progress.add_task("held-out batches", total=held * len(KINDS))
        # The kinds alternate, so that a slow spell of the machine spoils none of them alone.
        for _ in range(held):
            for kind in KINDS:
                held_out[kind].append(bench.measure(batch_of(kind, rng)))
                progress.advance(bar)
    predict, solve = call_us(models[ONLINE], seen), solve_us(fit, seen)
    report(
        "estimator",
        f"Error of predicted batch times, {folder.name}, {dtype}, {threads} threads",
        COLUMNS,
        table_of(models, held_out),
        facts={
            "model": folder.name,
            "dtype": dtype,
            "threads": threads,
            "profiled": profiled,
            "profile_s": round(profile_s, 2),
            "live": live,
            "seed": seed,
            "coefficients": {name: [round(c, 4) for c in one.coefficients] for name, one in models.items()},
            "predict_us": round(predict, 3),
            "solve_us": round(solve, 1),
        },
        notes=[
            f"one prediction {predict:.2f} µs; learning a batch and solving {solve:.0f} µs; "
            f"the start-up profile took {profile_s:.1f} s",
        ],
    )


if __name__ == "__main__":
    typer.run(main)
