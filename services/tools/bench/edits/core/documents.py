"""The packaged edits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Edit:
    """A document, an instruction to change it, and the changed document."""

    document: str
    kind: str
    instruction: str
    before: str
    after: str


def edits(packaged: Mapping[str, Any]) -> Iterator[Edit]:
    """Yield the edits of the packaged file. Raises ValueError if a replaced text does not occur exactly once."""
    for document in packaged["document"]:
        content = document["content"].lstrip("\n")
        for edit in document["edit"]:
            after = content
            for old, new in edit["replace"]:
                if after.count(old) != 1:
                    raise ValueError(
                        f"{document['name']}, {edit['instruction']!r}: {old!r} occurs {after.count(old)} times"
                    )
                after = after.replace(old, new)
            yield Edit(document["name"], document["kind"], edit["instruction"], content, after)
