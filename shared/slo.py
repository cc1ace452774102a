"""Speed promises, when a token is due, and how often a verifier must be free for it.

The first token is due `ttft_ms` after the request's start. The others are due a token's time apart, counted from when
the first one came: a request attains its SLO by its time to the first token and by its mean time per token after it, so
a first token that came early does not make up for slow ones.
"""

from __future__ import annotations

from pydantic import BaseModel, model_validator

from shared.messages import Promised, Slo

BATCHES_PER_ROUND = 1.5
"""Batches that a round lasts: half of the one that runs when it comes, on average, and its own."""


class Promise(BaseModel):
    """The fields by which a promise of speed is written in settings and files: both of its times, or none of them."""

    ttft_ms: Promised | None = None
    tpot_ms: Promised | None = None

    @model_validator(mode="after")
    def _whole(self) -> Promise:
        if (self.ttft_ms is None) != (self.tpot_ms is None):
            raise ValueError("a promise has both ttft_ms and tpot_ms; best effort has neither")
        return self

    @property
    def slo(self) -> Slo | None:
        """The promise; None for none."""
        if self.ttft_ms is None or self.tpot_ms is None:
            return None
        return Slo(ttft_ms=self.ttft_ms, tpot_ms=self.tpot_ms)


def due_after_ms(slo: Slo, output_tokens: int, first_ms: float | None) -> float:
    """Milliseconds from the request's start until its next token is due, with `output_tokens` committed, the first of
    them after `first_ms`."""
    if not output_tokens or first_ms is None:
        first_ms = slo.ttft_ms
    return first_ms + slo.tpot_ms * output_tokens


def slack_ms(slo: Slo | None, elapsed_ms: float, output_tokens: int, first_ms: float | None) -> float | None:
    """Milliseconds left until the next token is due (negative when late); None without an SLO."""
    return None if slo is None else due_after_ms(slo, output_tokens, first_ms) - elapsed_ms


def batch_period_ms(round_period_ms: float, away_ms: float, alone_ms: float) -> float:
    """How far apart batches may end for a session that needs a round every `round_period_ms`.

    away_ms: of that time, what passes between a result and the next round's arrival. alone_ms: time of a batch of this
    round alone; a promise that leaves less than that is one that only a lone session can be given.
    """
    return max(round_period_ms - away_ms, alone_ms) / BATCHES_PER_ROUND
