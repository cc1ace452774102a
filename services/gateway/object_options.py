"""Options of requests whose value is a JSON object."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from services.drafter.sources.registry import SourceChoiceName
from services.gateway.body import Body, or_default
from shared.runtime.settings import NAME_PATTERN


class StreamOptions(Body):
    """OpenAI's `stream_options`."""

    include_usage: Annotated[bool, or_default(False)] = False


class WispOptions(Body, extra="forbid"):
    """Our own options, under the key `wisp`.

    Unknown ones are refused, here only: no other server has any of this name.
    """

    trace: Annotated[bool, or_default(False)] = False
    """Add to each chunk the origin of its tokens and the costs of its rounds."""
    draft: SourceChoiceName | None = None
    """The draft source."""
    pool: Annotated[str | None, Field(pattern=NAME_PATTERN)] = None
    """The pool of drafters."""
    metrics: Annotated[bool, or_default(False)] = False
    """Add vLLM's `metrics.speculative_decoding` to the answer."""
    resumable: Annotated[bool, or_default(False)] = False
    """Keep generating for a while after the client goes away, so that it can resume the stream."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, value: Any) -> Any:
        for name in value if isinstance(value, dict) else ():
            if name not in cls.model_fields:
                text = {"option": name, "known": ", ".join(cls.model_fields)}
                raise PydanticCustomError("unknown_option", "has no option {option}, but {known}", text)
        return value


class ContentPart(Body):
    """One part of a message's content."""

    type: Literal["text"]
    text: str


class PredictionOption(Body):
    """OpenAI's `prediction`: the text that the client expects."""

    type: Literal["content"]
    content: str | list[ContentPart]

    @property
    def text(self) -> str:
        """The text of all parts."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
