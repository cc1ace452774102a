"""Options of a request that look misspelt.

Unknown options are ignored, since clients of every age send some. One that is nearly the name of an option which the
body lacks is ignored too, but a header of the answer names it, and so does a warning in the log.
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
"""Most unknown options that are looked at: a comparison costs some 50 µs."""
MOST_NAMED = 8
LONGEST_NAME = 64

FOUND: ContextVar[Mapping[str, str] | None] = ContextVar("misspelt", default=None)
"""The misspelt options of the current request, and the options that they are nearly."""


def find(unknown: Collection[str], given: Collection[str], options: Collection[str]) -> None:
    """Look for misspelt options among the unknown ones of a body, which has the `given` ones."""
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


def in_words(found: Mapping[str, str]) -> str:
    """Return the value of the header."""
    return ", ".join(f"{ascii(name)[1:-1]} (did you mean {option}?)" for name, option in found.items())


def _plain(name: str) -> str:
    """Return a name without the differences between ways of writing names of several words."""
    return name.lower().replace("-", "_")
