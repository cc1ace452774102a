"""Profile of a verifier, measured at its start, so that even the first batches are predicted well."""

from __future__ import annotations

import time
from collections.abc import Iterator

from shared import cost
from shared.engine import Engine, Step
from shared.messages import Measurement

REPETITIONS = 3
CONTEXTS = (64, 768)
CHUNK = 256
KINDS = ((1, 1, 1), (1, 5, 5), (1, 48, 0), (4, 1, 1), (4, 9, 9), (12, 1, 1), (12, 5, 5))
"""Jobs of a batch, new tokens and rows of logits of each: rounds without and with a draft, and a chunk of a prompt."""


def profile(engine: Engine, budget_s: float = 4.0) -> Iterator[Measurement]:
    """Run batches over a small grid of shapes and yield a measurement of each.

    The sessions of a batch share one prefix, so their context is computed once, in chunks that are measured as well.
    Stops early when the time budget is used up, after at least one batch of each shape that fits the cache. Leaves the
    cache as it was, except for reclaimable blocks.
    """
    started = time.perf_counter()
    tokens = [(7 * i + 11) % engine.vocab_size for i in range(max(CONTEXTS) + CHUNK)]
    room = min(engine.max_len, engine.free_tokens // 2)
    contexts = [context for context in CONTEXTS if context + max(new for _, new, _ in KINDS) <= room]
    # The first pass pays once for loading or compiling kernels and for touching memory, so it is not yielded.
    _measure(engine, [("profile-0", 0, min(CHUNK, room), 0)], tokens)
    engine.release("profile-0")
    for start in range(0, max(contexts, default=0), CHUNK):
        yield _measure(engine, [("profile-0", start, min(CHUNK, max(contexts) - start), 0)], tokens)
    engine.release("profile-0")
    for repetition in range(REPETITIONS):
        for context in contexts:
            for jobs, new, rows in KINDS:
                if jobs * (context % 64 + new) + context > engine.free_tokens // 2:
                    continue
                if repetition and time.perf_counter() - started > budget_s:
                    return
                batch = [(f"profile-{i}", context, new, rows) for i in range(jobs)]
                for session_id, *_ in batch:
                    # One token more than the context, because the last one is always left to be computed.
                    held = engine.attach(session_id, tokens[: context + 1])
                    if held < context:
                        engine.forward([Step(session_id, tokens[held:context], rows=0)])
                        # Attaching indexes the first session's blocks, so that the others can share them.
                        engine.attach(session_id, tokens[: context + 1])
                yield _measure(engine, batch, tokens)
                for session_id, *_ in batch:
                    engine.release(session_id)


def _measure(engine: Engine, jobs: list[tuple[str, int, int, int]], tokens: list[int]) -> Measurement:
    """Measure one batch of jobs: session, tokens that it has in the cache, new tokens, rows of logits."""
    steps = []
    for session_id, context, new, rows in jobs:
        if context == 0:
            engine.attach(session_id, tokens[:1])
        steps.append(Step(session_id, tokens[context : context + new], rows))
    started = time.perf_counter()
    engine.forward(steps).logits.argmax(-1).tolist()
    elapsed_ms = (time.perf_counter() - started) * 1000
    shape = cost.shape_of((new, context + new, rows) for _, context, new, rows in jobs)
    return Measurement(shape=shape, measured_ms=elapsed_ms)
