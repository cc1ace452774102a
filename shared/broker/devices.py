"""The file with the names of the devices that may join: a JSON list."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from shared.errors import SettingsError
from shared.runtime.settings import NAME_PATTERN

_FILE = TypeAdapter(list[Annotated[str, Field(pattern=NAME_PATTERN)]])


def read_devices(path: Path) -> list[str]:
    """The names, each once, in the file's order. Raises SettingsError."""
    try:
        return list(dict.fromkeys(_FILE.validate_json(path.read_bytes())))
    except OSError as error:
        raise SettingsError(f"devices {path}: {error.strerror or error}") from error
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]["msg"]
        raise SettingsError(
            f'devices {path}: {problem}; a JSON list of names is expected: ["kitchen", "car-7"]'
        ) from error
