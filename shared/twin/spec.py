"""The description of a twin: acceptance of its drafts, length of its answers, and the tokens of the answers."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Probability = Annotated[float, Field(gt=0, lt=1)]
TokenId = Annotated[int, Field(ge=0)]
DRAFT_STEP_MS = 1.5


class Acceptance(BaseModel):
    """The chances of draft tokens to be accepted, and the error of the draft model's estimates of them.

    A token's log odds of acceptance are normally distributed around its session's, and the sessions' around a common
    centre. `mean` decides that centre.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean: Probability = 0.75
    """Mean chance of a draft token whose predecessors are accepted."""
    session_spread: Amount = 0.5
    """Standard deviation of a session's log odds."""
    token_spread: Amount = 1.5
    """Standard deviation of a token's log odds around its session's."""
    estimate_error: Amount = 1.0
    """Standard deviation of the error of the draft model's estimate, in log odds."""
    known: bool = False
    """The draft model knows which of its tokens are right: an oracle, to compare with."""


class TwinSpec(BaseModel):
    """The content of `twin.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    acceptance: Acceptance = Acceptance()
    answer_tokens: Annotated[float, Field(ge=1)] = 150.0
    """Mean length of an answer that ends by itself."""
    draft_step_ms: Amount = DRAFT_STEP_MS
    """One draft step for all sessions on the target's own accelerator; a hardware profile's steps take its own time."""
    words: Annotated[list[TokenId], Field(min_length=2)] | None = None
    """Tokens that the answers consist of; None if they come from a trace."""
    stop_id: TokenId | None = None
    """Token that ends an answer; None if only its greatest length does."""
    computed: str | None = None
    """Folder of a model, with random weights, that really computes each step; None to wait for the profile's times."""
