"""A session's state in its drafter, and the retransmission timer of its rounds.

The drafter decides nothing about the text: it appends the tokens that results report as committed, and drafts from
there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from services.drafter.core.draft import Draft
from shared import slo
from shared.messages import Failure, Finish, Generate, HiddenFormat, Result, Status, Verify

ALPHA = 1 / 8
BETA = 1 / 4
UNKNOWN_MS = 5000.0
"""Timeout before the first measurement."""
LONGEST_MS = 30_000.0
LONGEST_BACKOFF_MS = 5000.0
"""Doubling ends here, so that a round is sent again soon after an outage. A round that usually takes longer gets that
time."""


@dataclass
class DraftSession:
    """A session's state between rounds. `elapsed_ms` arguments count from the request's arrival at the gateway."""

    generate: Generate
    tokens: list[int]
    """All committed tokens, the prompt included."""
    round: int = 0
    """Number of the round in flight, or of the next one."""
    first_ms: float | None = None
    """Time of the first output token, counted like `elapsed_ms`."""
    finish: Finish | None = None
    failure: Failure | None = None
    committed_in: list[str] = field(default_factory=list)
    """Arithmetics in which its tokens were committed."""
    run_left: int = 0
    """Tokens that the verifier may still decode by itself; 0 if the next token needs a round."""

    @property
    def session_id(self) -> str:
        """The session's id."""
        return self.generate.session

    @property
    def done(self) -> bool:
        """True if no further round is needed."""
        return self.finish is not None or self.failure is not None

    @property
    def output_tokens(self) -> int:
        """Number of committed tokens after the prompt."""
        return len(self.tokens) - len(self.generate.prompt)

    def draft_room(self, draft_length: int, assumed: int = 0) -> int:
        """Return the longest useful draft after `assumed` more tokens; the bonus token takes the last place."""
        return max(0, min(draft_length, self.generate.max_tokens - self.output_tokens - assumed - 1))

    def verify(
        self,
        draft: list[int],
        acceptance: list[float],
        drafter_id: str,
        elapsed_ms: float,
        draft_ms: float,
        attempt: int = 0,
        hidden_from: int | None = None,
        hidden_format: HiddenFormat = HiddenFormat.BFLOAT16,
        run_tokens: int = 0,
        run_copies: int = 0,
        sources: Sequence[str] = (),
    ) -> Verify:
        """Return the round's message to the scheduler. sources: of the draft tokens; sent with a trace only."""
        return Verify(
            session=self.session_id,
            round=self.round,
            base_len=len(self.tokens),
            draft=draft,
            acceptance=acceptance,
            drafter=drafter_id,
            gateway=self.generate.gateway,
            fingerprint=self.generate.fingerprint,
            slack_ms=slo.slack_ms(self.generate.slo, elapsed_ms, self.output_tokens, self.first_ms),
            tpot_ms=self.generate.slo.tpot_ms if self.generate.slo else None,
            service_class=self.generate.service_class,
            draft_ms=draft_ms,
            attempt=attempt,
            session_key=self.generate.session_key,
            hidden_from=hidden_from,
            hidden_format=hidden_format,
            committed_in=self.committed_in,
            run_tokens=run_tokens,
            run_copies=run_copies,
            sources=list(sources) if self.generate.trace else [],
            grouped=self.generate.grouped,
        )

    def apply(self, result: Result) -> bool:
        """Apply a result, and return whether it settles the round in flight, or brings new tokens of a run.

        Results may arrive twice, late, or for a round of this session's previous drafter. When Redis has lost committed
        tokens, the session goes back to those that are left; the target chooses the same tokens again.
        """
        if self.done:
            return False
        if result.run and result.status is Status.COMMITTED:
            return self._apply_run(result)
        if result.round != self.round:
            return False
        if result.status is Status.FAILED:
            self.failure = result.error
            return True
        if result.status is Status.PREFILLED or result.base_len > len(self.tokens):
            return False
        self.tokens[result.base_len :] = result.tokens
        self.finish = result.finish
        self.committed_in = result.committed_in or self.committed_in
        self.run_left = result.run_left
        self.round += 1
        return True

    def _apply_run(self, result: Result) -> bool:
        """Apply tokens of a run. A report after a lost one changes nothing: the next round asks for all tokens."""
        known = len(self.tokens)
        if result.base_len + len(result.tokens) == known and not result.run_left and self.run_left:
            self.run_left = 0  # its tokens came with another answer
            self.finish = result.finish
            return True
        if not result.base_len <= known < result.base_len + len(result.tokens):
            return False
        self.tokens[result.base_len :] = result.tokens
        self.finish = result.finish
        self.committed_in = result.committed_in or self.committed_in
        self.run_left = result.run_left
        self.round = max(self.round, result.round + 1)
        return True


def verified_counts(result: Result) -> tuple[int, int]:
    """Return how many draft tokens a committed round verified, and how many of these it accepted."""
    # Draft tokens behind the end of the text are not verified. A result that repeats an earlier commit of the round has
    # verified nothing; its `trimmed_to` is 0.
    ended = len(result.tokens) <= result.accepted
    verified = min(result.trimmed_to, result.accepted) if ended else result.trimmed_to
    return verified, min(result.accepted, verified)


def bonus_matches(draft: Draft, result: Result) -> bool | None:
    """Return whether the drafted token after the verified ones is the one that the target chose there.

    None if a token before it was rejected, the text ended before it, or no such token was drafted.
    """
    verified, accepted = verified_counts(result)
    drafted = [*draft.tokens, draft.dropped]
    if accepted < verified or len(result.tokens) <= accepted or verified >= len(drafted):
        return None
    token = drafted[verified]
    return None if token is None else token == result.tokens[accepted]


@dataclass
class RoundTimer:
    """Timeout after which a round without a result is sent again.

    The retransmission timer of TCP (RFC 6298, section 2): smoothed round time plus four times its mean deviation,
    doubled with every attempt up to `LONGEST_BACKOFF_MS`.
    """

    shortest_ms: float
    smoothed_ms: float | None = None
    deviation_ms: float = 0.0

    def learn(self, measured_ms: float) -> None:
        """Learn from a round that was sent once."""
        if self.smoothed_ms is None:
            self.smoothed_ms, self.deviation_ms = measured_ms, measured_ms / 2
            return
        self.deviation_ms += BETA * (abs(self.smoothed_ms - measured_ms) - self.deviation_ms)
        self.smoothed_ms += ALPHA * (measured_ms - self.smoothed_ms)

    def timeout_ms(self, attempt: int) -> float:
        """Return the time to wait for the result of an attempt; the first is attempt 0."""
        base = UNKNOWN_MS if self.smoothed_ms is None else self.smoothed_ms + 4 * self.deviation_ms
        first = min(LONGEST_MS, max(self.shortest_ms, base))
        return float(max(first, min(LONGEST_BACKOFF_MS, first * 2**attempt)))


class RoundTimers:
    """The timers that all sessions of a drafter share.

    A session's first round computes the prompt, so first rounds have a timer of their own.
    """

    def __init__(self, shortest_ms: float) -> None:
        self._first = RoundTimer(shortest_ms)
        self._later = RoundTimer(shortest_ms)

    def of(self, session: DraftSession) -> RoundTimer:
        """Return the timer for the session's next round."""
        return self._first if session.output_tokens == 0 else self._later


def wasted_tokens(drafted: int, verified: int, accepted: int) -> int:
    """Return a round's draft tokens past the first rejected one; 0 if no verified token was rejected."""
    return max(0, drafted - accepted - 1) if accepted < verified else 0
