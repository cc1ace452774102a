"""Files of the speculation controller: trained weights (JSON), and recorded rounds to train them on (JSON lines)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from pydantic import ValidationError

from services.drafter.control.records import RoundRecord
from services.drafter.control.weights import ControlWeights
from shared.errors import ModelError, SettingsError


def load_weights(path: Path) -> ControlWeights:
    """Read a weights file. Raises ModelError when it is missing or invalid."""
    remedy = "train them with `wisp controller train`"
    try:
        return ControlWeights.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ModelError(f"no controller weights at {path} ({error.strerror}); {remedy}") from error
    except ValidationError as error:
        raise ModelError(f"{path} holds no controller weights: {_first_problem(error, 'file')}; {remedy}") from error


def save_weights(path: Path, weights: ControlWeights) -> None:
    """Write a weights file. Raises ModelError when it cannot be written."""
    try:
        path.write_text(weights.model_dump_json(indent=1) + "\n")
    except OSError as error:
        raise ModelError(f"cannot write controller weights to {path}: {error.strerror}") from error


def write_record(file: TextIO, record: RoundRecord) -> None:
    """Append a round as one line."""
    file.write(record.model_dump_json(exclude_defaults=True) + "\n")


def read_records(path: Path) -> Iterator[RoundRecord]:
    """Yield the rounds in a file. Raises SettingsError, with file and line, at the first invalid one."""
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
        raise SettingsError(f"{where} is no recorded round: {_first_problem(error, 'record')}") from error


def _first_problem(error: ValidationError, whole: str) -> str:
    """Return the first problem with its place in the file; `whole` names a problem of the file itself."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or whole}: {first['msg']}"
