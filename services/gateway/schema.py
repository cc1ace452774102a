"""Requests: OpenAI's bodies with our own options and headers, checked.

Unknown options are ignored, because clients of every age send some; within our own object `wisp` they are refused.
Options of OpenAI and of other servers that would change the text but are not supported
(`services.gateway.core.options`) are refused too.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from math import isfinite
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    PlainValidator,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError, from_json

from services.drafter.sources.registry import AUTO, CHOICES, SourceChoiceName
from services.gateway.body import Body, or_default
from services.gateway.core.options import (
    CHAT_OPTIONS,
    COMPLETION_OPTIONS,
    MESSAGE_OPTIONS,
    STRUCTURED_OPTIONS,
    UnsupportedOption,
    same,
    unsupported,
)
from services.gateway.errors import ApiError, invalid
from services.gateway.grammar_options import (
    ChoiceTexts,
    GrammarOption,
    JsonSchema,
    OptionalText,
    ResponseFormat,
    StructuredOutputs,
)
from services.gateway.tool_options import Tool, ToolCall, ToolChoice, parse_tool_choice
from shared.broker.topology import DEFAULT_POOL
from shared.errors import SHOWN, cut, quoted
from shared.messages import GRAMMAR, LOGPROBS, MOST_LOGPROBS, RULES, Logprobs, Sampling
from shared.models.folder import SamplingDefaults
from shared.runtime.settings import NAME_PATTERN

DRAFT_HEADER = "x-wisp-draft"
POOL_HEADER = "x-wisp-pool"
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1024
MAX_TOOLS = 128
MAX_BAD_WORDS = 1024
BLOCK_TAG = "block "
"""Prefix of the tags of a union of blocks. Errors leave such a tag out of an option's path."""
LARGEST_BIAS = 100.0
GREEDY_BELOW = 1e-5
"""Lower temperatures are greedy: logits divided by them overflow."""
NO_DEFAULTS = SamplingDefaults()
SMALLEST_TOP_P = 1e-6
"""Replaces 0, which OpenAI allows. Both keep only the most probable token."""


def _stops(value: Any) -> list[str]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise PydanticCustomError("stop_type", "must be a string or a list of strings")
    if len(stops) > MAX_STOPS or not all(0 < len(stop) <= MAX_STOP_CHARACTERS for stop in stops):
        raise PydanticCustomError(
            "stop_value", f"must be at most {MAX_STOPS} strings of 1 to {MAX_STOP_CHARACTERS} characters"
        )
    return stops


def _whole(value: Any) -> Any:
    """Return a number without fraction as an integer: JSON has one kind of number, and some clients send 4.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _tokens(value: Any) -> list[int] | None:
    """Return a non-empty list of token ids; None for anything else."""
    tokens = [_whole(token) for token in value] if isinstance(value, list) else []
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


def _same_as_n(value: int | None, info: ValidationInfo) -> int | None:
    """Refuse a `best_of` other than `n`: the completions that are made are those that are returned."""
    if value is not None and value != info.data.get("n", value):
        raise PydanticCustomError("best_of_value", "must be n: leave best_of out, or send the same number")
    return value


def _no_generation_prompt(value: bool, info: ValidationInfo) -> bool:
    if value and info.data.get("add_generation_prompt"):
        raise PydanticCustomError("continue_value", "excludes add_generation_prompt: leave one of them out")
    return value


def _not_streamed(value: int | None, info: ValidationInfo) -> int | None:
    if value is not None and info.data.get("stream"):
        raise PydanticCustomError("prompt_logprobs_value", "is not available in a stream; leave out stream")
    return value


def _top_logprobs(value: int | None, info: ValidationInfo) -> int | None:
    if value and not info.data.get("logprobs"):
        raise PydanticCustomError("top_logprobs_value", "needs logprobs: true")
    return value


def _no_boolean(value: Any) -> Any:
    """Return a number of log-probabilities; None for false, which some clients send for none."""
    return None if value is False else _whole(value)


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


Number = TypeVar("Number", int, float)


def _first(asked: Number | None, default: Number | None, otherwise: Number) -> Number:
    return asked if asked is not None else default if default is not None else otherwise


def _most(value: Any) -> Any:
    """Return a token limit; None for -1, which means no limit for llama.cpp's clients."""
    whole = _whole(value)
    return None if whole == -1 and type(whole) is int else whole


_TokenIds = PlainValidator(token_ids, json_schema_input_type=list[int])
_Prompts = PlainValidator(_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]])
Whole = BeforeValidator(_whole)
_Most = BeforeValidator(_most)


class StreamOptions(Body):
    """OpenAI's `stream_options`."""

    include_usage: Annotated[bool, or_default(False)] = False


class WispOptions(Body, extra="forbid"):
    """Our own options, under the key `wisp`. Unknown ones are refused, since no other server has any there."""

    trace: Annotated[bool, or_default(False)] = False
    """Add to each chunk the origin of its tokens and the costs of its rounds."""
    draft: SourceChoiceName | None = None
    """The draft source."""
    pool: Annotated[str | None, Field(pattern=NAME_PATTERN)] = None
    """The pool of drafters."""
    metrics: Annotated[bool, or_default(False)] = False
    """Add vLLM's `metrics.speculative_decoding` to the answer."""
    resumable: Annotated[bool, or_default(False)] = False
    """Keep generating for a while after the client goes away, so that it can resume the stream."""


class ContentPart(Body):
    """One part of a message's content."""

    type: Literal["text"]
    text: str


class PredictionOption(Body):
    """OpenAI's `prediction`: the text that the client expects."""

    type: Literal["content"]
    content: str | list[ContentPart]

    @property
    def text(self) -> str:
        """The text of all parts."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatMessage(Body):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    tool_calls: Annotated[list[ToolCall], or_default([])] = Field(default=[])
    tool_call_id: str | None = None
    """The call of which a tool's message is the result."""
    name: str | None = None
    content: Annotated[str | list[ContentPart] | None, Field(validate_default=True)] = None

    @field_validator("content")
    @classmethod
    def _is_given(cls, value: Any, info: ValidationInfo) -> Any:
        if value is None and not info.data.get("tool_calls"):
            raise PydanticCustomError("missing", "Field required")
        return value

    def rendered(self) -> dict[str, Any]:
        """Return the message in the form that chat templates take."""
        role = "system" if self.role == "developer" else self.role
        content = [part.model_dump() for part in self.content] if isinstance(self.content, list) else self.content
        fields: dict[str, Any] = {"role": role, "content": content or ""}
        if self.tool_calls and role == "assistant":
            fields["tool_calls"] = [call.rendered() for call in self.tool_calls]
        if role == "tool":
            fields |= {"name": self.name, "tool_call_id": self.tool_call_id or ""}
        return fields

    def texts(self) -> list[str]:
        """Return the texts of the message's parts, and of its calls."""
        parts = [part.text for part in self.content] if isinstance(self.content, list) else [self.content or ""]
        return [*parts, *(str(call.function.arguments) for call in self.tool_calls)]


class GenerationRequest(Body):
    """Options of both endpoints."""

    model: str
    stream: Annotated[bool, or_default(False)] = False
    stream_options: Annotated[StreamOptions, or_default(StreamOptions())] = StreamOptions()
    n: Annotated[int, Field(ge=1, le=128), Whole, or_default(1)] = 1
    temperature: Annotated[float | None, Field(ge=0, le=2, allow_inf_nan=False)] = None
    top_p: Annotated[float | None, Field(ge=0, le=1, allow_inf_nan=False)] = None
    top_k: Annotated[int | None, Field(ge=-1, lt=2**31), Whole] = None
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63), Whole] = None
    stop: Annotated[list[str], PlainValidator(_stops, json_schema_input_type=str | list[str])] = Field(default=[])
    max_tokens: Annotated[int | None, Field(ge=1), _Most] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1), _Most] = None
    """Text completions take it too, although OpenAI has it for chats only: clients send it to both."""
    ignore_eos: Annotated[bool, or_default(False)] = False
    """Generate up to the token limit, past the end-of-text token. vLLM's name, as those of the options below."""
    stop_token_ids: Annotated[list[int], _TokenIds, or_default([])] = Field(default=[])
    include_stop_str_in_output: Annotated[bool, or_default(False)] = False
    min_tokens: Annotated[int, Field(ge=0, lt=2**31), Whole, or_default(0)] = 0
    presence_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False), or_default(0.0)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False), or_default(0.0)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False), or_default(1.0)] = 1.0
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False), or_default(0.0)] = 0.0
    logit_bias: Annotated[dict[int, float], PlainValidator(_biases, json_schema_input_type=dict[str, float])] = Field(
        default={}
    )
    bad_words: Annotated[list[str], PlainValidator(_words, json_schema_input_type=list[str])] = Field(default=[])
    allowed_token_ids: Annotated[list[int] | None, _TokenIds] = None
    prompt_logprobs: Annotated[int | None, Field(ge=0, le=MOST_LOGPROBS), AfterValidator(_not_streamed), Whole] = None
    return_tokens_as_token_ids: Annotated[bool, or_default(False)] = False
    best_of: Annotated[int | None, Field(ge=1), AfterValidator(_same_as_n), Whole] = None
    prediction: PredictionOption | None = None
    response_format: Annotated[ResponseFormat, or_default(ResponseFormat())] = ResponseFormat()
    guided_json: JsonSchema = None
    guided_regex: OptionalText = ""
    guided_choice: ChoiceTexts = Field(default=[])
    guided_grammar: OptionalText = ""
    structured_outputs: Annotated[StructuredOutputs, or_default(StructuredOutputs())] = StructuredOutputs()
    service_tier: str | None = None
    wisp: Annotated[WispOptions, or_default(WispOptions())] = WispOptions()

    @property
    def limit(self) -> int | None:
        """Most output tokens per completion; None for as many as fit. The newer option overrides the older one."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def has_rules(self) -> bool:
        """True if an option changes the target's logits: the sessions then have `LogitRules`."""
        return bool(
            self.presence_penalty
            or self.frequency_penalty
            or self.repetition_penalty != 1
            or self.logit_bias
            or self.min_p
            or self.min_tokens
            or self.bad_words
            or self.allowed_token_ids is not None
        )

    @property
    def top(self) -> int | None:
        """Number of most probable tokens to return with each token's log-probability; None for no log-probabilities."""
        return None

    @property
    def echoes(self) -> bool:
        """True if the text begins with the prompt."""
        return False

    def logprobs_of(self, prompt_len: int) -> Logprobs | None:
        """Return the log-probabilities that a session with this prompt asks for."""
        asked = [count for count in (self.top, self.prompt_logprobs) if count is not None]
        if not asked:
            return None
        of_prompt = self.prompt_logprobs is not None or self.echoes
        return Logprobs(top=max(asked), prompt_len=prompt_len if of_prompt else None)

    @property
    def needs(self) -> frozenset[str]:
        """Features that the sessions need of their verifiers."""
        rules = [RULES] if self.has_rules else []
        grammar = [GRAMMAR] if self.has_grammar else []
        return frozenset([*rules, *grammar] if self.logprobs_of(1) is None else [*rules, *grammar, LOGPROBS])

    @property
    def has_grammar(self) -> bool:
        """True if the answers follow a grammar."""
        return self.grammar is not None

    @property
    def grammar(self) -> GrammarOption | None:
        """The option that sets the grammar of the answers; None if they are free."""
        return next(iter(self._grammars()), None)

    def _grammars(self) -> list[GrammarOption]:
        form, outputs = self.response_format, self.structured_outputs
        schema = form.json_schema if form.type == "json_schema" else None
        given = [
            ("json_object", form.type == "json_object", form.param),
            ("json_schema", self.guided_json, "guided_json"),
            ("regex", self.guided_regex, "guided_regex"),
            ("choice", self.guided_choice, "guided_choice"),
            ("grammar", self.guided_grammar, "guided_grammar"),
            ("json_schema", outputs.json_, "structured_outputs.json"),
            ("json_object", outputs.json_object, "structured_outputs.json_object"),
            ("regex", outputs.regex, "structured_outputs.regex"),
            ("choice", outputs.choice, "structured_outputs.choice"),
            ("grammar", outputs.grammar, "structured_outputs.grammar"),
        ]
        options = [
            GrammarOption(kind, json.dumps(value), param)
            for kind, value, param in given
            if value or (isinstance(value, dict) and kind == "json_schema")
        ]
        if schema is not None:
            value = json.dumps(schema.json_schema)
            options.append(GrammarOption("json_schema", value, form.schema_param, schema.strict))
        return options

    @model_validator(mode="after")
    def _has_one_grammar(self) -> Self:
        if len(several := [option.param for option in self._grammars()]) > 1:
            text = "{first}: an answer has one grammar, and {second} sets one too"
            raise PydanticCustomError("grammar_value", text, {"first": several[0], "second": several[1]})
        return self

    def draft(self, headers: Mapping[str, str]) -> str:
        """Return the requested draft source; the option overrides the header. Raises ApiError."""
        wanted = self.wisp.draft or headers.get(DRAFT_HEADER, AUTO)
        if wanted not in CHOICES:
            known = ", ".join(CHOICES)
            raise invalid(f"header {DRAFT_HEADER} must be one of {known}, not {quoted(wanted)}", DRAFT_HEADER)
        return wanted

    def pool(self, headers: Mapping[str, str]) -> str:
        """Return the requested pool of drafters; the option overrides the header. Raises ApiError."""
        text = self.wisp.pool or headers.get(POOL_HEADER, DEFAULT_POOL)
        if not re.fullmatch(NAME_PATTERN, text):
            allowed = "1 to 64 letters, digits, underscores or dashes"
            raise invalid(f"header {POOL_HEADER} must be {allowed}, not {quoted(text)}", POOL_HEADER)
        return text

    def sampling(self, seed: int, defaults: SamplingDefaults = NO_DEFAULTS) -> Sampling:
        """Return the sampling parameters with this seed. defaults: for those that the request does not name."""
        temperature = _first(self.temperature, defaults.temperature, 1.0)
        return Sampling(
            temperature=0.0 if temperature < GREEDY_BELOW else temperature,
            top_p=max(_first(self.top_p, defaults.top_p, 1.0), SMALLEST_TOP_P),
            top_k=max(_first(self.top_k, defaults.top_k, 0), 0),
            seed=seed,
        )


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    unsupported: ClassVar[Mapping[str, UnsupportedOption]] = CHAT_OPTIONS

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS), or_default([])] = Field(default=[])
    tool_choice: Annotated[ToolChoice, PlainValidator(parse_tool_choice)] = ToolChoice()
    parallel_tool_calls: Annotated[bool, or_default(True)] = True

    add_generation_prompt: bool | None = None
    continue_final_message: Annotated[bool, AfterValidator(_no_generation_prompt), or_default(False)] = False
    chat_template_kwargs: Annotated[dict[str, Any], or_default({})] = Field(default={})
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    logprobs: Annotated[bool, or_default(False)] = False
    top_logprobs: Annotated[int | None, Field(ge=0, le=MOST_LOGPROBS), AfterValidator(_top_logprobs), Whole] = None

    @property
    def has_grammar(self) -> bool:
        """True if the answers follow a grammar: that of an option, or that of calls that must be made."""
        return self.tool_choice.mode == "required" or self.grammar is not None

    @property
    def offered_tools(self) -> list[Tool]:
        """The tools that the model may call."""
        return [] if self.tool_choice.mode == "none" else self.tools

    @model_validator(mode="after")
    def _tools_fit(self) -> ChatRequest:
        names = [tool.function.name for tool in self.tools]
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise PydanticCustomError(
                "tools_value", "tools: two tools have the name {name}", {"name": quoted(twice[0])}
            )
        choice = self.tool_choice
        if choice.mode == "required" and (not names or choice.name not in (None, *names)):
            missing = "tools is empty" if choice.name is None else f"tools has no function {quoted(choice.name)}"
            raise PydanticCustomError("tool_choice_value", "tool_choice: {missing}", {"missing": missing})
        return self

    @property
    def top(self) -> int | None:
        """See `GenerationRequest.top`."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def template_variables(self) -> dict[str, Any]:
        """Values for the chat template's own variables."""
        effort = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        return {**effort, **self.chat_template_kwargs}


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    unsupported: ClassVar[Mapping[str, UnsupportedOption]] = COMPLETION_OPTIONS

    prompt: Annotated[
        list[str | list[int]],
        _Prompts,
    ]
    max_tokens: Annotated[int | None, Field(ge=0), _Most, or_default(16)] = 16
    """OpenAI's default is 16; 0 is for the prompt's tokens alone."""
    echo: Annotated[bool, or_default(False)] = False
    logprobs: Annotated[int | None, Field(ge=0, le=MOST_LOGPROBS), BeforeValidator(_no_boolean)] = None

    @property
    def top(self) -> int | None:
        """See `GenerationRequest.top`."""
        return self.logprobs

    @property
    def echoes(self) -> bool:
        """See `GenerationRequest.echoes`."""
        return self.echo


class ChatForm(Body):
    """A body that becomes a chat. Options of chats that it lacks are refused."""

    without_effect: ClassVar[frozenset[str]] = frozenset()
    """Options of chats that are ignored."""


R = TypeVar("R", bound=Body)


def parse(kind: type[R], body: bytes) -> R:
    """Parse a request's body. Raises ApiError with status 400 that names the option and the problem."""
    try:
        fields = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise invalid(f"the request's body is not JSON: {error}", code="invalid_json") from error
    if not isinstance(fields, dict):
        raise invalid(f"the request's body must be a JSON object, not {_kind(fields)}", code="invalid_json")
    _refuse_unsupported(kind, fields)
    try:
        parsed = kind.model_validate(fields)
    except ValidationError as error:
        raise explain(error) from error
    if not _is_finite(fields):  # somewhere in a schema, a call's input or the like
        raise invalid("the request's body is not JSON: number out of range", code="invalid_json")
    return parsed


def _is_finite(value: Any) -> bool:
    """Return whether all numbers of parsed JSON are finite: the parser reads 1e400 as infinity, which is no JSON."""
    if isinstance(value, float):
        return isfinite(value)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return all(_is_finite(one) for one in inner if not isinstance(one, str | int))


def _refuse_unsupported(kind: type[Body], fields: Mapping[str, Any]) -> None:
    """Raise ApiError for the first unsupported option of the body, or of one of its messages."""
    if (refusal := unsupported(fields, kind.unsupported)) is not None:
        name, advice = refusal
        raise invalid(f"{name} is not supported here; {advice}", name, "unsupported_parameter")
    if issubclass(kind, ChatForm):
        _refuse_options_of_chats(kind, fields)
    structured = fields.get("structured_outputs")
    if isinstance(structured, dict) and (refusal := unsupported(structured, STRUCTURED_OPTIONS)) is not None:
        name, advice = f"structured_outputs.{refusal[0]}", refusal[1]
        raise invalid(f"{name} is not supported here; {advice}", name, "unsupported_parameter")
    messages = fields.get("messages") if issubclass(kind, ChatRequest) else None
    for number, message in enumerate(messages if isinstance(messages, list) else []):
        if isinstance(message, dict) and (refusal := unsupported(message, MESSAGE_OPTIONS)) is not None:
            name, advice = f"messages[{number}].{refusal[0]}", refusal[1]
            raise invalid(f"{name} is not supported here; {advice}", name, "unsupported_parameter")


def _refuse_options_of_chats(kind: type[ChatForm], fields: Mapping[str, Any]) -> None:
    """Raise ApiError for the first option that only chats have, unless its value is the default."""
    checked = kind.model_fields.keys() | kind.unsupported.keys() | kind.without_effect
    for name in fields:
        if name in ChatRequest.model_fields and name not in checked and not _is_default(name, fields[name]):
            text = f"{name} is not supported here; leave it out, or send the request to /v1/chat/completions"
            raise invalid(text, name, "unsupported_parameter")


def _is_default(name: str, value: Any) -> bool:
    """Return whether a value of a chat's option is its default, or null."""
    default = ChatRequest.model_fields[name].get_default(call_default_factory=True, validated_data={})
    if not isinstance(default, BaseModel):
        return value is None or same(value, default)
    try:
        return value is None or type(default).model_validate(value) == default
    except ValidationError:
        return False


def chat_of(fields: Mapping[str, Any]) -> ChatRequest:
    """Return the chat with these options, made of another body's. Raises ApiError as `parse` does."""
    try:
        return ChatRequest.model_validate(fields)
    except ValidationError as error:
        raise explain(error) from error


def explain(error: ValidationError) -> ApiError:
    """Return the error of a body that its model refuses, with the option that is wrong."""
    # A union reports an error per branch; the one that got furthest is the one that the client meant.
    # Of several errors in one object, a wrong type is the cause of the others.
    errors = error.errors(include_url=False)
    first = max(errors, key=lambda problem: (len(problem["loc"]), problem["loc"][-1:] == ("type",)))
    path = ""
    for step in first["loc"]:
        if isinstance(step, int):
            path += f"[{step}]"
        elif step in ("str", "int") or step.startswith(("list[", "function-", "constrained-", BLOCK_TAG)):
            continue  # a branch of a union, which is no part of the client's path
        else:
            path += f".{step}" if path else step
    if first["type"] == "extra_forbidden":
        known = ", ".join(WispOptions.model_fields)
        return invalid(f"there is no option {cut(path, SHOWN)}; `wisp` has {known}", path, "unknown_parameter")
    if first["type"] == "block_type":
        path += ".type"
        first["input"] = first["input"].get("type") if isinstance(first["input"], dict) else first["input"]
    if first["type"] == "missing":
        return invalid(f"{path} is missing", path, "missing_required_parameter")
    if not path:  # an error of several options together begins with the name of one
        path, _, text = first["msg"].partition(": ")
        return invalid(f"{path}: {text}", path)
    value = first["input"]
    given = f" (given: {quoted(value)})" if isinstance(value, str | int | float) else f" (given: {_kind(value)})"
    code = "invalid_type" if first["type"].endswith("_type") else "invalid_value"
    return invalid(f"{path}: {first['msg']}{given}", path, code)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
