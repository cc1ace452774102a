"""Validated records of a server's answers. The server may be any program."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Number = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]


class _ListedModel(BaseModel):
    id: str = Field(min_length=1)


class ModelList(BaseModel):
    """The list of a server's models."""

    data: list[_ListedModel] = Field(min_length=1)


class _TraceToken(BaseModel):
    model_config = ConfigDict(extra="allow")

    id: int
    text: str
    draft: bool


class _TraceRound(BaseModel):
    model_config = ConfigDict(extra="allow")

    round: Count
    start: Count
    tokens: Count
    verified: Count
    accepted: Count
    draft_ms: Number
    queue_ms: Number
    verify_ms: Number


class _TraceSummary(BaseModel):
    model_config = ConfigDict(extra="allow")

    rounds: Number
    tokens: Number
    verified: Number
    accepted: Number
    ttft_ms: Number
    total_ms: Number
    draft_ms: Number
    queue_ms: Number
    verify_ms: Number
    messaging_ms: Number


class AnswerTrace(BaseModel):
    """The `wisp` fields of a chunk."""

    model_config = ConfigDict(extra="allow")

    tokens: list[_TraceToken] = []
    rounds: list[_TraceRound] = []
    summary: _TraceSummary | None = None

    def fields(self) -> dict[str, Any]:
        """Return the fields that the chunk has."""
        return self.model_dump(exclude_unset=True)


class _Delta(BaseModel):
    content: str | None = None


class ChunkChoice(BaseModel):
    """A chunk's piece of one completion."""

    delta: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None

    @property
    def piece(self) -> str:
        """The text of a chat completion or of a completion."""
        return (self.delta.content if self.delta is not None else self.text) or ""


class AnswerChunk(BaseModel):
    """One chunk of a completion or a chat completion."""

    choices: list[ChunkChoice] = []
    wisp: AnswerTrace | None = None
