"""The formats in which families of models write tool calls: one registry.

A model's family is recognised by its chat template. A template without a tool part does not show the model its tools,
so they are described in the system message, and the model is asked for the default format.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from services.gateway.core.tool_calls import ToolMarks


@dataclass(frozen=True)
class ToolFormat:
    """One family's format."""

    name: str
    marks: ToolMarks
    evidence: tuple[str, ...] = ()
    """Texts in a chat template that show the family."""
    shown: tuple[str, ...] = ()
    """Control tokens whose text belongs to the format. Others are left out of completions."""
    arguments: str = "arguments"
    """Key of a call's arguments."""
    array: bool = False
    """True if the calls of an answer are the elements of one array."""
    separator: str = "\n"
    """Between calls that are in no array."""
    id_length: int | None = None
    """Length of a call's id, where the chat template demands one; ids are then letters and digits only."""

    def call_id(self, answer_id: str, completion: int, call: int) -> str:
        """Return the id of a call. A resumed stream has the same ids."""
        digest = blake2b(f"{answer_id}.{completion}.{call}".encode(), digest_size=12).hexdigest()
        return f"call_{digest}" if self.id_length is None else digest[: self.id_length]

    def given_id(self, call_id: str) -> str:
        """Return a call's id in the form that the chat template takes: conversations may have begun elsewhere."""
        if self.id_length is None or (len(call_id) == self.id_length and call_id.isalnum()):
            return call_id
        return blake2b(call_id.encode(), digest_size=12).hexdigest()[: self.id_length]


HERMES = ToolFormat(
    "hermes",
    ToolMarks("<tool_call>", "</tool_call>"),
    evidence=("<tool_call>",),
    shown=("<tool_call>", "</tool_call>"),
)
MISTRAL = ToolFormat(
    "mistral",
    ToolMarks("[TOOL_CALLS]", bare=True, after_name="[ARGS]"),
    evidence=("[TOOL_CALLS]",),
    shown=("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    array=True,
    id_length=9,
)
LLAMA3 = ToolFormat(
    "llama3",
    ToolMarks("<|python_tag|>", bare=True),
    evidence=("<|python_tag|>", "Environment: ipython"),
    shown=("<|python_tag|>",),
    arguments="parameters",
    separator="; ",
)
JSON = ToolFormat("json", ToolMarks(bare=True, ignored=("```json", "```")))

TOOL_FORMATS: Mapping[str, ToolFormat] = {each.name: each for each in (HERMES, MISTRAL, LLAMA3, JSON)}
"""By name. The first one whose evidence is in a template is the template's; the last one is for all others."""


def format_of(template: str) -> ToolFormat:
    """Return the format of the models with this chat template."""
    return next(
        (each for each in TOOL_FORMATS.values() if any(text in template for text in each.evidence)),
        JSON,
    )


def plain_messages(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], *, parallel: bool
) -> list[dict[str, Any]]:
    """Return a conversation without roles and fields of tools, for a chat template that has no part for them.

    The tools are described at the end of the system message, calls are the assistant's text in the default format, and
    results come from the user.
    """
    plain: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] == "tool":
            result = f"Result of {message.get('name') or 'the tool'}:\n{_text(message['content'])}"
            if plain and plain[-1].get("results"):
                plain[-1]["content"] += f"\n\n{result}"
            else:
                plain.append({"role": "user", "content": result, "results": True})
        elif calls := message.get("tool_calls"):
            parts = [_text(message.get("content")), "\n".join(map(_written, calls))]
            plain.append({"role": message["role"], "content": "\n".join(part for part in parts if part)})
        else:
            plain.append(dict(message))
    for message in plain:
        message.pop("results", None)
    if not tools:
        return plain
    instructions = _instructions(tools, parallel=parallel)
    if plain and plain[0]["role"] == "system":
        plain[0]["content"] = f"{_text(plain[0]['content'])}\n\n{instructions}"
        return plain
    return [{"role": "system", "content": f"You are a helpful assistant.\n\n{instructions}"}, *plain]


def _instructions(tools: Sequence[Mapping[str, Any]], *, parallel: bool) -> str:
    """Describe the tools to a model. Small models follow short sentences and an example best."""
    listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    several = " To call several tools, answer with a JSON array of such objects." if parallel else ""
    return (
        f"You can call these tools:\n{listed}\n\n"
        'To call a tool, answer only with JSON: {"name": "<name of the tool>", "arguments": {<its arguments>}}.'
        f"{several} If you need no tool, answer in plain text."
    )


def _written(call: Mapping[str, Any]) -> str:
    function = call["function"]
    arguments = function["arguments"]
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return f'{{"name": {json.dumps(function["name"])}, "arguments": {text}}}'


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "\n".join(part["text"] for part in content)
    return content or ""
