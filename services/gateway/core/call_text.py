"""The text of one tool call, a JSON object with a name and arguments, read character by character."""

from __future__ import annotations

import json
from enum import Enum, auto
from typing import Any

SPACE = " \t\n\r"
"""Characters that may stand anywhere between the parts of a call."""
_ARGUMENTS = ("arguments", "parameters")


class _Step(Enum):
    OPEN = auto()
    BEFORE_KEY = auto()
    KEY = auto()
    COLON = auto()
    BEFORE_VALUE = auto()
    VALUE = auto()


class CallText:
    """The JSON object of one call, read character by character."""

    def __init__(self, name: str | None = None) -> None:
        """name: of a call whose object is its arguments."""
        self.name = name
        self.begun = False
        """True once its name was passed on. Nothing of it can become content after that."""
        self.complete = False
        self.has_arguments = False
        self.raw = ""
        """Everything that was read, until the call has begun."""
        self._short = name is not None
        self._step = _Step.OPEN
        self._key = ""
        self._value: list[str] = []
        self._kind = ""
        """First character of the value."""
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._arguments = ""
        """Arguments not taken yet."""

    def feed(self, character: str) -> None:
        """Read one character. Raises ValueError if this is no call."""
        if not self.begun:
            self.raw += character
        if self._step is _Step.OPEN:
            if self._short:
                self._key = _ARGUMENTS[0]
                self._begin_value(character)
            else:
                self._step = _Step.BEFORE_KEY
        elif self._step is _Step.BEFORE_KEY:
            self._before_key(character)
        elif self._step is _Step.KEY:
            self._value.append(character)
            if not self._string_goes_on(character):
                self._key = str(json.loads("".join(self._value)))
                self._step = _Step.COLON
        elif self._step is _Step.COLON:
            if character == ":":
                self._step = _Step.BEFORE_VALUE
            elif character not in SPACE:
                raise ValueError(character)
        elif self._step is _Step.BEFORE_VALUE:
            if character not in SPACE:
                self._begin_value(character)
        else:
            self._in_value(character)

    def take_arguments(self) -> str:
        """Return the arguments read since the last call, as JSON."""
        arguments, self._arguments = self._arguments, ""
        return arguments

    @property
    def _streams(self) -> bool:
        return self._key in _ARGUMENTS and self._kind in "{[" and not self.has_arguments

    def _before_key(self, character: str) -> None:
        if character == '"':
            self._step, self._value = _Step.KEY, [character]
            self._in_string, self._escaped = True, False
        elif character == "}":
            self.complete = True
        elif character != "," and character not in SPACE:
            raise ValueError(character)

    def _begin_value(self, character: str) -> None:
        if character in ",:}]":
            raise ValueError(character)
        self._step, self._kind, self._value = _Step.VALUE, character, []
        self._depth, self._in_string, self._escaped = 0, False, False
        self._in_value(character)

    def _in_value(self, character: str) -> None:
        """Add a character to the value; a number, true, false or null ends with the character after it."""
        if self._kind not in '"{[':
            if character in ",}" or character in SPACE:
                self._end_value()
                self._before_key(character)
            else:
                self._value.append(character)
            return
        if self._streams:
            self._arguments += character
        else:
            self._value.append(character)
        if self._in_string:
            self._string_goes_on(character)
        elif character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
        if not self._in_string and not self._depth:
            self._end_value()

    def _string_goes_on(self, character: str) -> bool:
        """Follow a string's escapes and end."""
        if self._escaped:
            self._escaped = False
        elif character == "\\":
            self._escaped = True
        elif character == '"':
            self._in_string = False
        return self._in_string

    def _end_value(self) -> None:
        streamed = self._streams
        self._step = _Step.BEFORE_KEY
        if self._key in _ARGUMENTS:
            if not self.has_arguments and not streamed:
                self._arguments += _as_arguments("".join(self._value))
            self.has_arguments = True
            self.complete = self._short
        elif self._key == "name" and self.name is None:
            self._name(json.loads("".join(self._value)))
        elif self._key == "function" and self.name is None and self._kind == "{":
            # OpenAI's own form, which some models repeat.
            function = json.loads("".join(self._value))
            self._name(function.get("name"))
            given: Any = next((function[key] for key in _ARGUMENTS if key in function), {})
            self._arguments += given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
            self.has_arguments = True

    def _name(self, name: object) -> None:
        if not isinstance(name, str) or not name:
            raise ValueError(name)
        self.name = name


def _as_arguments(value: str) -> str:
    """Return arguments that are no object: a string may hold the object's text, null stands for none."""
    try:
        decoded = json.loads(value)
    except ValueError:
        return value
    return "{}" if decoded is None or decoded == "" else decoded if isinstance(decoded, str) else value
