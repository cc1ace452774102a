"""Speed promises and when a token is due.

Due time of a session's next token: start + TTFT + TPOT × output tokens committed so far.
"""

from __future__ import annotations

from shared.messages import Slo


def due_after_ms(slo: Slo, output_tokens: int) -> float:
    """Milliseconds from the request's start until its next token is due, with `output_tokens` committed."""
    return slo.ttft_ms + slo.tpot_ms * output_tokens


def slack_ms(slo: Slo | None, elapsed_ms: float, output_tokens: int) -> float | None:
    """Milliseconds left until the next token is due (negative when late); None without an SLO."""
    return None if slo is None else due_after_ms(slo, output_tokens) - elapsed_ms
