"""One session as its drafter sees it: the committed tokens, the round in flight. Pure.

The drafter decides nothing about the text. It appends what results say is committed, and builds the next round on it.
"""

from __future__ import annotations

from dataclasses import dataclass

from shared import slo
from shared.messages import Failure, Finish, Generate, HiddenFormat, Result, Status, Verify


@dataclass
class DraftSession:
    """A session's state between rounds. `elapsed_ms` arguments count from the request's arrival at the gateway."""

    generate: Generate
    tokens: list[int]
    """Every committed token, prompt first."""
    round: int = 0
    """The round to be verified next, or in flight."""
    first_ms: float | None = None
    """When its first output token came, counted as `elapsed_ms`."""
    finish: Finish | None = None
    failure: Failure | None = None

    @property
    def name(self) -> str:
        """The session's name."""
        return self.generate.session

    @property
    def done(self) -> bool:
        """Whether no further round is needed."""
        return self.finish is not None or self.failure is not None

    @property
    def output_tokens(self) -> int:
        """Committed tokens after the prompt."""
        return len(self.tokens) - len(self.generate.prompt)

    def draft_room(self, draft_length: int, assumed: int = 0) -> int:
        """Longest useful draft once `assumed` more tokens are committed: the bonus token takes the last place left."""
        return max(0, min(draft_length, self.generate.max_tokens - self.output_tokens - assumed - 1))

    def verify(
        self,
        draft: list[int],
        acceptance: list[float],
        drafter: str,
        elapsed_ms: float,
        draft_ms: float,
        attempt: int = 0,
        hidden_from: int | None = None,
        hidden_format: HiddenFormat = HiddenFormat.BFLOAT16,
    ) -> Verify:
        """The round's message to the scheduler."""
        return Verify(
            session=self.name,
            round=self.round,
            base_len=len(self.tokens),
            draft=draft,
            acceptance=acceptance,
            drafter=drafter,
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
        )

    def apply(self, result: Result) -> bool:
        """Take a result in; returns whether it settles the round in flight.

        Results may come twice, late, or from a round of this session's previous drafter. A session that Redis lost a
        part of goes back to what is committed there: the same tokens will be chosen again.
        """
        if result.round != self.round or self.done:
            return False
        if result.status is Status.FAILED:
            self.failure = result.error
            return True
        if result.status is Status.PREFILLED or result.base_len > len(self.tokens):
            return False
        self.tokens[result.base_len :] = result.tokens
        self.finish = result.finish
        self.round += 1
        return True


def judged(result: Result) -> tuple[int, int]:
    """How many draft tokens a committed round verified, and how many of these were accepted."""
    # Where the text ended with a draft token, those behind it were not judged. A result that repeats what an earlier
    # drafter's copy of the round brought has verified nothing.
    ended = len(result.tokens) <= result.accepted
    verified = min(result.trimmed_to, result.accepted) if ended else result.trimmed_to
    return verified, min(result.accepted, verified)
