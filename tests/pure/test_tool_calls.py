"""Tool calls in a model's text, and conversations for templates without tools."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.core.tool_calls import CallDelta, ContentDelta, ToolCallParser, ToolDelta
from services.gateway.core.tool_formats import (
    HERMES,
    JSON,
    LLAMA3,
    MISTRAL,
    TOOL_FORMATS,
    ToolFormat,
    format_of,
    plain_messages,
)

Calls = list[tuple[str, str]]

OFFERED = ("get_weather", "add")
WEATHER = '{"city": "Köln \\"am\\" {Rhein}", "days": [1, {"n": 2}]}'


def read(form: ToolFormat, pieces: Sequence[str], *, parallel: bool = True) -> tuple[str, Calls]:
    """Return the content and the calls of a text that arrives in pieces."""
    parser = ToolCallParser(form.marks, OFFERED, parallel=parallel)
    deltas: list[ToolDelta] = []
    for piece in pieces:
        deltas += parser.feed(piece)
    deltas += parser.finish()
    content, calls = "", []
    for delta in deltas:
        if isinstance(delta, ContentDelta):
            content += delta.text
            continue
        if delta.name is not None:
            assert delta.index == len(calls)
            calls.append((delta.name, ""))
        name, arguments = calls[delta.index]
        calls[delta.index] = (name, arguments + delta.arguments)
    return content, calls


CASES: list[tuple[ToolFormat, str, str, Calls]] = [
    (
        HERMES,
        f'Let me see.\n<tool_call>\n{{"name": "get_weather", "arguments": {WEATHER}}}\n</tool_call>\n'
        '<tool_call>\n{"arguments": {"a": 1}, "name": "add"}\n</tool_call>\n',
        "Let me see.",
        [("get_weather", WEATHER), ("add", '{"a": 1}')],
    ),
    (HERMES, '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>', "", [("unknown", "{}")]),
    (HERMES, "a <tool_calls> b <tool_call> c", "a <tool_calls> b <tool_call> c", []),
    (HERMES, '<tool_call>{"city": 1}</tool_call> no', '<tool_call>{"city": 1}</tool_call> no', []),
    (HERMES, '{"name": "add", "arguments": {}}', '{"name": "add", "arguments": {}}', []),
    (HERMES, " \n plain\n", " \n plain\n", []),
    (HERMES, '<tool_call>{"name": "add", "arguments": {"a": 1', "", [("add", '{"a": 1')]),
    (HERMES, '<tool_call>{"name": "add"', "", [("add", "")]),
    (HERMES, 'x <tool_call>{"na', 'x <tool_call>{"na', []),
    (
        MISTRAL,
        '[TOOL_CALLS][{"name": "add", "arguments": {"a": 1}}, {"name": "add", "arguments": "{\\"b\\": 2}"}]',
        "",
        [("add", '{"a": 1}'), ("add", '{"b": 2}')],
    ),
    (
        MISTRAL,
        'Now: [TOOL_CALLS]add[ARGS]{"a": [1]}[TOOL_CALLS]get_weather{"b": {}}',
        "Now:",
        [("add", '{"a": [1]}'), ("get_weather", '{"b": {}}')],
    ),
    (MISTRAL, '[{"name": "add", "arguments": {}}]', "", [("add", "{}")]),
    (MISTRAL, "[1, 2] are numbers", "[1, 2] are numbers", []),
    (
        LLAMA3,
        '<|python_tag|>{"name": "add", "parameters": {"a": 1}}; {"name": "add", "parameters": {}}',
        "",
        [("add", '{"a": 1}'), ("add", "{}")],
    ),
    (LLAMA3, '{"name": "add", "parameters": {"a": 1}}', "", [("add", '{"a": 1}')]),
    (LLAMA3, '{"name": "Ada", "parameters": {}}', '{"name": "Ada", "parameters": {}}', []),
    (JSON, '```json\n{"name": "add", "arguments": {"a": 1}}\n```', "", [("add", '{"a": 1}')]),
    (
        JSON,
        '[{"type": "function", "function": {"name": "add", "arguments": "{}"}}, {"name": "add", "arguments": null}]',
        "",
        [("add", "{}"), ("add", "{}")],
    ),
    (JSON, '{"name": "add"}', "", [("add", "{}")]),
    (JSON, '{"name": "add", "arguments": {}} and more', "and more", [("add", "{}")]),
    (JSON, '{"name": "add" oops', "oops", [("add", "{}")]),
    (JSON, '{"answer": 42}', '{"answer": 42}', []),
    (JSON, 'Sure: {"name": "add"}', 'Sure: {"name": "add"}', []),
    (JSON, '{"name": 5, "arguments": {}}', '{"name": 5, "arguments": {}}', []),
    (JSON, "```python\nprint()\n```", "```python\nprint()\n```", []),
    (JSON, "", "", []),
]


@pytest.mark.parametrize(("form", "text", "content", "calls"), CASES)
def test_calls_and_content_are_separated(form: ToolFormat, text: str, content: str, calls: Calls) -> None:
    assert read(form, [text]) == (content, calls)
    assert read(form, list(text)) == (content, calls)


FRAGMENTS = [
    *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "```json", "```"),
    *('{"name": "add", "arguments": {"a": 1}}', '{"name": "add"', ', "parameters": {"x": "}"}', "}", "{", "[", "]"),
    *(" ", "\n", ",", ";", "add", '"', "\\", ":", "text", "1", "<tool", "[TOOL", "é"),
]


@given(
    form=st.sampled_from(list(TOOL_FORMATS.values())),
    fragments=st.lists(st.sampled_from(FRAGMENTS), max_size=14),
    cuts=st.lists(st.integers(0, 200), max_size=12),
    parallel=st.booleans(),
)
def test_any_split_of_a_text_has_the_same_calls_and_content(
    form: ToolFormat, fragments: list[str], cuts: list[int], parallel: bool
) -> None:
    text = "".join(fragments)
    ends = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    pieces = [text[a:b] for a, b in pairwise(ends)]
    whole = read(form, [text], parallel=parallel)
    assert read(form, pieces, parallel=parallel) == whole
    assert read(form, list(text), parallel=parallel) == whole
    if not whole[1]:
        assert whole[0] == text, "a text without a call is passed on as it is"


ARGUMENTS = st.dictionaries(
    st.text(max_size=8),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=12),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
        max_leaves=5,
    ),
    max_size=4,
)


def written(form: ToolFormat, calls: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """Write calls as a model of this family does."""
    texts = [json.dumps({"name": name, form.arguments: arguments}, ensure_ascii=False) for name, arguments in calls]
    if form is MISTRAL:
        return f"[TOOL_CALLS][{', '.join(texts)}]"
    if form is HERMES:
        return "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in texts)
    return form.separator.join(texts)


@given(
    form=st.sampled_from(list(TOOL_FORMATS.values())),
    calls=st.lists(st.tuples(st.sampled_from(OFFERED), ARGUMENTS), min_size=1, max_size=3),
    size=st.integers(1, 9),
)
def test_calls_come_back_as_a_model_wrote_them(
    form: ToolFormat, calls: list[tuple[str, dict[str, Any]]], size: int
) -> None:
    text = written(form, calls)
    content, found = read(form, [text[at : at + size] for at in range(0, len(text), size)])
    assert content == ""
    assert [(name, json.loads(arguments)) for name, arguments in found] == calls
    _, (first, *others) = read(form, [text], parallel=False)
    assert (first[0], json.loads(first[1]), others) == (*calls[0], [])


def test_arguments_are_streamed_as_they_come() -> None:
    parser = ToolCallParser(HERMES.marks, OFFERED)
    assert parser.feed('<tool_call>{"name": "ad') == []
    assert parser.feed('d", "arguments": {"te') == [CallDelta(0, '{"te', "add")]
    assert parser.feed('xt": "long') == [CallDelta(0, 'xt": "long')]
    assert parser.feed('"}}</tool_call>') == [CallDelta(0, '"}')]
    assert parser.finish() == []


@pytest.mark.parametrize("depth", [10, 100_000])
def test_deep_nesting_does_no_harm(depth: int) -> None:
    for text in ('{"name": ' + "[" * depth + "]" * depth + "}", '{"function": {"name": ' + "[" * depth):
        assert read(JSON, [text]) == (text, [])


@pytest.mark.parametrize(
    ("template", "form"),
    [
        ("{% if tools %}<tool_call>{% endif %}", HERMES),
        ("{% if tools %}[AVAILABLE_TOOLS]{% endif %}[TOOL_CALLS]", MISTRAL),
        ("{% if tools %}Environment: ipython{% endif %}", LLAMA3),
        ("{% if tools %}You have tools.{% endif %}", JSON),
        ("", JSON),
    ],
)
def test_a_family_is_recognised_by_its_template(template: str, form: ToolFormat) -> None:
    assert format_of(template) is form


def test_call_ids_are_stable_and_have_the_length_that_the_template_demands() -> None:
    ids = {
        form.call_id("chatcmpl-1", completion, call) for form in (HERMES,) for completion in (0, 1) for call in (0, 1)
    }
    assert len(ids) == 4
    assert HERMES.call_id("chatcmpl-1", 0, 1) == HERMES.call_id("chatcmpl-1", 0, 1)
    assert HERMES.given_id("call_x") == "call_x"
    own = MISTRAL.call_id("chatcmpl-1", 0, 0)
    assert MISTRAL.given_id(own) == own
    assert len(MISTRAL.given_id("call_123456789")) == 9
    assert MISTRAL.given_id("call_123456789").isalnum()


TOOL = {"type": "function", "function": {"name": "add", "description": "Add.", "parameters": {"type": "object"}}}
HISTORY: list[dict[str, Any]] = [
    {"role": "user", "content": "1+2 and 3+4?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}},
            {"id": "b", "type": "function", "function": {"name": "add", "arguments": '{"a": 3, "b"'}},
        ],
    },
    {"role": "tool", "content": "3", "name": "add", "tool_call_id": "a"},
    {"role": "tool", "content": [{"type": "text", "text": "7"}], "name": None, "tool_call_id": "b"},
]


def test_a_template_without_tools_gets_a_conversation_without_them() -> None:
    messages = plain_messages(HISTORY, [TOOL], parallel=True)
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user"]
    assert all(set(message) == {"role", "content"} for message in messages)
    assert json.dumps(TOOL["function"]) in messages[0]["content"]
    assert "JSON array" in messages[0]["content"]
    assert messages[2]["content"] == (
        '{"name": "add", "arguments": {"a": 1, "b": 2}}\n{"name": "add", "arguments": {"a": 3, "b"}'
    )
    assert messages[3]["content"] == "Result of add:\n3\n\nResult of the tool:\n7"
    assert "role" in HISTORY[2], "the caller's messages stay as they are"


def test_tools_are_added_to_the_system_message_and_only_if_there_are_any() -> None:
    system = {"role": "system", "content": "Be brief."}
    messages = plain_messages([system, HISTORY[0]], [TOOL], parallel=False)
    assert messages[0]["content"].startswith("Be brief.\n\nYou can call these tools:")
    assert "JSON array" not in messages[0]["content"]
    assert plain_messages([system, HISTORY[0]], [], parallel=True) == [system, HISTORY[0]]
    assert system["content"] == "Be brief."
