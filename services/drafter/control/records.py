"""Recorded rounds, from which the controller is trained."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from services.drafter.control.features import DraftToken

Count = Annotated[int, Field(ge=0)]


class RoundRecord(BaseModel):
    """One verified round. A session's rounds are recorded in order, including those without draft tokens."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants")

    session: str
    kind: str = ""
    """Kind of text, where known."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    target_entropy: float | None = None
    guesses: list[DraftToken]
    """The draft tokens that were sent. Files of recorded rounds use this name."""
    verified: Count
    accepted: Count

    @model_validator(mode="after")
    def _counts_are_ordered(self) -> RoundRecord:
        if not self.accepted <= self.verified <= len(self.guesses):
            raise ValueError(
                f"accepted {self.accepted} <= verified {self.verified} <= guesses {len(self.guesses)} must hold"
            )
        return self
