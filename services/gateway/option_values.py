"""Values of options in several forms, such as one text or a list of them, checked and in one form.

Also checks of options that need or exclude another one, which stands before them in the body's model.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import PlainValidator, ValidationInfo
from pydantic_core import PydanticCustomError

from services.gateway.body import as_whole

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1024
MAX_BAD_WORDS = 1024
LARGEST_BIAS = 100.0


def _stops(value: Any) -> list[str]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise PydanticCustomError("stop_type", "must be a string or a list of strings")
    if len(stops) > MAX_STOPS or not all(0 < len(stop) <= MAX_STOP_CHARACTERS for stop in stops):
        raise PydanticCustomError(
            "stop_value", f"must be at most {MAX_STOPS} strings of 1 to {MAX_STOP_CHARACTERS} characters"
        )
    return stops


def _tokens(value: Any) -> list[int] | None:
    """Return a non-empty list of token ids; None for anything else."""
    tokens = [as_whole(token) for token in value] if isinstance(value, list) else []
    return tokens if tokens and all(type(token) is int for token in tokens) else None


def token_ids(value: Any) -> list[int] | None:
    """Return a list of token ids, perhaps an empty one; null stays null."""
    if value is None or value == []:
        return value  # type: ignore[no-any-return]
    if (tokens := _tokens(value)) is None:
        raise PydanticCustomError("token_ids_type", "must be a list of token ids")
    return tokens


def _biases(value: Any) -> dict[int, float]:
    """Return biases by token id. JSON's keys are strings."""
    if value is None or value == []:
        return {}
    if not isinstance(value, dict) or any(isinstance(bias, bool) for bias in value.values()):
        raise PydanticCustomError("logit_bias_type", "must be an object with a number by token id")
    if not all(re.fullmatch(r"\d{1,10}", token) for token in value):
        raise PydanticCustomError("logit_bias_type", "must have token ids as keys")
    if not all(isinstance(bias, int | float) and abs(bias) <= LARGEST_BIAS for bias in value.values()):
        raise PydanticCustomError(
            "logit_bias_value", f"must have numbers from -{LARGEST_BIAS:g} to {LARGEST_BIAS:g} as values"
        )
    return {int(token): float(bias) for token, bias in value.items()}


def _words(value: Any) -> list[str]:
    words = [] if value is None else value
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise PydanticCustomError("bad_words_type", "must be a list of strings")
    if len(words) > MAX_BAD_WORDS or not all(word.strip() and len(word) <= MAX_STOP_CHARACTERS for word in words):
        text = f"must be at most {MAX_BAD_WORDS} words of 1 to {MAX_STOP_CHARACTERS} characters"
        raise PydanticCustomError("bad_words_value", text)
    return words


def _prompts(value: Any) -> list[str | list[int]]:
    if isinstance(value, str):
        return [value]
    if tokens := _tokens(value):
        return [tokens]
    if isinstance(value, list) and value:
        if all(isinstance(prompt, str) for prompt in value):
            return value
        lists = [tokens for prompt in value if (tokens := _tokens(prompt))]
        if len(lists) == len(value):
            return list(lists)
    raise PydanticCustomError(
        "prompt_type",
        "must be a string, a non-empty list of strings, a non-empty list of token ids, or a list of these",
    )


def same_as_n(value: int | None, info: ValidationInfo) -> int | None:
    """Refuse a `best_of` other than `n`: no more completions are made than are returned."""
    if value is not None and value != info.data.get("n", value):
        raise PydanticCustomError("best_of_value", "must be n: leave best_of out, or send the same number")
    return value


def no_generation_prompt(value: bool, info: ValidationInfo) -> bool:
    """Refuse `continue_final_message` beside `add_generation_prompt`."""
    if value and info.data.get("add_generation_prompt"):
        raise PydanticCustomError("continue_value", "excludes add_generation_prompt: leave one of them out")
    return value


def not_streamed(value: int | None, info: ValidationInfo) -> int | None:
    """Refuse `prompt_logprobs` in a stream."""
    if value is not None and info.data.get("stream"):
        raise PydanticCustomError("prompt_logprobs_value", "is not available in a stream; leave out stream")
    return value


def with_logprobs(value: int | None, info: ValidationInfo) -> int | None:
    """Refuse `top_logprobs` without `logprobs`."""
    if value and not info.data.get("logprobs"):
        raise PydanticCustomError("top_logprobs_value", "needs logprobs: true")
    return value


def false_as_none(value: Any) -> Any:
    """Return a number of log-probabilities; None for false, which some clients send for none."""
    return None if value is False else as_whole(value)


Stops = Annotated[list[str], PlainValidator(_stops, json_schema_input_type=str | list[str])]
Words = Annotated[list[str], PlainValidator(_words, json_schema_input_type=list[str])]
Biases = Annotated[dict[int, float], PlainValidator(_biases, json_schema_input_type=dict[str, float])]
TokenIds = PlainValidator(token_ids, json_schema_input_type=list[int])
Prompts = Annotated[
    list[str | list[int]],
    PlainValidator(_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
]
