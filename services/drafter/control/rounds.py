"""Recorded rounds, from which the controller is trained: JSON lines, one per round."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, TextIO

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from services.drafter.control.guess import Guess
from shared.errors import SettingsError

Count = Annotated[int, Field(ge=0)]


class RoundRecord(BaseModel):
    """One verified round; a session's rounds are recorded in their order, plain ones (without guesses) as well."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants")

    session: str
    kind: str = ""
    """Kind of text, where known."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    target_entropy: float | None = None
    guesses: list[Guess]
    """The tokens that were sent."""
    verified: Count
    accepted: Count

    @model_validator(mode="after")
    def _ordered(self) -> RoundRecord:
        if not self.accepted <= self.verified <= len(self.guesses):
            raise ValueError(
                f"accepted {self.accepted} <= verified {self.verified} <= guesses {len(self.guesses)} must hold"
            )
        return self


def write(file: TextIO, record: RoundRecord) -> None:
    """Append a round."""
    file.write(record.model_dump_json(exclude_defaults=True) + "\n")


def read(path: Path) -> Iterator[RoundRecord]:
    """The rounds in a file. Raises SettingsError that names the file and line where it is not one."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _parsed(line, f"{path}, line {number}")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"cannot read recorded rounds from {path}: {error}") from error


def _parsed(line: str, where: str) -> RoundRecord:
    try:
        return RoundRecord.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "record"
        raise SettingsError(f"{where} is no recorded round: {field}: {first['msg']}") from error
