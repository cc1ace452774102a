"""Loading of settings from command line and environment, and the description of invalid ones for people."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from difflib import get_close_matches
from typing import Any, NoReturn, TypeVar

from pydantic import ValidationError
from pydantic_core import to_jsonable_python
from pydantic_settings import SettingsError as SourceError

from shared.errors import in_words
from shared.runtime.settings import WispSettings, variable

SECRET = frozenset({"session_secret", "api_key"})
"""Settings whose values never appear in messages."""
LIKE = 0.9
"""Similarity (`difflib`) from which an unknown variable is taken for a misspelt setting. No setting of one service is
as similar as this to one of another service, nor is a variable that Kubernetes sets."""
JSON_FORMS = {
    "list_type": "must be a list, as JSON",
    "dict_type": "must be an object, as JSON",
    "model_type": "must be an object, as JSON",
}
"""Descriptions of these errors of pydantic that say how to write the value in a variable."""

S = TypeVar("S", bound=WispSettings)


def load(kind: type[S], program: str) -> S:
    """Return settings from command line, environment and defaults. Invalid ones print what is wrong and exit with 2."""
    try:
        return kind(_cli_parse_args=True, _cli_prog_name=program)  # type: ignore[call-arg]
    except ValidationError as error:
        refuse(program, [f"  {problem}" for problem in problems_of(error)])
    except SourceError as error:
        refuse(program, [f"  {_unread(kind, error)}"])


def from_environment(kind: type[S], environment: Mapping[str, str]) -> S:
    """Return the settings of a process with this environment and no options. Raises ValidationError."""
    # A subclass, because the environment belongs to the class; with its name, by which `problems_of` finds fields.
    namespace = {"environment": environment, "__module__": kind.__module__}
    given: S = type(kind.__name__, (kind,), namespace)()
    return given


def problems_of(error: ValidationError, *, options: bool = True) -> list[str]:
    """Describe each problem of invalid settings in a line for people: variable, form, given value, example.

    options: name the services' options too.
    """
    problems = []
    kind = next((kind for kind in _kinds(WispSettings) if kind.__name__ == error.title), None)
    for item in error.errors():
        if not item["loc"]:  # a rule over several settings
            problems.append(in_words(item))
            continue
        name, *inside = (str(part) for part in item["loc"])
        at = f" at {'.'.join(inside)}" if inside else ""
        given = "" if item["type"] == "missing" or name in SECRET else f" (given: {item['input']!r})"
        message = JSON_FORMS.get(item["type"]) or in_words(item)
        instead = _for_example(kind, name) if kind is not None and name in kind.model_fields else ""
        called = f"{variable(name)} or --{name.replace('_', '-')}" if options else variable(name)
        problems.append(f"{called}{at}: {message}{given}{instead}")
    return problems


def _unread(kind: type[WispSettings], error: SourceError) -> str:
    """Describe an option that cannot be parsed."""
    name = next((name for name in kind.model_fields if re.search(rf"\b{name}\b", str(error))), None)
    if name is None:
        return str(error)
    return f"--{name.replace('_', '-')} cannot be read{_for_example(kind, name)}"


def misspelt(environment: Mapping[str, str], known: Collection[str]) -> dict[str, str]:
    """Return the variables that seem to be misspelt, each with the known one that is probably meant."""
    unknown = (name for name in sorted(environment) if name.startswith("WISP_") and name.upper() not in known)
    nearest = {name: get_close_matches(name.upper(), known, 1, LIKE) for name in unknown}
    return {name: near for name, found in nearest.items() for near in found}


def as_variable(value: Any) -> str:
    """Return the text of an environment variable that has this value."""
    plain = to_jsonable_python(value)
    return plain if isinstance(plain, str) else json.dumps(plain)


def _kinds(base: type[WispSettings]) -> Iterator[type[WispSettings]]:
    for kind in base.__subclasses__():
        yield kind
        yield from _kinds(kind)


def _for_example(kind: type[WispSettings], name: str) -> str:
    example = _example(kind, name)
    return f"; for example {variable(name)}={example}" if example else ""


def _example(kind: type[WispSettings], name: str) -> str | None:
    """Return a valid value of a setting as a variable's text: its example, its default, or one that fits its type."""
    field = kind.model_fields[name]
    if field.examples:
        return as_variable(field.examples[0])
    default = None if field.is_required() else field.get_default(call_default_factory=True)
    if default not in (None, "", [], {}):
        return as_variable(default)
    schema = kind.model_json_schema(by_alias=False)["properties"].get(name, {})
    form: dict[str, Any] = next((one for one in schema.get("anyOf", [schema]) if one.get("type") != "null"), {})
    match form:
        case {"enum": [first, *_]}:
            return str(first)
        case {"type": "integer" | "number"}:
            return str(form.get("minimum", 1))
        case {"type": "string", "pattern": _}:
            return f"{name.replace('_', '-')}-1"
        case {"type": "array", "items": {"enum": [first, *_]}}:
            return as_variable([first])
        case {"type": "array", "items": {"type": "number"}}:
            return as_variable([0.5, 2.0])
    return None


def refuse(program: str, problems: list[str]) -> NoReturn:
    """Print what is wrong with the settings, and exit with 2."""
    print(f"{program}: bad settings\n" + "\n".join(problems) + f"\nSee `{program} --help`.", file=sys.stderr)
    raise SystemExit(2)
