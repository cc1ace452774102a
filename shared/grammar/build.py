"""Grammars in the form that goes over the wire: a text in llguidance's own syntax, made from what clients send.

JSON is written with one space after `:` and `,` and no other white space, as Python's `json.dumps` writes it and most
models have learned it: free white space lets small models go on with it for ever, and fixed white space is forced, so
that its tokens cost no round of their own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, regex_to_lark
from llguidance.gbnf_to_lark import any_to_lark

from shared.errors import GrammarError

LIMITS = LLParserLimits(
    max_lexer_states=50_000, max_grammar_size=100_000, initial_lexer_fuel=50_000, verbose_errors=False
)
"""Limits of one grammar's memory, of the time to build it, some 50 ms, and of the time of one mask, some 15 ms."""
LONGEST_PLACE = 300

_OPEN = frozenset(
    ("additionalProperties", "unevaluatedProperties", "patternProperties", "allOf", "anyOf", "oneOf", "$ref")
)
"""Keywords beside `properties` by which a schema says something about other properties, or may do so."""
_NAMED = ("properties", "patternProperties", "$defs", "definitions")
_LISTED = ("prefixItems", "anyOf", "oneOf", "allOf")
_SINGLE = ("items", "additionalProperties", "contains", "not", "if", "then", "else")
"""Keywords whose values are schemas by name, lists of schemas, or one schema."""
_JSON = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def json_schema(schema: Mapping[str, Any], *, strict: bool = True) -> str:
    """Return the grammar of JSON texts that fit a schema.

    Objects with `properties` have no others unless the schema says so: the text fits the schema as well, and models do
    not go on inventing keys. strict: False ignores keywords that cannot be enforced; True makes them an error.

    Raises GrammarError, with the place in the schema.
    """
    for candidate in (_closed(schema), schema):
        text = _schema_text(candidate, strict)
        if (problem := _problem(text)) is None:
            return text
    place = _place(schema, schema, strict)
    raise GrammarError(f"{place}: {problem}" if place else problem)


def json_object() -> str:
    """Return the grammar of any JSON object."""
    return _schema_text({"type": "object"}, True)


def regex(pattern: str) -> str:
    """Return the grammar of the texts that match a regular expression in whole. `\\d`, `\\w` and `\\s` are ASCII."""
    return lark(f"start: /{regex_to_lark(pattern, 'dws')}/")


def choice(texts: Sequence[str]) -> str:
    """Return the grammar of one of these texts."""
    return lark("start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts))


def lark(text: str) -> str:
    """Return a grammar given in llguidance's Lark syntax."""
    return LLMatcher.grammar_from_lark(text)


def any_syntax(text: str) -> str:
    """Return a grammar given as Lark, or as GBNF or EBNF. Raises GrammarError."""
    try:
        return lark(any_to_lark(text))
    except Exception as error:  # the converter raises what its parts raise
        raise GrammarError(f"the grammar is neither Lark nor GBNF: {error}") from error


def check(grammar: str) -> None:
    """Raise GrammarError, with the place, if a grammar cannot be built."""
    if (problem := _problem(grammar)) is not None:
        raise GrammarError(problem)


def begins(grammar: str, text: str) -> bool:
    """Return whether a text of a grammar that can be built begins with this one, or is it."""
    matcher, body = _on_bytes(grammar).deep_copy(), text.encode()
    return matcher.try_consume_tokens(list(body)) == len(body)


@lru_cache(maxsize=64)
def _on_bytes(grammar: str) -> LLMatcher:
    """Return a matcher whose tokens are bytes, to be copied."""
    return LLMatcher(LLTokenizer("byte"), grammar, log_level=0, limits=LIMITS)


def inline_schema(schema: Mapping[str, Any], *, strict: bool = False) -> str:
    """Return a JSON schema as a part of a rule in Lark syntax."""
    return f"%json {json.dumps(_with_options(_closed(schema), strict))}"


def _problem(grammar: str) -> str | None:
    """Return the reason why a grammar cannot be built; None if it can."""
    failed, messages = LLMatcher.validate_grammar_with_warnings(grammar, limits=LIMITS)
    if not failed:
        return None
    text = " ".join(line.strip() for line in "".join(messages[:1]).splitlines() if line.strip())
    return text[:LONGEST_PLACE] or "it cannot be built"


def _schema_text(schema: Mapping[str, Any], strict: bool) -> str:
    try:
        return LLMatcher.grammar_from_json_schema(_with_options(schema, strict))
    except ValueError as error:  # such as an integer of more than 64 bits
        raise GrammarError(f"the schema cannot be read: {error}") from error


def _with_options(schema: Mapping[str, Any], strict: bool) -> dict[str, Any]:
    """Return the schema with llguidance's options for it."""
    return {**schema, "x-guidance": {**_JSON, "lenient": not strict}}


def _place(schema: Mapping[str, Any], root: Mapping[str, Any], strict: bool) -> str:
    """Return the path of the innermost part of a schema that has a problem of its own; empty for the schema itself."""
    shared = {key: root[key] for key in ("$defs", "definitions") if key in root}
    for path, part in _parts(schema):
        if _problem(_schema_text({**shared, **part}, strict)) is not None:
            inner = _place(part, root, strict)
            return f"{path}.{inner}" if inner else path
    return ""


def _parts(schema: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the schemas that are parts of a schema, with their paths."""
    for key, value in schema.items():
        if key in _NAMED and isinstance(value, dict):
            parts = [(f"{key}.{name}", part) for name, part in value.items()]
        elif key in _LISTED and isinstance(value, list):
            parts = [(f"{key}[{at}]", part) for at, part in enumerate(value)]
        elif key in _SINGLE:
            parts = [(key, value)]
        else:
            continue
        yield from ((path, part) for path, part in parts if isinstance(part, dict))


def _closed(schema: Any) -> Any:
    """Return a schema whose objects have only the properties that it names, where it does not say."""
    if not isinstance(schema, dict):
        return schema
    closed: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _NAMED and isinstance(value, dict):
            closed[key] = {name: _closed(part) for name, part in value.items()}
        elif key in _LISTED and key != "allOf" and isinstance(value, list):  # the parts of allOf share their properties
            closed[key] = [_closed(part) for part in value]
        else:
            closed[key] = _closed(value) if key in _SINGLE else value
    if "properties" in schema and not _OPEN.intersection(schema):
        closed["additionalProperties"] = False
    return closed
