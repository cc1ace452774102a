"""Profile of a verifier, measured at its start, so that even the first batches are predicted well."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from services.verifier.core.profile_plan import ProfileBatch, ProfilePlan, profile_batches
from shared.engine.blocks import block_names
from shared.engine.steps import Step
from shared.kernels.layout import BLOCK
from shared.messages import Measurement

if TYPE_CHECKING:
    from services.verifier.engine_thread import TargetEngine

BUDGET_S = 3.0
"""Time of a profile after its first batch, which also loads and touches memory."""
LIMIT_S = 4.5
"""Time of the whole. A stalled machine may exceed it by what one batch takes longer than expected."""


def profile(engine: TargetEngine, budget_s: float = BUDGET_S) -> Sequence[Measurement]:
    """Measure batches of several shapes for about `budget_s`, at most `LIMIT_S`; return the measurements.

    One batch, the smallest, runs whatever the budget is. The engine must have no sessions; its cache is empty
    afterwards.
    """
    started = time.perf_counter()
    batches = profile_batches(engine.free_tokens // 2, engine.max_len, BLOCK)
    plan = ProfilePlan(batches, budget_s * 1000, LIMIT_S * 1000)
    try:
        while (batch := plan.next((time.perf_counter() - started) * 1000)) is not None:
            plan.add(batch, measure_batch(engine, batch))
    finally:
        # Its blocks hold no real keys and values, so no session may share them.
        engine.reset()
    return plan.measured


def measure_batch(engine: TargetEngine, batch: ProfileBatch) -> float:
    """Return the milliseconds of a batch. The engine has no sessions of its own."""
    steps = []
    for job in range(batch.jobs):
        session_id = f"profile-{job}"
        tokens = [(7 * i + 13 * job + 11) % engine.vocab_size for i in range(batch.context + batch.new)]
        _fill(engine, tokens[: batch.context])
        engine.attach(session_id, tokens[: batch.context + 1])
        steps.append(Step(session_id, tokens[batch.context :], batch.rows))
    started = time.perf_counter()
    engine.forward(steps).wait()
    elapsed_ms = (time.perf_counter() - started) * 1000
    for step in steps:
        engine.release(step.session_id)
    return elapsed_ms


def _fill(engine: TargetEngine, tokens: Sequence[int]) -> None:
    """Put blocks of zeros into the cache in place of the tokens' keys and values: computing them would take longer
    than the batches, and the time of attention does not depend on them."""
    for name in block_names(tokens):
        if not engine.has_block(name):
            engine.adopt(name, bytes(engine.block_bytes))
