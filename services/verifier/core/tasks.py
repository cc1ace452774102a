"""Input and output of one verification: a job with its session's record, and what the model made of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from services.verifier.core.acceptance import Verdict
from shared.messages import GRAMMAR, LOGPROBS, REASONING_BUDGET, RULES, HiddenFormat, Sampling
from shared.models.hidden_states import Part

FEATURES = [GRAMMAR, RULES, LOGPROBS, REASONING_BUDGET]
"""Features of `verify` that sessions may need."""


@dataclass(frozen=True)
class VerifyTask:
    """A job with everything that verifying it needs from its session's record."""

    session_id: str
    tokens: list[int]
    """Every committed token, prompt first."""
    draft: list[int]
    sampling: Sampling
    stop_ids: frozenset[int]
    room: int
    """Tokens that the session may still get, at least 1."""
    prompt_len: int = 0
    """Tokens of the prompt."""
    prefill_to: int | None = None
    """Only extend the cache to this length."""
    hidden_from: int | None = None
    """Return the hidden states of committed tokens from this position on."""
    hidden_format: HiddenFormat = HiddenFormat.BFLOAT16
    digest: Any = None
    """A hash object that gets the bits of the logits, for a digest over several tasks; None for one of its own."""


@dataclass(frozen=True)
class VerifyOutcome:
    """Outcome of a task. A chunk of prefill has no verdict; a refused task has no verdict and an `error`."""

    verdict: Verdict | None
    verified: int
    """Draft tokens that were verified."""
    cached: int
    """Tokens of the session in the KV cache now."""
    new_tokens: int
    """Tokens computed for this task."""
    error: Exception | None = None
    hidden: Sequence[Part] = ()
    """Hidden states of `VerifyTask.tokens` and the accepted draft tokens, from `VerifyTask.hidden_from` on; empty when
    the session ended."""
    logits_digest: str | None = None
    """See `Result.logits_digest`; None unless digests were asked for."""
    logprobs: bytes = b""
    """Records of the log-probabilities that the session asks for: of the verdict's tokens, and before them of the
    prompt's if this is the first verdict."""
    logprobs_from: int = 0
    """Position of the first record's token."""
