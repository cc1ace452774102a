"""Instructions by which the compiler could choose the bits of a result. The kernels must have none."""

from __future__ import annotations

import re

_RELAXED = re.compile(r"^\s*(%\S+ = .*?\b(?:fast|contract|reassoc|arcp|afn|nnan|ninf|nsz)\b.*)", re.MULTILINE)
"""A fast-math flag, in LLVM's notation."""


def relaxed(code: str) -> list[str]:
    """Return the instructions of LLVM code by which the compiler may change bits."""
    return _RELAXED.findall(code)
