"""The body of OpenAI's Responses API, and the chat that it stands for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from services.gateway.body import Body, Whole, checked, or_default
from services.gateway.chat_form import ChatForm
from services.gateway.core.options import RESPONSES_OPTIONS, UnsupportedOption
from services.gateway.errors import invalid
from services.gateway.grammar_options import ResponseFormat
from services.gateway.schema import MAX_TOOLS, ChatRequest
from services.gateway.tool_options import ToolFunction
from shared.errors import quoted

Messages = list[dict[str, Any]]
TEXT_TYPES = ("input_text", "output_text", "text")


class Reasoning(Body):
    """The `reasoning` option."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None


class _FormatOfText(ResponseFormat):
    """A chat's `response_format` under its name here."""

    param = "text.format"
    schema_param = "text.format.schema"


class TextFormat(Body):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    description: str | None = None
    json_schema: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: Annotated[bool, or_default(False)] = False

    def response_format(self) -> ResponseFormat:
        """Return it as a chat's `response_format`. Raises ApiError."""
        if self.type != "json_schema":
            return _FormatOfText(type=self.type)
        if self.json_schema is None:
            name = _FormatOfText.schema_param
            raise invalid(f"{name} is missing", name, "missing_required_parameter")
        schema = {"schema": self.json_schema, "strict": self.strict}
        return _FormatOfText.model_validate({"type": self.type, "json_schema": schema})


class TextOption(Body):
    """The `text` option."""

    format: Annotated[TextFormat, or_default(TextFormat())] = TextFormat()
    verbosity: Literal["medium"] | None = None

    def shown(self) -> dict[str, Any]:
        """Return it as responses show it."""
        of_schema = {"name", "description", "json_schema", "strict"}
        hidden = None if self.format.type == "json_schema" else of_schema
        return {"format": self.format.model_dump(by_alias=True, exclude=hidden)}


class ResponsesTool(ToolFunction):
    """A function that the model may call."""

    type: Literal["function"]

    def chat_tool(self) -> dict[str, Any]:
        """Return it as a chat's tool."""
        return {"type": self.type, "function": self.model_dump(exclude={"type"})}


class ResponsesRequest(ChatForm):
    """POST /v1/responses."""

    unsupported: ClassVar[Mapping[str, UnsupportedOption]] = RESPONSES_OPTIONS

    model: str
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: Annotated[int | None, Field(ge=1), Whole] = None
    temperature: Annotated[float | None, Field(ge=0, le=2, allow_inf_nan=False)] = None
    top_p: Annotated[float | None, Field(ge=0, le=1, allow_inf_nan=False)] = None
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63), Whole] = None
    stream: Annotated[bool, or_default(False)] = False
    store: Annotated[bool, or_default(True)] = True
    previous_response_id: str | None = None
    reasoning: Annotated[Reasoning, or_default(Reasoning())] = Reasoning()
    metadata: Annotated[dict[str, str], or_default({})] = Field(default_factory=dict)
    text: Annotated[TextOption, or_default(TextOption())] = TextOption()
    tools: Annotated[list[ResponsesTool], Field(max_length=MAX_TOOLS), or_default([])] = Field(default_factory=list)
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: Annotated[bool, or_default(True)] = True

    @property
    def items(self) -> list[dict[str, Any]]:
        """The items of the input."""
        return [{"role": "user", "content": self.input}] if isinstance(self.input, str) else self.input

    def chat(self, messages: Messages) -> ChatRequest:
        """Return the same request as a chat with these messages. Raises ApiError."""
        system = [{"role": "system", "content": self.instructions}] if self.instructions else []
        fields = {
            "model": self.model,
            "messages": [*system, *messages],
            "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed,
            "stream": self.stream,
            "reasoning_effort": self.reasoning.effort,
            "response_format": self.text.format.response_format(),
            "tools": [tool.chat_tool() for tool in self.tools],
            "tool_choice": _chat_choice(self.tool_choice),
            "parallel_tool_calls": self.parallel_tool_calls,
        }
        return checked(ChatRequest, fields)


def messages_of(items: Sequence[Mapping[str, Any]], where: str) -> Messages:
    """Return items as a chat's messages. where: their name in errors. Raises ApiError."""
    messages: Messages = []
    for number, item in enumerate(items):
        _add_item(messages, item, f"{where}[{number}]")
    return messages


def _add_item(messages: Messages, item: Mapping[str, Any], where: str) -> None:
    kind = item.get("type", "message")
    if kind == "message":
        messages.append({"role": item.get("role"), "content": _content(item.get("content"), f"{where}.content")})
    elif kind == "function_call":
        arguments = item.get("arguments")
        if not isinstance(arguments, str):
            raise invalid(f"{where}.arguments must be a string of JSON", f"{where}.arguments")
        call = {
            "id": str(item.get("call_id", "")),
            "function": {"name": item.get("name"), "arguments": arguments},
        }
        if messages and messages[-1].get("tool_calls"):
            messages[-1]["tool_calls"].append(call)
        else:
            messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
    elif kind == "function_call_output":
        output = _content(item.get("output"), f"{where}.output")
        messages.append({"role": "tool", "tool_call_id": str(item.get("call_id", "")), "content": output})
    elif kind != "reasoning":  # the reasoning of earlier answers is not shown again
        raise invalid(f"{where}.type: {quoted(kind)} is not supported here", f"{where}.type", "unsupported_parameter")


def _content(value: Any, where: str) -> Any:
    if not isinstance(value, list):
        return value
    for number, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else part
        if not isinstance(part, dict) or kind not in TEXT_TYPES or not isinstance(part.get("text"), str):
            name = f"{where}[{number}].type"
            raise invalid(f"{name}: {quoted(kind)} is not supported here; send text", name, "unsupported_parameter")
    return "\n".join(part["text"] for part in value)


def _chat_choice(choice: str | dict[str, Any] | None) -> Any:
    if not isinstance(choice, dict):
        return choice
    if choice.get("type") != "function" or not isinstance(choice.get("name"), str):
        text = 'tool_choice must be "auto", "none", "required" or an object such as {"type": "function", "name": "…"}'
        raise invalid(text, "tool_choice")
    return {"type": "function", "function": {"name": choice["name"]}}
