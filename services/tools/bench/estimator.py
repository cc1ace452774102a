"""`wisp bench estimator`: error of predicted batch times, by kind of batch and by cost model.

The benchmark compares three models: the start-up profile alone, the model after live batches, and a plain line. It
profiles an engine as a verifier does at its start. Then the engine runs a stream of batches like those of live traffic,
and the model learns from them as in the estimator. Held-out batches of all kinds follow; no model learns from them.
Every session has its own cached tokens. The plain line ignores rows of logits, has one price for all new tokens, and is
fitted once to all batches that the other models learned from.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.progress import Progress

from services.tools.bench.support.options import (
    DtypeOption,
    EngineThreadsOption,
    ModelOption,
    run_program,
    target_folder,
)
from services.tools.bench.support.report import report, terminal
from services.tools.cli.terminal import errors_shown
from services.tools.local.progress import ConsoleProgress
from services.tools.local.settings import DEFAULT_TARGET
from services.verifier.profile import profile
from shared import cost
from shared.cost.fit import VerifierFit, non_negative
from shared.engine import Engine, Step
from shared.messages import CostModel, Measurement
from shared.models.folder import AUTO, ModelFolder

DECODE, VERIFY, PREFILL, MIXED = KINDS = ("decode", "verify", "prefill chunk", "mixed")
TRAFFIC = (0.3, 0.5, 0.1, 0.1)
"""Shares of the kinds in the live stream."""
SESSIONS = 32
SHORTEST, LONGEST = 16, 1500
DRAFT = 8
CHUNKS = (16, 256)
LEARN_EVERY = 4
"""Live batches between two models; an estimator publishes models at about this rate."""
PROFILE_ONLY, ONLINE, LINE = "start-up profile", "after live batches", "plain line"
COLUMNS = ["kind", "model", "batches", "median %", "p90 %", "p95 %", "p99 %"]

Batch = list[tuple[int, int, int]]
"""Session, new tokens, rows of logits."""


def batch_of(kind: str, rng: random.Random) -> Batch:
    """Draw a batch of a kind. Sizes are drawn log-uniformly."""
    count = 1 if kind == PREFILL else round(2 ** rng.uniform(0, np.log2(SESSIONS)))
    sessions = rng.sample(range(SESSIONS), count)
    drafts = [0 if kind == DECODE else rng.randint(0, DRAFT) for _ in sessions]
    batch = [(session, draft + 1, draft + 1) for session, draft in zip(sessions, drafts, strict=True)]
    if kind in (PREFILL, MIXED):
        batch[0] = (sessions[0], rng.randint(*CHUNKS), 0)
    return batch


class FilledEngine:
    """An engine with sessions of different lengths, each filled once with its own tokens."""

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
        """Run a batch, and truncate the sessions to their length afterwards."""
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
    """Return the model of five coefficients with the least relative error."""
    rows = np.array([[x / one.measured_ms for x in cost.features(one.shape)] for one in measured])
    rows[:, 2] += rows[:, 6]
    rows = rows[:, :5]
    found = non_negative(rows.T @ rows, rows.sum(0))
    return cost.FALLBACK.model_copy(update={"coefficients": [*map(float, found), 0.0, float(found[2])]})


def errors(model: CostModel, measured: Sequence[Measurement]) -> list[float]:
    """Return the median, 90th, 95th and 99th percentile of the absolute error, in percent of the measured time."""
    found = [abs(cost.predict_ms(model, one.shape) / one.measured_ms - 1) * 100 for one in measured]
    return [float(q) for q in np.quantile(found, (0.5, 0.9, 0.95, 0.99))]


def table_of(models: dict[str, CostModel], held_out: dict[str, list[Measurement]]) -> list[list[Any]]:
    """Return one row for each kind and model, and rows for all kinds together."""
    kinds = {**held_out, "all": [one for measured in held_out.values() for one in measured]}
    return [
        [kind, name, len(measured), *errors(model, measured)]
        for kind, measured in kinds.items()
        for name, model in models.items()
    ]


def call_us(model: CostModel, measured: Sequence[Measurement], calls: int = 100_000) -> float:
    """Return the microseconds of one prediction."""
    shapes = [one.shape for one in measured]
    started = time.perf_counter()
    for i in range(calls):
        cost.predict_ms(model, shapes[i % len(shapes)])
    return (time.perf_counter() - started) * 1e6 / calls


def solve_us(fit: VerifierFit, measured: Sequence[Measurement]) -> float:
    """Return the microseconds of learning one batch and solving for a model, without publishing it."""
    started = time.perf_counter()
    for one in measured:
        fit.add(one)
        fit.model()
    return (time.perf_counter() - started) * 1e6 / len(measured)


def main(
    model: ModelOption = DEFAULT_TARGET,
    dtype: DtypeOption = AUTO,
    threads: EngineThreadsOption = 1,
    live: Annotated[int, typer.Option(min=1, help="Batches of the live stream.")] = 200,
    held: Annotated[int, typer.Option(min=1, help="Held-out batches of each kind.")] = 60,
    seed: Annotated[int, typer.Option(help="Seed of the batches.")] = 1,
) -> None:
    """Measure how well batch times are predicted."""
    with errors_shown():
        threads = threads or torch.get_num_threads()
        folder = target_folder(model, ConsoleProgress(terminal()))
        dtype = ModelFolder(folder).resolved(dtype)
        engine = Engine(folder, dtype=dtype, threads=threads, budget_tokens=SESSIONS * (LONGEST + max(CHUNKS)))
        found = _compare(engine, live, held, random.Random(seed))
        predict, solve = call_us(found.models[ONLINE], found.learnt), solve_us(found.fit, found.learnt)
        report(
            "estimator",
            f"Error of predicted batch times, {folder.name}, {dtype}, {threads} threads",
            COLUMNS,
            table_of(found.models, found.held_out),
            facts={
                "model": folder.name,
                "dtype": dtype,
                "threads": threads,
                "profiled": found.profiled,
                "profile_s": round(found.profile_s, 2),
                "live": live,
                "seed": seed,
                "coefficients": {name: [round(c, 4) for c in one.coefficients] for name, one in found.models.items()},
                "predict_us": round(predict, 3),
                "solve_us": round(solve, 1),
            },
            notes=[
                f"one prediction {predict:.2f} µs; learning a batch and solving {solve:.0f} µs; "
                f"the start-up profile took {found.profile_s:.1f} s",
            ],
        )


@dataclass
class CostModelComparison:
    """Cost models fitted to the same batches, and held-out batches to compare them on."""

    fit: VerifierFit
    models: dict[str, CostModel]
    learnt: list[Measurement]
    """Every batch of the profile and of the live stream."""
    held_out: dict[str, list[Measurement]]
    profiled: int
    """Batches of the profile."""
    profile_s: float


def _compare(engine: Engine, live: int, held: int, rng: random.Random) -> CostModelComparison:
    fit = VerifierFit("bench")
    with Progress(transient=True) as progress:
        bar = progress.add_task("start-up profile", total=None)
        started = time.perf_counter()
        learnt = list(profile(engine))
        profile_s = time.perf_counter() - started
        profiled = len(learnt)
        fit.start_from(learnt)
        models = {PROFILE_ONLY: fit.model()}
        progress.remove_task(bar)
        filled = FilledEngine(engine, rng)
        bar = progress.add_task("filling the cache", total=sum(filled.lengths))
        for session, length in enumerate(filled.lengths):
            filled.fill(session)
            progress.advance(bar, length)
        bar = progress.add_task("live batches", total=live)
        for i in range(live):
            measured = filled.measure(batch_of(rng.choices(KINDS, TRAFFIC)[0], rng))
            fit.add(measured)
            learnt.append(measured)
            if i % LEARN_EVERY == LEARN_EVERY - 1:
                fit.model()
            progress.advance(bar)
        models |= {ONLINE: fit.model(), LINE: plain_line(learnt)}
        bar = progress.add_task("held-out batches", total=held * len(KINDS))
        held_out: dict[str, list[Measurement]] = {kind: [] for kind in KINDS}
        # Kinds alternate, so that a slow spell of the machine does not affect one kind alone.
        for _ in range(held):
            for kind in KINDS:
                held_out[kind].append(filled.measure(batch_of(kind, rng)))
                progress.advance(bar)
    return CostModelComparison(fit, models, learnt, held_out, profiled, profile_s)


if __name__ == "__main__":
    run_program(main, "wisp bench estimator")
