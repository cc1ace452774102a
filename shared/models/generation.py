"""The sampling that a model's generation_config.json proposes, and the templates of its conversations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import ModelError
from shared.models.folder_files import read_object


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """Sampling options of requests that name none; None for no default."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None

    @classmethod
    def proposed(cls, generation: Mapping[str, Any], file: Path) -> SamplingDefaults:
        """Return what the content of generation_config.json proposes. Raises ModelError for a value out of range."""
        temperature = _number(generation, file, "temperature", 0, math.inf)
        top_p = _number(generation, file, "top_p", 0, 1)
        top_k = _number(generation, file, "top_k", -1, 2**31 - 1)
        if top_k != int(top_k or 0) and top_k is not None:
            raise _wrong(generation, file, "top_k", "an integer")
        return cls(temperature, top_p, None if top_k is None else int(top_k))


def _number(generation: Mapping[str, Any], file: Path, key: str, least: float, most: float) -> float | None:
    value = generation.get(key)
    if value is None:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not least <= value <= most:
        raise _wrong(generation, file, key, f"a number from {least} to {most}")
    return float(value)


def _wrong(generation: Mapping[str, Any], file: Path, key: str, expected: str) -> ModelError:
    value = repr(generation[key])[:60]
    return ModelError(f"{file} has {key} {value}, not {expected}. Correct it, or set WISP_GENERATION_CONFIG=ignore.")


def conversation_template(folder: Path, tokenizer_config: Mapping[str, Any], name: str) -> str | None:
    """Return a Jinja template of conversations by its name; a model with a single one calls it default.

    It is chat_template.jinja, or in chat_template.json or tokenizer_config.json. Raises ModelError if it is no text.
    """
    file = folder / "chat_template.jinja"
    try:
        if file.is_file():
            return file.read_text(encoding="utf-8") if name == "default" else None
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} can't be read ({error}). Download the model again.") from error
    template = read_object(folder / "chat_template.json", optional=True).get("chat_template")
    if template is None:
        template = tokenizer_config.get("chat_template")
    if isinstance(template, list):
        template = next((each["template"] for each in template if each.get("name") == name), None)
    elif name != "default":
        return None
    if template is not None and not isinstance(template, str):
        raise ModelError(f"{folder}: the chat_template is no text. Download the model again.")
    return template
