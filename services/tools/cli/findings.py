"""Findings of `wisp doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

State = Literal["ok", "note", "missing"]


@dataclass(frozen=True)
class Finding:
    """The state of one part. A `missing` part keeps a stack from running; a `note` does not."""

    part: str
    state: State
    found: str
    advice: str = ""


def short(path: Path) -> str:
    """Return a path relative to the working folder or to `~`, if it lies below one of them."""
    for base, prefix in ((Path.cwd(), ""), (Path.home(), "~/")):
        if base != Path(base.anchor) and path != base and path.is_relative_to(base):
            return f"{prefix}{path.relative_to(base)}"
    return str(path)
