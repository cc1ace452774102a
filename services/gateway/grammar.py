"""The grammar of a request's answers, built before its sessions start."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from services.gateway.core.tool_formats import HERMES, JSON, MISTRAL, TOOL_FORMATS, ToolFormat
from services.gateway.errors import invalid
from services.gateway.grammar_options import GrammarOption
from services.gateway.model import ServedModel
from services.gateway.schema import ChatRequest, GenerationRequest
from services.gateway.tool_options import Tool
from services.gateway.tools import tool_format
from shared.errors import GrammarError
from shared.grammar import build
from shared.messages import LONGEST_GRAMMAR

_SCHEMAS_BY_NAME = frozenset({"properties", "patternProperties", "$defs", "definitions"})
"""Keywords of JSON Schema whose values hold schemas by names of the user's choice."""
_VALUES = frozenset({"const", "enum", "default", "examples"})
"""Keywords of JSON Schema whose values are data."""


class ParametersError(GrammarError):
    """Raised for the parameters of a tool that no grammar can be built for."""


async def grammar_of(request: GenerationRequest, model: ServedModel) -> str | None:
    """Return the grammar of a request's answers; None if they are free.

    Raises ApiError with status 400, and the place of the problem, if it cannot be built.
    """
    asked = request.grammar
    if asked is not None and isinstance(request, ChatRequest) and _excludes_tools(request):
        text = f'{asked.param} cannot be combined with tools; send tool_choice "none" for the answer that is to have it'
        raise invalid(text, asked.param)
    option = _option_of(request, model)
    if option is None:
        return None
    if request.ignore_eos:
        text = f"ignore_eos cannot be combined with {option.param}: an answer ends where its grammar does"
        raise invalid(text, "ignore_eos")

    def built() -> str:
        text = _built(option)
        model.grammars.check(text)
        if (calls := grammar_of_calls(request, model)) is not None:
            build.begins(calls, "")  # builds it: answers are compared with it on the event loop
        return text

    try:
        # In a thread whatever its length: the first grammar loads the vocabulary, and others may hold the lock.
        return await asyncio.to_thread(built)
    except GrammarError as error:
        param = "tools" if isinstance(error, ParametersError) else option.param
        raise invalid(f"{param}: {error}", param, "invalid_grammar") from error


def grammar_of_calls(request: GenerationRequest, model: ServedModel) -> str | None:
    """Return the grammar of one call, where answers are either calls or texts of a form; else None."""
    option = _option_of(request, model) if isinstance(request, ChatRequest) and request.has_grammar else None
    return _built_call(option) if option is not None and option.kind == "calls" else None


def _excludes_tools(request: ChatRequest) -> bool:
    """Return whether the grammar of an option excludes the tools of a chat.

    `response_format` is about the text of an answer, which may be calls instead. Other options are about all of it.
    """
    return bool(request.offered_tools) and request.response_format.type == "text"


def _option_of(request: GenerationRequest, model: ServedModel) -> GrammarOption | None:
    """Return the option that sets the grammar: tools that must be called, or may be called beside a form, set one."""
    asked = request.grammar
    if not isinstance(request, ChatRequest) or not request.offered_tools:
        return asked
    must_call = request.tool_choice.mode == "required"
    if not must_call and asked is None:
        return None
    named = request.tool_choice.name
    tools = [tool.model_dump() for tool in request.tools if named in (None, tool.function.name)]
    several = request.parallel_tool_calls and named is None
    value: dict[str, Any] = {"format": tool_format(model.tokenizer).name, "tools": tools, "several": several}
    if must_call or asked is None:
        return GrammarOption("calls", json.dumps(value), "tool_choice")
    value["schema"] = json.loads(asked.value) if asked.kind == "json_schema" else {"type": "object"}
    return GrammarOption("calls", json.dumps(value), asked.param, asked.strict)


@lru_cache(maxsize=256)
def _built(option: GrammarOption) -> str:
    value = json.loads(option.value)
    text = _BUILDERS[option.kind](value, option.strict)
    if len(text) > LONGEST_GRAMMAR:
        raise GrammarError(f"the grammar has {len(text)} characters, and at most {LONGEST_GRAMMAR} are allowed")
    build.check(text)
    return text


@lru_cache(maxsize=256)
def _built_call(option: GrammarOption) -> str | None:
    value = json.loads(option.value)
    return build.lark("\n".join(["start: call", *_call_rules(value)])) if "schema" in value else None


def _calls(value: Mapping[str, Any], strict: bool) -> str:
    """Return the grammar of answers that call tools, in the format of the model's family.

    With a `schema`, an answer is either calls or a JSON text that fits it.
    """
    rules = _call_rules(value)
    answer = _answer(TOOL_FORMATS[value["format"]], value["several"])
    if "schema" in value:
        build.json_schema(value["schema"], strict=strict)
        answer = f"({answer}) | text"
        rules.append(f"text: {build.inline_schema(value['schema'], strict=strict)}")
    return build.lark("\n".join([f"start: {answer}", *rules]))


def _call_rules(value: Mapping[str, Any]) -> list[str]:
    """Return the rule `call` and those that it needs."""
    form: ToolFormat = TOOL_FORMATS[value["format"]]
    # With its first words as one literal, a call without a mark excludes other texts that begin with a brace.
    call = _call_as_schema if "schema" in value and form is not HERMES else _call
    rules = []
    for number, described in enumerate(value["tools"]):
        tool = Tool.model_validate(described).function
        schema = tool.parameters or {"type": "object", "properties": {}}
        try:
            build.json_schema(schema, strict=tool.strict)
        except GrammarError as error:
            raise ParametersError(f"the parameters of {tool.name}: {error}") from error
        rules.append(f"call_{number}: {call(form, tool.name, schema, tool.strict)}")
    return ["call: " + " | ".join(f"call_{number}" for number in range(len(rules))), *rules]


def _call(form: ToolFormat, name: str, schema: Mapping[str, Any], strict: bool) -> str:
    head = json.dumps(f'{{"name": {json.dumps(name)}, "{form.arguments}": ')
    return f'{head} {build.inline_schema(schema, strict=strict)} "}}"'


def _call_as_schema(form: ToolFormat, name: str, schema: Mapping[str, Any], strict: bool) -> str:
    properties = {"name": {"const": name}, form.arguments: _moved(schema, f"#/properties/{form.arguments}")}
    call = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    return build.inline_schema(call, strict=strict)


def _moved(schema: Any, to: str) -> Any:
    """Return a schema, or part of one, for a place within another schema, where `to` leads to its root."""
    if isinstance(schema, list):
        return [_moved(part, to) for part in schema]
    if not isinstance(schema, dict):
        return schema
    moved: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _VALUES:
            moved[key] = value
        elif key in _SCHEMAS_BY_NAME and isinstance(value, dict):
            moved[key] = {name: _moved(part, to) for name, part in value.items()}
        elif key == "$ref" and isinstance(value, str) and re.match("#(/|$)", value):
            moved[key] = to + value[1:]
        else:
            moved[key] = _moved(value, to)
    return moved


def _answer(form: ToolFormat, several: bool) -> str:
    """Return the rule of an answer that consists of calls."""
    if form is HERMES:
        one = '"<tool_call>\\n" call "\\n</tool_call>"'
        return f'{one} ("\\n" {one})*' if several else one
    if form is MISTRAL:
        return '"[" call (", " call)* "]"' if several else '"[" call "]"'
    if not several:
        return "call"
    return 'call | "[" call (", " call)+ "]"' if form is JSON else f"call ({json.dumps(form.separator)} call)*"


_BUILDERS: Mapping[str, Callable[[Any, bool], str]] = {
    "json_schema": lambda value, strict: build.json_schema(value, strict=strict),
    "json_object": lambda value, strict: build.json_object(),
    "regex": lambda value, strict: build.regex(value),
    "choice": lambda value, strict: build.choice(value),
    "grammar": lambda value, strict: build.any_syntax(value),
    "calls": _calls,
}
"""By `GrammarOption.kind`."""
