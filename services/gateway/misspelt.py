"""Options of a request that look misspelt.

Unknown options are ignored, since clients of every age send some. One whose name is nearly that of an option
which the body lacks is ignored too, but a response header and a warning in the log name it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextvars import ContextVar
from difflib import get_close_matches

from shared.runtime import logging

IGNORED_HEADER = "x-wisp-ignored"
LEAST_LIKENESS = 0.85
"""`difflib`'s ratio of two names, from 0 to 1."""
MOST_CHECKED = 32
"""Most unknown options that are compared: one comparison costs some 50 µs."""
MOST_NAMED = 8
LONGEST_NAME = 64

FOUND: ContextVar[Mapping[str, str] | None] = ContextVar("misspelt", default=None)
"""The misspelt options of the current request, each with the option that is probably meant."""


def note(unknown: Collection[str], given: Collection[str], options: Collection[str]) -> None:
    """Note the misspelt options among the unknown ones of a body, for the log and the response's header.

    given: all options of the body; options: all that the API has.
    """
    missing = {_plain(option): option for option in options if option not in given}
    found = {}
    for name in [name for name in unknown if len(name) <= LONGEST_NAME][:MOST_CHECKED]:
        if near := get_close_matches(_plain(name), missing, 1, LEAST_LIKENESS):
            found[name] = missing[near[0]]
        if len(found) == MOST_NAMED:
            break
    if found:
        FOUND.set(found)
        logging.get().warning("options ignored that look misspelt", options=found)


def header_value(found: Mapping[str, str]) -> str:
    """Return the value of `IGNORED_HEADER`."""
    return ", ".join(f"{ascii(name)[1:-1]} (did you mean {option}?)" for name, option in found.items())


def _plain(name: str) -> str:
    """Return a name in lower case, with `_` for `-`."""
    return name.lower().replace("-", "_")
