"""What clients ask for: OpenAI's request bodies, checked.

Options that we do not know are ignored, as clients of every age send some. Known options that would change the text
but are not built are refused unless they have the value that changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError
from pydantic_core import PydanticCustomError, from_json

from services.gateway.errors import ApiError, invalid
from shared.messages import DraftChoice, Sampling
from shared.runtime.settings import NAME_PATTERN

MAX_STOPS = 4
MAX_STOP_CHARACTERS = 1024
GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy: logits divided by them overflow."""
SMALLEST_TOP_P = 1e-6
"""OpenAI allows 0; this keeps the one most probable token as well."""

_NO_OP: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "chat_template": (),
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_choice": ([],),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "min_p": (0,),
    "min_tokens": (0,),
    "modalities": (["text"], []),
    "presence_penalty": (0,),
    "prompt_logprobs": (),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "skip_special_tokens": (True,),
    "stop_token_ids": ([],),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "use_beam_search": (False,),
    "web_search_options": (),
}
"""Known options that are not built, with the values (besides null) that ask for nothing."""


def _stops(value: Any) -> list[str]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise PydanticCustomError("stop_type", "must be a string or a list of strings")
    if len(stops) > MAX_STOPS or not all(0 < len(stop) <= MAX_STOP_CHARACTERS for stop in stops):
        raise PydanticCustomError(
            "stop_value", f"must be at most {MAX_STOPS} strings of 1 to {MAX_STOP_CHARACTERS} characters"
        )
    return stops


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def _prompts(value: Any) -> list[str | list[int]]:
    if isinstance(value, str) or _is_tokens(value):
        return [value]
    if isinstance(value, list) and value and (all(isinstance(p, str) for p in value) or all(map(_is_tokens, value))):
        return value
    raise PydanticCustomError(
        "prompt_type",
        "must be a string, a non-empty list of strings, a non-empty list of token ids, or a list of these",
    )


def _or(default: Any) -> BeforeValidator:
    """Null means the default, as in OpenAI's API."""
    return BeforeValidator(lambda value: default if value is None else value)


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", hide_input_in_errors=True)


class StreamOptions(_Body):
    """How a stream is sent."""

    include_usage: Annotated[bool, _or(False)] = False


class WispOptions(_Body):
    """Our own options, under the key `wisp`."""

    trace: Annotated[bool, _or(False)] = False
    """Tell for each token whether it was drafted, and what the rounds cost."""
    draft: Annotated[DraftChoice | None, Field(strict=False)] = None
    pool: Annotated[str | None, Field(pattern=NAME_PATTERN)] = None
    """Drafters of this pool only."""
    resumable: Annotated[bool, _or(False)] = False
    """A client that goes away may come back for the rest of its stream: the text goes on for a while without it."""


class Part(_Body):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class ChatMessage(_Body):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    def rendered(self) -> dict[str, Any]:
        """The message as chat templates know it."""
        role = "system" if self.role == "developer" else self.role
        content = self.content if isinstance(self.content, str) else [part.model_dump() for part in self.content]
        return {"role": role, "content": content}

    def texts(self) -> list[str]:
        """What the message says, in its parts."""
        return [self.content] if isinstance(self.content, str) else [part.text for part in self.content]


class GenerationRequest(_Body):
    """What chats and completions have in common."""

    model: str
    stream: Annotated[bool, _or(False)] = False
    stream_options: Annotated[StreamOptions, _or(StreamOptions())] = StreamOptions()
    n: Annotated[int, Field(ge=1, le=128), _or(1)] = 1
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False), _or(1.0)] = 1.0
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False), _or(1.0)] = 1.0
    top_k: Annotated[int, Field(ge=-1, lt=2**31), _or(0)] = 0
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63)] = None
    stop: Annotated[list[str], PlainValidator(_stops)] = []
    ignore_eos: Annotated[bool, _or(False)] = False
    """Generate up to the token limit, past the model's end-of-text token (for measurements; vLLM has it too)."""
    service_tier: str | None = None
    wisp: Annotated[WispOptions, _or(WispOptions())] = WispOptions()

    def sampling(self, seed: int) -> Sampling:
        """The sampling parameters with this seed."""
        return Sampling(
            temperature=0.0 if self.temperature < GREEDY_BELOW else self.temperature,
            top_p=max(self.top_p, SMALLEST_TOP_P),
            top_k=max(self.top_k, 0),
            seed=seed,
        )


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None

    @property
    def limit(self) -> int | None:
        """Most output tokens; None for what the context leaves. The newer option goes before the older one."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: Annotated[list[str | list[int]], PlainValidator(_prompts)]
    max_tokens: Annotated[int, Field(ge=1), _or(16)] = 16
    echo: Annotated[bool, _or(False)] = False

    @property
    def limit(self) -> int | None:
        """Most output tokens."""
        return self.max_tokens


R = TypeVar("R", bound=GenerationRequest)


def parse(kind: type[R], body: bytes) -> R:
    """The request in a body. Raises ApiError with status 400 that names the option and what is wrong with it."""
    try:
        fields = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise invalid(f"the request's body is not JSON: {error}", code="invalid_json") from error
    if not isinstance(fields, dict):
        raise invalid(f"the request's body must be a JSON object, not {_kind(fields)}", code="invalid_json")
    _refuse_unsupported(fields)
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _explain(error) from error


def _refuse_unsupported(fields: Mapping[str, Any]) -> None:
    for name in fields.keys() & _NO_OP.keys():
        value = fields[name]
        if value is None or any(_same(value, harmless) for harmless in _NO_OP[name]):
            continue
        allowed = ", ".join(["null", *(repr(harmless) for harmless in _NO_OP[name])])
        raise invalid(f"{name} is not supported here; leave it out (or send {allowed})", name, "unsupported_parameter")


def _same(value: Any, harmless: Any) -> bool:
    # In Python, 0 equals False and 1 equals True; in JSON they are of different types.
    return isinstance(value, bool) == isinstance(harmless, bool) and bool(value == harmless)


def _explain(error: ValidationError) -> ApiError:
    # A union reports each of its branches; the one that got furthest is the one that was meant.
    first = max(error.errors(include_url=False), key=lambda problem: len(problem["loc"]))
    path = ""
    for step in first["loc"]:
        if isinstance(step, int):
            path += f"[{step}]"
        elif step in ("str", "int") or step.startswith(("list[", "function-", "constrained-")):
            continue  # the branch of a union: ours, not the client's
        else:
            path += f".{step}" if path else step
    if first["type"] == "missing":
        return invalid(f"{path} is missing", path, "missing_required_parameter")
    value = first["input"]
    given = f" (given: {repr(value)[:60]})" if isinstance(value, str | int | float) else f" (given: {_kind(value)})"
    code = "invalid_type" if first["type"].endswith("_type") else "invalid_value"
    return invalid(f"{path}: {first['msg']}{given}", path, code)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
