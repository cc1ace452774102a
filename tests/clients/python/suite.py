"""What the checks of all clients share: the suite's address, and what they ask."""

from __future__ import annotations

import json
import os
from typing import Any, Literal

import pydantic

URL = os.environ["WISP_CLIENTS_URL"]
"""The address of the API, with /v1."""
ROOT = URL.removesuffix("/v1")
MODEL = os.environ["WISP_CLIENTS_MODEL"]
CONTEXT = int(os.environ["WISP_CLIENTS_CONTEXT"])
"""Most tokens of a prompt and its answer. A token is a byte."""

QUESTION = "How is the weather in Rome?"
ASK: list[Any] = [{"role": "user", "content": QUESTION}]
TOO_LONG = "far " * CONTEXT
TOKENS = 200


class Weather(pydantic.BaseModel):
    """The weather at a place. The texts of its fields are short, since the model goes on with free texts for ever."""

    sky: Literal["clear", "cloudy"]
    wind: Literal["calm", "fresh", "strong"]
    rain: bool


PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "enum": [1, 2]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
FORECAST: dict[str, Any] = {
    "type": "function",
    "function": {"name": "forecast", "description": "Tells the weather.", "parameters": PARAMETERS},
}


def assert_arguments(arguments: str | dict[str, Any]) -> None:
    """Fail unless these are arguments of `FORECAST`."""
    read = json.loads(arguments) if isinstance(arguments, str) else arguments
    assert set(read) == {"city", "days"}
    assert read["city"] in ("Rome", "Oslo")
    assert read["days"] in (1, 2)
