"""The OpenAPI document as a page for people: paths, bodies, answers and errors, in Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

Schema = Mapping[str, Any]
TITLE = "API reference"
_LEAST = {"minimum": "at least", "exclusiveMinimum": "above", "minLength": "at least", "minItems": "at least"}
_MOST = {"maximum": "at most", "exclusiveMaximum": "below", "maxLength": "at most", "maxItems": "at most"}
_UNITS = {"minLength": " characters", "maxLength": " characters", "minItems": " items", "maxItems": " items"}
FIRST_ERROR = 400


def reference(document: Schema) -> str:
    """Return the page of an OpenAPI document."""
    lines = [
        f"# {TITLE}",
        "",
        "Made from [the OpenAPI document](/openapi.json), which programs read. What the options do is in "
        "[the API](services/gateway/README.md).",
        "",
        "## Paths",
        "",
    ]
    errors: dict[str, str] = {}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if method == "head":  # as its GET, without a body
                continue
            lines += _operation(f"{method.upper()} {path}", operation)
            errors |= {code: one["description"] for code, one in operation["responses"].items() if _is_error(code)}
    lines += ["## Errors", "", "| status | meaning |", "|---|---|"]
    lines += [f"| {code} | {errors[code]} |" for code in sorted(errors)]
    lines += ["", "## Bodies and answers", ""]
    for name, schema in sorted(document["components"]["schemas"].items()):
        lines += _schema(name, schema)
    return "\n".join(lines) + "\n"


def _is_error(code: str) -> bool:
    return int(code) >= FIRST_ERROR


def _operation(name: str, operation: Schema) -> Iterator[str]:
    yield from (f"### `{name}`", "", f"{operation['summary']}.", "")
    yield from ("| | |", "|---|---|")
    for parameter in operation.get("parameters", []):
        yield f"| {parameter['in']} `{parameter['name']}` | {parameter.get('description', '')} |"
    if (body := operation.get("requestBody")) is not None:
        yield f"| body | {_contents(body)} |"
    for code, answer in operation["responses"].items():
        if not _is_error(code):
            yield f"| answer {code} | {_contents(answer)} |"
    codes = ", ".join(code for code in operation["responses"] if _is_error(code))
    yield f"| [errors](#errors) | {codes} |"
    yield ""


def _contents(of: Schema) -> str:
    found = [f"{_type(one['schema'])} (`{kind}`)" for kind, one in of.get("content", {}).items()]
    return ", ".join(found) or "no body"


def _schema(name: str, schema: Schema) -> Iterator[str]:
    yield from (f"### {name}", "")
    if not (properties := schema.get("properties")):
        yield from (f"{_type(schema)}.", "")
        return
    yield from ("| field | type | |", "|---|---|---|")
    for field, one in properties.items():
        yield f"| `{field}` | {_type(one)} | {'required' if field in schema.get('required', ()) else ''} |"
    yield ""


def _type(schema: Any) -> str:
    """Return a schema in words, for a cell of a table."""
    if not isinstance(schema, Mapping) or not schema:
        return "any value"
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    for several in ("anyOf", "oneOf"):
        if several in schema:
            kinds = [_type(one) for one in schema[several] if one.get("type") != "null"]
            nothing = [] if len(kinds) == len(schema[several]) else ["null"]
            return " or ".join(dict.fromkeys([*kinds, *nothing]))
    if "const" in schema:
        return _value(schema["const"])
    if "enum" in schema:
        return ", ".join(map(_value, schema["enum"]))
    kind = schema.get("type", "any value")
    if kind == "array":
        kind = f"list of {_type(schema.get('items'))}"
    limits = [
        f"{words} {schema[limit]}{_UNITS.get(limit, '')}"
        for limit, words in (_LEAST | _MOST).items()
        if schema.get(limit) is not None
    ]
    return f"{kind} ({', '.join(limits)})" if limits else str(kind)


def _value(value: Any) -> str:
    return f"`{json.dumps(value, ensure_ascii=False)}`".replace("|", "\\|")
