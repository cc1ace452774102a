"""Files in pieces, for ways that carry only small ones."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict

from shared.errors import SettingsError

CHUNK: Final = 1 << 20


class FilePiece(BaseModel):
    """A piece of a file."""

    model_config = ConfigDict(frozen=True)

    name: str
    bytes: int
    sha256: str


def split(file: Path, to: Path, name: str, most_bytes: int) -> list[FilePiece]:
    """Write the pieces of a file, at most `most_bytes` each, into the folder `to`, as NAME.0, NAME.1 and so on."""
    pieces: list[FilePiece] = []
    with file.open("rb") as content:
        while part := content.read(most_bytes):
            piece = to / f"{name}.{len(pieces)}"
            piece.write_bytes(part)
            pieces.append(FilePiece(name=piece.name, bytes=len(part), sha256=hashlib.sha256(part).hexdigest()))
    return pieces


def join(folder: Path, pieces: Sequence[FilePiece], to: Path) -> None:
    """Write the file of these pieces. Raises SettingsError if one is missing or damaged."""
    with to.open("wb") as file:
        for piece in pieces:
            try:
                part = (folder / piece.name).read_bytes()
            except OSError as error:
                raise SettingsError(
                    f"{folder / piece.name} cannot be read ({error.strerror}): copy it again"
                ) from error
            if hashlib.sha256(part).hexdigest() != piece.sha256:
                raise SettingsError(f"{folder / piece.name} is damaged: copy it again")
            file.write(part)
