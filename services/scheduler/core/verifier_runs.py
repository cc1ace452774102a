"""The sessions that one verifier decodes in runs, according to their reports, and the work that they add to a step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from services.scheduler.core.mutable_shape import MutableShape
from shared.kernels.layout import BLOCK

PACE_STEPS = 32
"""Steps that the pace of a session's runs is averaged over."""


@dataclass(frozen=True)
class RunPace:
    """The rows and tokens of a run in a step, on average: one, or more where the run copies.

    The average includes steps with a batch, in which no run copies.
    """

    rows: float = 1.0
    """Rows of logits: that of its next token, and those of its copies."""
    tokens: float = 1.0
    """Tokens that the session gets."""

    def after(self, steps: int, rows: int, tokens: int) -> RunPace:
        """Return the pace after these steps, at least one, which computed and brought so much."""
        share = min(1.0, steps / PACE_STEPS)
        return RunPace(
            self.rows + share * (rows / steps - self.rows), self.tokens + share * (tokens / steps - self.tokens)
        )


ONE_TOKEN = RunPace()
"""The pace of a run without copies."""


class ExpectedShape(NamedTuple):
    """Expected shape of a step: that of `BatchShape`, with fractions of tokens."""

    jobs: int
    new_tokens: float
    new_context: float
    context: float
    rows: float


@dataclass(frozen=True)
class RunningRun:
    """A session in a run."""

    length: int
    """Committed length."""
    drafter_id: str | None
    """Drafter of the round that it began with; None if another scheduler had that round."""
    reported_ms: float
    pace: RunPace = ONE_TOKEN


class VerifierRuns:
    """The runs of one verifier. Their sums are kept, since every decision asks for them.

    A step with a batch computes one token of each run (`shape`), a step without one also the copies of those that copy
    (`expected`).
    """

    def __init__(self) -> None:
        self._runs: dict[str, RunningRun] = {}
        self.shape = MutableShape()
        """Shape of the runs' part of a step with a batch. Do not change it."""
        self._copied = 0.0
        """Rows of copies that a step without a batch is expected to have."""
        self._copied_context = 0.0
        """The sum of these rows, each times the length of its session."""
        self.cache_tokens = 0
        """Tokens of the cache, in whole blocks, that their next step needs."""

    def __len__(self) -> int:
        return len(self._runs)

    def __iter__(self) -> Iterator[str]:
        return iter(self._runs)

    def __contains__(self, session_id: str) -> bool:
        return session_id in self._runs

    def items(self) -> Iterable[tuple[str, RunningRun]]:
        """Return the sessions with their runs."""
        return self._runs.items()

    @property
    def expected(self) -> ExpectedShape:
        """The expected shape of a step without a batch."""
        shape, copied = self.shape, self._copied
        return ExpectedShape(
            shape.jobs,
            shape.new_tokens + copied,
            shape.new_context + self._copied_context,
            shape.context + copied,
            shape.rows + copied,
        )

    @property
    def reported_ms(self) -> float:
        """Time of the latest report; 0 without runs."""
        # `set` moves a run to the end.
        return next(reversed(self._runs.values())).reported_ms if self._runs else 0.0

    def get(self, session_id: str) -> RunningRun | None:
        """Return a session's run; None if it has none."""
        return self._runs.get(session_id)

    def set(self, session_id: str, run: RunningRun) -> None:
        """Add a session's run, or replace it."""
        self.pop(session_id)
        self._runs[session_id] = run
        self.shape.add(*_job(run))
        self.cache_tokens += whole_blocks(run.length + 1)
        self._add_copies(run, 1.0)

    def pop(self, session_id: str) -> RunningRun | None:
        """Remove and return a session's run; None if it has none."""
        run = self._runs.pop(session_id, None)
        if run is not None:
            self.shape.remove(*_job(run))
            self.cache_tokens -= whole_blocks(run.length + 1)
            self._add_copies(run, -1.0)
        return run

    def _add_copies(self, run: RunningRun, sign: float) -> None:
        if not self._runs:
            self._copied = self._copied_context = 0.0  # without what rounding has left
            return
        copied = run.pace.rows - 1.0
        self._copied += sign * copied
        self._copied_context += sign * copied * (run.length + 1)

    def drop_silent(self, before_ms: float) -> None:
        """Remove the runs whose last report came before this time."""
        # In order of their reports, because `set` moves a run to the end.
        while self._runs:
            session_id, run = next(iter(self._runs.items()))
            if run.reported_ms >= before_ms:
                return
            self.pop(session_id)


def _job(run: RunningRun) -> tuple[int, int, int]:
    """Return what a run adds to a step: new tokens, the session's length after them, rows of logits."""
    return 1, run.length + 1, 1


def whole_blocks(length: int) -> int:
    """Return the tokens of the cache that a session of this length takes."""
    return -(-length // BLOCK) * BLOCK
