"""Recorded rounds, from which the controller is trained: JSON lines, one per round."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from services.drafter.control.guess import Guess

Count = Annotated[int, Field(ge=0)]


class RoundRecord(BaseModel):
    """One verified round; a session's rounds are recorded in their order, plain ones (without guesses) as well."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants")

    session: str
    kind: str = ""
    """Kind of text, where known."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    target_entropy: float | None = None
    guesses: list[Guess]
    """The tokens that were sent."""
    verified: Count
    accepted: Count

    @model_validator(mode="after")
    def _ordered(self) -> RoundRecord:
        if not self.accepted <= self.verified <= len(self.guesses):
            raise ValueError(
                f"accepted {self.accepted} <= verified {self.verified} <= guesses {len(self.guesses)} must hold"
            )
        return self
