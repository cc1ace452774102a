"""The tools of a chat: the conversation with them as the model's template takes it, and the form of their calls."""

from __future__ import annotations

from functools import partial
from typing import Any

from services.gateway.core.tool_calls import ToolCallParser
from services.gateway.core.tool_formats import JSON, TOOL_FORMATS, ToolFormat, format_of, plain_messages
from services.gateway.model import ServedModel
from services.gateway.schema import ChatRequest
from shared.grammar import build
from shared.messages import Record
from shared.models.text import Tokenizer


class ToolForm(Record):
    """The form in which an answer may call tools. It is stored with the form of the answer."""

    format: str
    """A name in `TOOL_FORMATS`."""
    names: list[str]
    """The tools that may be called."""
    parallel: bool = True
    """True if one answer may have several calls."""
    grammar: str | None = None
    """The grammar of one call, where an answer may also be a text of a form; else None."""

    @property
    def calls(self) -> ToolFormat:
        """The format of the calls; the default one for a name of another version."""
        return TOOL_FORMATS.get(self.format, JSON)

    def parser(self) -> ToolCallParser:
        """Return a parser for one completion."""
        fits = None if self.grammar is None else partial(build.begins, self.grammar)
        return ToolCallParser(self.calls.marks, self.names, parallel=self.parallel, fits=fits)


def tool_form(request: ChatRequest, model: ServedModel, grammar: str | None) -> ToolForm:
    """Return the form of the calls of a chat with tools. grammar: see `ToolForm.grammar`."""
    return ToolForm(
        format=tool_format(model.tokenizer).name,
        names=[tool.function.name for tool in request.offered_tools],
        parallel=request.parallel_tool_calls,
        grammar=grammar,
    )


def tool_format(tokenizer: Tokenizer) -> ToolFormat:
    """Return the format in which the served model calls tools."""
    return format_of(tokenizer.tool_template)


def conversation(request: ChatRequest, tokenizer: Tokenizer) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the messages and the tools to render with the model's template.

    For a template without a part for tools, everything about tools is in the messages.
    """
    messages = [message.rendered() for message in request.messages]
    tools = [tool.rendered() for tool in request.offered_tools]
    calls = tool_format(tokenizer)
    names: dict[str, str] = {}
    for message in messages:
        for call in message.get("tool_calls", ()):
            names[call["id"]] = call["function"]["name"]
            call["id"] = calls.given_id(call["id"])
        if message["role"] == "tool":
            # Templates differ in whether they name the tool or the call.
            message["name"] = message["name"] or names.get(message["tool_call_id"])
            message["tool_call_id"] = calls.given_id(message["tool_call_id"])
    if not tokenizer.tool_template:
        return plain_messages(messages, tools, parallel=request.parallel_tool_calls), []
    return messages, tools
