"""Measuring a verifier at its start, so that the first batches are already predicted well."""

from __future__ import annotations

import time
from collections.abc import Iterator

from shared import cost
from shared.engine import Engine, Step
from shared.messages import Measurement

REPETITIONS = 2
CONTEXTS = (64, 448)
PREFILLS = (64, 256)


def profile(engine: Engine, budget_s: float = 4.0) -> Iterator[Measurement]:
    """Run batches over a small grid of shapes and yield what each took.

    The sessions of a batch share one prefix, so their context is computed once. Stops early when the time budget is
    used up, after at least one batch of each kind. Leaves the cache as it was but for reclaimable blocks.
    """
    started = time.perf_counter()
    tokens = [(7 * i + 11) % engine.vocab_size for i in range(max(CONTEXTS) + max(PREFILLS) + 1)]
    contexts = [c for c in CONTEXTS if c + 16 <= engine.max_len]
    shapes = [(jobs, new, context) for context in contexts for jobs in (1, 4, 8) for new in (1, 5)]

    # The first pass pays for things that no later one does: kernels compiled or loaded, memory touched.
    _measure(engine, [("profile-0", 0, min(max(PREFILLS), engine.max_len))], tokens)
    engine.release("profile-0")
    for count in PREFILLS:
        if count <= engine.max_len:
            yield _measure(engine, [("profile-0", 0, count)], tokens)
            engine.release("profile-0")
    for repetition in range(REPETITIONS):
        for jobs, new, context in shapes:
            if jobs * (context % 64 + new) + context > engine.free_tokens // 2:
                continue
            if repetition and time.perf_counter() - started > budget_s:
                return
            names = [f"profile-{i}" for i in range(jobs)]
            for name in names:
                # One token more than the context, because the last one is always left to be computed.
                held = engine.attach(name, tokens[: context + 1])
                if held < context:
                    engine.forward([Step(name, tokens[held:context], rows=0)])
                    # Agreeing with its own tokens offers the first session's blocks to the others.
                    engine.attach(name, tokens[: context + 1])
            yield _measure(engine, [(name, context, new) for name in names], tokens)
            for name in names:
                engine.release(name)


def _measure(engine: Engine, jobs: list[tuple[str, int, int]], tokens: list[int]) -> Measurement:
    steps = []
    for name, context, new in jobs:
        if context == 0:
            engine.attach(name, tokens[:1])
        steps.append(Step(name, tokens[context : context + new], rows=min(new, 5)))
    started = time.perf_counter()
    engine.forward(steps).logits.argmax(-1).tolist()
    elapsed_ms = (time.perf_counter() - started) * 1000
    shape = cost.shape_of((new, context + new, min(new, 5)) for _, context, new in jobs)
    return Measurement(shape=shape, measured_ms=elapsed_ms)
