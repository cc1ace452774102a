"""Tools, their calls, and the choice between them, in OpenAI's form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic_core import PydanticCustomError, from_json

from services.gateway.body import Body, or_default

ToolName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:-]{1,128}$")]


class CalledFunction(Body):
    """The function of a tool call in the history."""

    name: str
    arguments: str | dict[str, Any]
    """JSON, as OpenAI has it; some clients send the object itself."""


class ToolCall(Body):
    """A tool call in the history."""

    id: Annotated[str, or_default("")] = ""
    type: Literal["function"] = "function"
    function: CalledFunction

    def rendered(self) -> dict[str, Any]:
        """Return the call for chat templates: its arguments are an object, or the text if that is no JSON object."""
        arguments: Any = self.function.arguments
        if isinstance(arguments, str):
            try:
                parsed = from_json(arguments or "{}", allow_inf_nan=False)
            except ValueError:
                parsed = None
            arguments = parsed if isinstance(parsed, dict) else arguments
        return {"id": self.id, "type": "function", "function": {"name": self.function.name, "arguments": arguments}}


class ToolFunction(Body):
    """The function of a tool."""

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """JSON schema of the arguments."""
    strict: Annotated[bool, or_default(False)] = False


class Tool(Body):
    """A tool that the model may call."""

    type: Literal["function"]
    function: ToolFunction

    def rendered(self) -> dict[str, Any]:
        """Return the tool in the form that chat templates take."""
        function = self.function
        return {
            "type": "function",
            "function": {
                "name": function.name,
                "description": function.description or "",
                "parameters": function.parameters or {"type": "object", "properties": {}},
            },
        }


@dataclass(frozen=True)
class ToolChoice:
    """The tools that an answer has to call."""

    mode: str = "auto"
    """`auto`: any or none, `none`: none, `required`: at least one."""
    name: str | None = None
    """The only tool that may be called."""


def parse_tool_choice(value: Any) -> ToolChoice:
    """Return the value of `tool_choice`. Raises PydanticCustomError."""
    if value is None or value in ("auto", "none", "required"):
        return ToolChoice(value or "auto")
    function = value.get("function") if isinstance(value, dict) and value.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise PydanticCustomError(
            "tool_choice_value",
            'must be "auto", "none", "required" or an object such as {example}',
            {"example": '{"type": "function", "function": {"name": "…"}}'},
        )
    return ToolChoice("required", name)
