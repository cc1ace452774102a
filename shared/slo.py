"""Speed promises and when a token is due.

Due time of a session's next token: start + TTFT + TPOT × output tokens committed so far. A request attains its SLO when
its time to first token and its mean time per output token after the first are both within it.
"""

from __future__ import annotations

from shared.messages import Slo


def due_after_ms(slo: Slo, output_tokens: int) -> float:
    """Milliseconds from the request's start until its next token is due, with `output_tokens` committed."""
    return slo.ttft_ms + slo.tpot_ms * output_tokens


def slack_ms(slo: Slo | None, elapsed_ms: float, output_tokens: int) -> float | None:
    """Milliseconds left until the next token is due (negative when late); None without an SLO."""
    return None if slo is None else due_after_ms(slo, output_tokens) - elapsed_ms


def attained(slo: Slo, ttft_ms: float, total_ms: float, output_tokens: int) -> bool:
    """Whether a finished request kept its SLO."""
    tpot_ms = (total_ms - ttft_ms) / (output_tokens - 1) if output_tokens > 1 else 0.0
    return output_tokens > 0 and ttft_ms <= slo.ttft_ms and tpot_ms <= slo.tpot_ms
