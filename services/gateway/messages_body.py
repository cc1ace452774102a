"""Bodies of Anthropic's Messages API, and the chats that they stand for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from services.gateway.body import BLOCK_TAG, Body, Whole, checked, or_default
from services.gateway.chat_form import ChatForm
from services.gateway.core.options import MESSAGES_OPTIONS, UnsupportedOption
from services.gateway.errors import invalid
from services.gateway.grammar_options import ResponseFormat
from services.gateway.object_options import ContentPart
from services.gateway.option_values import MAX_STOP_CHARACTERS, MAX_STOPS
from services.gateway.schema import MAX_TOOLS, ChatMessage, ChatRequest
from services.gateway.tool_options import CalledFunction, Tool, ToolCall, ToolFunction, ToolName
from shared.models.text import Tokenizer

THINKING_VARIABLES = ("enable_thinking", "thinking")
"""Variables of chat templates that switch the model's reasoning on and off."""
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
"""The modes of a chat's `tool_choice` by those of a message."""


class ThinkingBlock(Body):
    """Reasoning of an earlier answer, which is not shown to the model again."""

    type: Literal["thinking", "redacted_thinking"]


class ToolUseBlock(Body):
    """A call of a tool in the history."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: Any

    def call(self) -> ToolCall:
        """Return it as a chat's tool call."""
        arguments = self.input if isinstance(self.input, dict) else json.dumps(self.input, ensure_ascii=False)
        return ToolCall(id=self.id, function=CalledFunction(name=self.name, arguments=arguments))


class ToolResultBlock(Body):
    """The result of a call."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: Annotated[str | list[ContentPart], or_default("")] = ""
    is_error: Annotated[bool, or_default(False)] = False

    def message(self) -> ChatMessage:
        """Return it as a chat's message. Chat templates have no mark for errors, so the text gets one."""
        text = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        shown = f"Error: {text}" if self.is_error else text
        return ChatMessage(role="tool", tool_call_id=self.tool_use_id, content=shown)


_BLOCKS = {
    "user": ("text", "tool_result"),
    "assistant": ("text", "tool_use", "thinking", "redacted_thinking"),
}
"""Types of blocks by the role of their message."""


def _tag(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    known = isinstance(kind, str) and any(kind in kinds for kinds in _BLOCKS.values())
    return f"{BLOCK_TAG}{'thinking' if kind == 'redacted_thinking' else kind}" if known else None


Block = Annotated[
    Annotated[ContentPart, Tag(f"{BLOCK_TAG}text")]
    | Annotated[ToolUseBlock, Tag(f"{BLOCK_TAG}tool_use")]
    | Annotated[ToolResultBlock, Tag(f"{BLOCK_TAG}tool_result")]
    | Annotated[ThinkingBlock, Tag(f"{BLOCK_TAG}thinking")],
    Discriminator(
        _tag,
        custom_error_type="block_type",
        custom_error_message="must be text, tool_use, tool_result, thinking or redacted_thinking",
    ),
]


class MessageParam(Body):
    """One message of a conversation."""

    role: Literal["user", "assistant"]
    content: str | list[Block]

    @field_validator("content")
    @classmethod
    def _fits_the_role(cls, value: str | list[Block], info: ValidationInfo) -> str | list[Block]:
        kinds = _BLOCKS.get(info.data.get("role", ""))
        if kinds is not None and not isinstance(value, str):
            for block in value:
                if block.type not in kinds:
                    text = "a message of the {role} has no {kind} blocks"
                    raise PydanticCustomError("content_value", text, {"role": info.data["role"], "kind": block.type})
        return value

    def chat_messages(self) -> Iterator[ChatMessage]:
        """Yield it as messages of a chat, in which each result of a call is a message of its own."""
        if isinstance(self.content, str):
            yield ChatMessage(role=self.role, content=self.content)
            return
        parts: list[ContentPart] = []
        calls = []
        for block in self.content:
            if isinstance(block, ContentPart):
                parts.append(block)
            elif isinstance(block, ToolUseBlock):
                calls.append(block.call())
            elif isinstance(block, ToolResultBlock):
                if parts:
                    yield ChatMessage(role=self.role, content=parts)
                    parts = []
                yield block.message()
        if self.role == "assistant" or parts or not self.content:
            yield ChatMessage(role=self.role, content=parts or "", tool_calls=calls)


class MessagesTool(Body):
    """A tool that the model may call."""

    type: Literal["custom"] | None = None
    name: ToolName
    description: str | None = None
    input_schema: dict[str, Any]
    """JSON schema of the arguments."""
    strict: Annotated[bool, or_default(False)] = False

    def tool(self) -> Tool:
        """Return it as a chat's tool."""
        function = ToolFunction(
            name=self.name, description=self.description, parameters=self.input_schema, strict=self.strict
        )
        return Tool(type="function", function=function)


class MessagesToolChoice(Body):
    """The tools that an answer has to call."""

    type: Literal["auto", "any", "tool", "none"]
    name: Annotated[str | None, Field(validate_default=True)] = None
    disable_parallel_tool_use: Annotated[bool, or_default(False)] = False

    @field_validator("name")
    @classmethod
    def _is_given(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None and info.data.get("type") == "tool":
            raise PydanticCustomError("missing", "Field required")
        return value

    def choice(self) -> str | dict[str, Any]:
        """Return it as a chat's `tool_choice`."""
        return _CHOICES.get(self.type) or {"type": "function", "function": {"name": self.name}}


class ThinkingOption(Body):
    """The `thinking` option."""

    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: Annotated[int | None, Field(ge=1), Whole] = None

    @property
    def budget(self) -> int | None:
        """Most tokens of reasoning; None for no limit."""
        return self.budget_tokens if self.type == "enabled" else None

    def variables(self, tokenizer: Tokenizer) -> dict[str, bool]:
        """Return the variables of the chat template that it sets. Raises ApiError if the model can't follow it."""
        wanted = self.type != "disabled"
        switches = {name: wanted for name in THINKING_VARIABLES if name in tokenizer.template_variables}
        if wanted and not tokenizer.thinks:
            text = "thinking is not supported here: the model marks no reasoning in its answers; leave it out"
            raise invalid(text, "thinking", "unsupported_parameter")
        if not wanted and tokenizer.thinks and not switches:
            text = "thinking: the model's chat template can't switch reasoning off; leave it out"
            raise invalid(text, "thinking", "unsupported_parameter")
        return switches


class _FormatOfOutput(ResponseFormat):
    """A chat's `response_format` under its name here."""

    param = "output_config.format"
    schema_param = "output_config.format.schema"


class OutputFormat(Body):
    """The form of the answer."""

    type: Literal["json_schema"]
    json_schema: Annotated[dict[str, Any], Field(alias="schema")]

    def response_format(self) -> ResponseFormat:
        """Return it as a chat's `response_format`. Anthropic's schemas are always strict."""
        return _FormatOfOutput.model_validate(
            {"type": self.type, "json_schema": {"schema": self.json_schema, "strict": True}}
        )


class OutputConfig(Body):
    """The `output_config` option."""

    format: OutputFormat | None = None
    effort: Literal["low", "medium", "high", "xhigh"] | None = None


class CountRequest(ChatForm):
    """POST /v1/messages/count_tokens, and what both bodies have."""

    unsupported: ClassVar[Mapping[str, UnsupportedOption]] = MESSAGES_OPTIONS
    without_effect = frozenset({"max_tokens", "temperature", "top_p", "top_k", "stream"})
    """Options of messages that do not change the number of tokens."""

    model: str
    messages: Annotated[list[MessageParam], Field(min_length=1)]
    system: str | list[ContentPart] | None = None
    tools: Annotated[list[MessagesTool], Field(max_length=MAX_TOOLS), or_default([])] = Field(default_factory=list)
    tool_choice: MessagesToolChoice | None = None
    thinking: ThinkingOption | None = None
    output_config: Annotated[OutputConfig, or_default(OutputConfig())] = OutputConfig()

    def options(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """Return the chat options that both bodies have. An answer continues a last message of the assistant.

        Raises ApiError.
        """
        system = [ChatMessage(role="system", content=self.system)] if self.system else []
        messages = [*system, *(made for message in self.messages for made in message.chat_messages())]
        if messages[-1].tool_calls:
            raise invalid("messages: the last message calls a tool; send the tool's result after it", "messages")
        choice, form = self.tool_choice, self.output_config.format
        return {
            "model": self.model,
            "messages": messages,
            "continue_final_message": messages[-1].role == "assistant",
            "tools": [tool.tool() for tool in self.tools],
            "tool_choice": None if choice is None else choice.choice(),
            "parallel_tool_calls": choice is None or not choice.disable_parallel_tool_use,
            "response_format": None if form is None else form.response_format(),
            "reasoning_effort": self.output_config.effort,
            "thinking_token_budget": None if self.thinking is None else self.thinking.budget,
            "chat_template_kwargs": {} if self.thinking is None else self.thinking.variables(tokenizer),
        }

    def chat(self, tokenizer: Tokenizer) -> ChatRequest:
        """Return the same request as a chat. Raises ApiError."""
        return checked(ChatRequest, self.options(tokenizer))


class MessagesRequest(CountRequest):
    """POST /v1/messages."""

    max_tokens: Annotated[int, Field(ge=1), Whole]
    temperature: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False), or_default(1.0)] = 1.0
    top_p: Annotated[float | None, Field(ge=0, le=1, allow_inf_nan=False)] = None
    top_k: Annotated[int | None, Field(ge=0, lt=2**31), Whole] = None
    stop_sequences: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]],
        Field(max_length=MAX_STOPS),
        or_default([]),
    ] = Field(default_factory=list)
    stream: Annotated[bool, or_default(False)] = False

    def options(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """See `CountRequest.options`."""
        return {
            **super().options(tokenizer),
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "stop": self.stop_sequences,
            "stream": self.stream,
        }
