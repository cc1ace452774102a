"""Checked reading of a model's configuration: a value that is not understood is refused, never ignored."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from types import EllipsisType
from typing import Any

from shared.models.description import Inconsistent, NotDescribed


class Configuration:
    """The values of a JSON object. Each getter checks a value's type and records that its key was read, and
    `refuse_unread` ends the reading. A default applies to a key that is absent; without one the key is required.

    Every getter raises Inconsistent for a value of another type, for a number that is not finite and positive, and
    for null, except where the getter's name says `optional`."""

    def __init__(self, values: Mapping[str, Any], source: str = "config.json") -> None:
        self._values = values
        self._source = source
        self._read: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def value(self, key: str, default: Any = ...) -> Any:
        """Return a value of any type."""
        self._read.add(key)
        value = self._values.get(key, default)
        if value is ...:
            raise Inconsistent(f"{self._source} has no {key}")
        return value

    def optional_whole(self, key: str, default: int | EllipsisType | None = ..., *, least: int = 1) -> int | None:
        value = self.value(key, default)
        if value is not None and not (_is_whole(value) and value >= least):
            raise self.unusable(key, f"an integer from {least}")
        return value if value is None else int(value)

    def whole(self, key: str, default: int | EllipsisType = ..., *, least: int = 1) -> int:
        value = self.optional_whole(key, default, least=least)
        if value is None:
            raise self.unusable(key, f"an integer from {least}")
        return value

    def wholes(self, key: str) -> list[int]:
        value = self.value(key)
        if not isinstance(value, list) or not all(_is_whole(each) for each in value):
            raise self.unusable(key, "a list of integers")
        return list(value)

    def optional_number(self, key: str, default: float | EllipsisType | None = None) -> float | None:
        value = self.value(key, default)
        if value is None:
            return None
        if not _is_positive(value):
            raise self.unusable(key, "a positive number")
        return float(value)

    def number(self, key: str, default: float | EllipsisType = ...) -> float:
        value = self.optional_number(key, default)
        if value is None:
            raise self.unusable(key, "a positive number")
        return value

    def numbers(self, key: str) -> list[float]:
        value = self.value(key)
        if not isinstance(value, list) or not all(_is_positive(each) for each in value):
            raise self.unusable(key, "a list of positive numbers")
        return [float(each) for each in value]

    def texts(self, key: str) -> list[str]:
        value = self.value(key)
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise self.unusable(key, "a list of strings")
        return list(value)

    def flag(self, key: str, default: bool | EllipsisType = ...) -> bool:
        value = self.value(key, default)
        if not isinstance(value, bool):
            raise self.unusable(key, "true or false")
        return value

    def text(self, key: str, default: str | EllipsisType = ...) -> str:
        value = self.value(key, default)
        if not isinstance(value, str):
            raise self.unusable(key, "a string")
        return value

    def optional_mapping(self, key: str) -> Mapping[str, Any] | None:
        value = self.value(key, None)
        if value is not None and not isinstance(value, Mapping):
            raise self.unusable(key, "an object")
        return value

    def refuse_unread(
        self, ignored: Collection[str] = (), neutral: Mapping[str, Collection[Any]] | None = None
    ) -> None:
        """Raise NotDescribed for a key that no getter read. Accepted are the keys in `ignored`, the values in `neutral`
        for a key in it, and null for every other key."""
        neutral = neutral or {}
        for key, value in self._values.items():
            if key in self._read or key in ignored:
                continue
            if key in neutral:
                if value not in neutral[key]:
                    raise NotDescribed(f"{self._source} has {key} {_shown(value)}, which is not supported")
            elif value is not None:
                raise NotDescribed(f"{self._source} has the unknown key {key}")

    def unusable(self, key: str, expected: str) -> Inconsistent:
        """Return the error for a value that is not what is expected."""
        return Inconsistent(f"{self._source} has {key} {_shown(self._values.get(key))}, not {expected}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _shown(value: Any) -> str:
    return "null" if value is None else repr(value) if len(repr(value)) <= 40 else f"{repr(value)[:40]}..."
