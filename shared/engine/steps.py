"""Input of a forward pass, and the questions that its logits answer. Loads no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shared.messages import Sampling
from shared.sampling.rules import LogitsProcessor


@dataclass(frozen=True, slots=True)
class Step:
    """One session's part of a forward pass: new tokens after the cached ones, with logits for the last `rows`."""

    session_id: str
    tokens: Sequence[int]
    rows: int = 1


@dataclass(frozen=True, slots=True)
class ChoiceRow:
    """A row of logits that the next token is chosen from."""

    row: int
    sampling: Sampling
    position: int
    """Position of that token in its session."""
    prompt_len: int
    """Tokens of the session's prompt."""
    processor: LogitsProcessor | None = None
    """The session's options on logits, after the tokens before the position; None without any."""
