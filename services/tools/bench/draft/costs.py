"""Cost of drafting: a draft step, alone and packed, against a step of the target on the same core."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from services.drafter.hidden.engine import DraftEngine, DraftStep
from services.drafter.hidden.forward import Floats
from services.drafter.sources.statistics import draft_tokens
from services.tools.training.evaluate import Costs
from services.tools.training.shards import GeneratedText
from shared.engine import Engine, Step
from shared.messages import Sampling
from shared.sampling.sampler import Columns, choose, choose_in_rows

CONTEXT = 256
REPETITIONS = 40
DRAFT_LENGTH = 4
HOPS_MS = 6.0
"""Time of a round outside the model (`wisp bench rounds`)."""
PACKED = (1, 8, 32)
"""Numbers of sessions in a draft step."""
WARM_UP = 3
"""First repetitions, which do not count."""


@dataclass(frozen=True)
class DraftCosts:
    """Medians in milliseconds."""

    decode_ms: float
    """A step of the target for one session: forward pass and choice."""
    token_ms: float
    """Time that each of four more tokens adds to it."""
    step_ms: dict[int, float]
    """A draft step with choice and statistics, by its number of sessions: the mean over the four steps of a draft. With
    one session, the first step starts with the target's weights in the processor's caches."""

    @property
    def costs(self) -> Costs:
        """The costs in the form that the expected speed needs."""
        return Costs(self.decode_ms + HOPS_MS, self.token_ms, self.step_ms[1])


def measure(engine: Engine, draft: DraftEngine, text: GeneratedText) -> DraftCosts:
    """Measure target and draft in turn, so that a drift of the machine affects both alike."""
    ids = (text.tokens.tolist() * (CONTEXT // len(text.tokens) + 1))[:CONTEXT]
    engine.attach("cost", ids)
    engine.truncate("cost", 0)
    engine.forward([Step("cost", ids[:-1], rows=0)])
    states = np.random.default_rng(0).standard_normal((CONTEXT, draft.hidden_size), np.float32)
    names = [f"cost-{i}" for i in range(max(PACKED))]
    for name in names:
        draft.open(name)
        draft.forward([DraftStep(name, ids[:-1], states[:-1])])
    columns = Columns.of(draft.head_ids)
    operations: dict[str, Callable[[], None]] = {
        "decode": lambda: _verify(engine, ids[-1:]),
        "verify": lambda: _verify(engine, ids[-5:]),
        **{str(n): _drafting(draft, names[:n], ids[-1], states[-1:], columns) for n in PACKED},
    }
    taken = _in_turn(list(operations.values()))
    decode, verify, *drafts = (statistics.median(times) for times in taken)
    steps = [ms / DRAFT_LENGTH for ms in drafts]
    engine.release("cost")
    for name in names:
        draft.release(name)
    return DraftCosts(decode, max(0.0, (verify - decode) / 4), dict(zip(PACKED, steps, strict=True)))


def _verify(engine: Engine, tokens: Sequence[int]) -> None:
    logits = engine.forward([Step("cost", tokens, rows=len(tokens))]).logits
    choose(logits, [Sampling()] * len(tokens), range(len(tokens)))
    engine.truncate("cost", CONTEXT - 1)


def _drafting(
    draft: DraftEngine, names: Sequence[str], token: int, state: Floats, columns: Columns
) -> Callable[[], None]:
    def drafted() -> None:
        for _ in range(DRAFT_LENGTH):
            estimates = draft.forward([DraftStep(name, [token], state) for name in names])
            logits = draft.logits(estimates)
            chosen = choose_in_rows(logits, [Sampling()] * len(names), [CONTEXT] * len(names), columns)
            draft_tokens("hidden", logits, columns.ids.searchsorted(chosen).tolist())
        for name in names:
            draft.truncate(name, CONTEXT - 1)

    return drafted


def _in_turn(operations: Sequence[Callable[[], None]]) -> list[list[float]]:
    """Return the milliseconds of each operation, by repetition."""
    taken: list[list[float]] = [[] for _ in operations]
    for repetition in range(REPETITIONS + WARM_UP):
        for operation, times in zip(operations, taken, strict=True):
            started = time.perf_counter()
            operation()
            if repetition >= WARM_UP:
                times.append((time.perf_counter() - started) * 1000)
    return taken
