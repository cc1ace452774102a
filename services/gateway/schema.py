"""Requests: OpenAI's bodies with our own options and headers, checked."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainValidator,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from services.drafter.sources.registry import CHOICES
from services.gateway.body import Body, Most, Whole, or_default, refuse
from services.gateway.core.options import (
    CHAT_OPTIONS,
    COMPLETION_OPTIONS,
    MESSAGE_OPTIONS,
    STRUCTURED_OPTIONS,
    UnsupportedOption,
)
from services.gateway.errors import invalid
from services.gateway.grammar_options import GrammarOption, GrammarOptions
from services.gateway.object_options import ContentPart, PredictionOption, StreamOptions, WispOptions
from services.gateway.option_values import (
    Biases,
    Prompts,
    Stops,
    TokenIds,
    Words,
    false_as_none,
    no_generation_prompt,
    not_streamed,
    same_as_n,
    with_logprobs,
)
from services.gateway.tool_options import Tool, ToolCall, ToolChoice, parse_tool_choice
from shared.errors import quoted
from shared.messages import (
    GRAMMAR,
    LOGPROBS,
    LONGEST_MS,
    MOST_LOGPROBS,
    REASONING_BUDGET,
    RULES,
    SHORTEST_MS,
    Logprobs,
    Sampling,
)
from shared.models.generation import SamplingDefaults
from shared.runtime.settings import NAME_PATTERN

MAX_TOOLS = 128
GREEDY_BELOW = 1e-5
"""Lower temperatures are greedy: logits divided by them overflow."""
NO_DEFAULTS = SamplingDefaults()
DRAFT_HEADER = "x-wisp-draft"
POOL_HEADER = "x-wisp-pool"
TTFT_HEADERS = ("x-llm-d-slo-ttft-ms", "x-slo-ttft-ms")
TPOT_HEADERS = ("x-llm-d-slo-tpot-ms", "x-slo-tpot-ms")
"""The first one that a request has counts."""
SMALLEST_TOP_P = 1e-6
"""Replaces 0, which OpenAI allows. Both keep only the most probable token."""


Number = TypeVar("Number", int, float)


def _first(asked: Number | None, default: Number | None, otherwise: Number) -> Number:
    return asked if asked is not None else default if default is not None else otherwise


class HeaderOptions:
    """Our options in a request's HTTP headers. Reading a wrong one raises ApiError; one that is not read is ignored."""

    def __init__(self, headers: Mapping[str, str]) -> None:
        self._headers = headers

    @property
    def draft(self) -> str | None:
        """The draft source."""
        name = self._headers.get(DRAFT_HEADER)
        if name is not None and name not in CHOICES:
            known = ", ".join(CHOICES)
            raise invalid(f"header {DRAFT_HEADER} must be one of {known}, not {quoted(name)}", DRAFT_HEADER)
        return name

    @property
    def pool(self) -> str | None:
        """The pool of drafters."""
        pool = self._headers.get(POOL_HEADER)
        if pool is not None and not re.fullmatch(NAME_PATTERN, pool):
            allowed = "1 to 64 letters, digits, underscores or dashes"
            raise invalid(f"header {POOL_HEADER} must be {allowed}, not {quoted(pool)}", POOL_HEADER)
        return pool

    @property
    def ttft_ms(self) -> float | None:
        """Time to the first token, in milliseconds, of the SLO that the request asks for."""
        return self._milliseconds(TTFT_HEADERS)

    @property
    def tpot_ms(self) -> float | None:
        """Time per further token, in milliseconds, of the SLO that the request asks for."""
        return self._milliseconds(TPOT_HEADERS)

    def _milliseconds(self, names: tuple[str, ...]) -> float | None:
        for name in names:
            if (text := self._headers.get(name)) is None:
                continue
            try:
                value = math.nan if "_" in text else float(text)
            except ValueError:
                value = math.nan
            if not SHORTEST_MS <= value <= LONGEST_MS:
                limits = f"{SHORTEST_MS:g} to {LONGEST_MS:.0f}"
                raise invalid(f"header {name} must be a number of milliseconds, {limits}, not {quoted(text)}", name)
            return value
        return None


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


class GenerationRequest(GrammarOptions):
    """Options of both endpoints."""

    model: str
    stream: Annotated[bool, or_default(False)] = False
    stream_options: Annotated[StreamOptions, or_default(StreamOptions())] = StreamOptions()
    n: Annotated[int, Field(ge=1, le=128), Whole, or_default(1)] = 1
    temperature: Annotated[float | None, Field(ge=0, le=2, allow_inf_nan=False)] = None
    top_p: Annotated[float | None, Field(ge=0, le=1, allow_inf_nan=False)] = None
    top_k: Annotated[int | None, Field(ge=-1, lt=2**31), Whole] = None
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63), Whole] = None
    stop: Stops = Field(default=[])
    max_tokens: Annotated[int | None, Field(ge=1), Most] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1), Most] = None
    """Text completions take it too, although OpenAI has it for chats only: clients send it to both."""
    ignore_eos: Annotated[bool, or_default(False)] = False
    """Generate up to the token limit, past the end-of-text token. vLLM's name, as those of the options below."""
    stop_token_ids: Annotated[list[int], TokenIds, or_default([])] = Field(default=[])
    include_stop_str_in_output: Annotated[bool, or_default(False)] = False
    min_tokens: Annotated[int, Field(ge=0, lt=2**31), Whole, or_default(0)] = 0
    presence_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False), or_default(0.0)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False), or_default(0.0)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False), or_default(1.0)] = 1.0
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False), or_default(0.0)] = 0.0
    logit_bias: Biases = Field(default={})
    bad_words: Words = Field(default=[])
    allowed_token_ids: Annotated[list[int] | None, TokenIds] = None
    prompt_logprobs: Annotated[int | None, Field(ge=0, le=MOST_LOGPROBS), AfterValidator(not_streamed), Whole] = None
    return_tokens_as_token_ids: Annotated[bool, or_default(False)] = False
    best_of: Annotated[int | None, Field(ge=1), AfterValidator(same_as_n), Whole] = None
    prediction: PredictionOption | None = None
    service_tier: str | None = None
    wisp: Annotated[WispOptions, or_default(WispOptions())] = WispOptions()

    @classmethod
    def refuse_unsupported(cls, fields: Mapping[str, Any]) -> None:
        """See `Body.refuse_unsupported`."""
        super().refuse_unsupported(fields)
        if isinstance(outputs := fields.get("structured_outputs"), dict):
            refuse(outputs, STRUCTURED_OPTIONS, "structured_outputs.")

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
            or self.reasoning_budget is not None
        )

    @property
    def reasoning_budget(self) -> int | None:
        """Most tokens of reasoning; None for no limit."""
        return None

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
        asked = {
            RULES: self.has_rules,
            REASONING_BUDGET: self.reasoning_budget is not None,
            GRAMMAR: self.has_grammar,
            LOGPROBS: self.logprobs_of(1) is not None,
        }
        return frozenset(feature for feature, is_needed in asked.items() if is_needed)

    @property
    def has_grammar(self) -> bool:
        """True if the answers follow a grammar."""
        return self.grammar is not None

    @property
    def grammar(self) -> GrammarOption | None:
        """The option that sets the grammar of the answers; None if they are free."""
        return next(iter(self.grammars()), None) if self._names_grammar else None

    @property
    def _names_grammar(self) -> bool:
        return not self.model_fields_set.isdisjoint(GrammarOptions.model_fields)

    @model_validator(mode="after")
    def _has_one_grammar(self) -> Self:
        if self._names_grammar:
            self.check_grammars()
        return self

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
    continue_final_message: Annotated[bool, AfterValidator(no_generation_prompt), or_default(False)] = False
    chat_template_kwargs: Annotated[dict[str, Any], or_default({})] = Field(default={})
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    thinking_token_budget: Annotated[int | None, Field(ge=0, lt=2**31), Whole] = None
    logprobs: Annotated[bool, or_default(False)] = False
    top_logprobs: Annotated[int | None, Field(ge=0, le=MOST_LOGPROBS), AfterValidator(with_logprobs), Whole] = None

    @classmethod
    def refuse_unsupported(cls, fields: Mapping[str, Any]) -> None:
        """See `Body.refuse_unsupported`."""
        super().refuse_unsupported(fields)
        messages = fields.get("messages")
        for number, message in enumerate(messages if isinstance(messages, list) else []):
            if isinstance(message, dict):
                refuse(message, MESSAGE_OPTIONS, f"messages[{number}].")

    @property
    def has_grammar(self) -> bool:
        """True if the answers follow a grammar: that of an option, or that of calls that must be made."""
        return self.tool_choice.mode == "required" or self.grammar is not None

    @property
    def reasoning_budget(self) -> int | None:
        """See `GenerationRequest.reasoning_budget`. A grammar leaves no room for reasoning."""
        return None if self.has_grammar else self.thinking_token_budget

    @property
    def offered_tools(self) -> list[Tool]:
        """The tools that the model may call."""
        return [] if self.tool_choice.mode == "none" else self.tools

    @property
    def uses_tools(self) -> bool:
        """True if tools are offered, or the conversation has calls or their results."""
        return bool(self.offered_tools) or any(one.tool_calls or one.role == "tool" for one in self.messages)

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

    prompt: Prompts
    max_tokens: Annotated[int | None, Field(ge=0), Most, or_default(16)] = 16
    """OpenAI's default is 16; 0 is for the prompt's tokens alone."""
    echo: Annotated[bool, or_default(False)] = False
    logprobs: Annotated[int | None, Field(ge=0, le=MOST_LOGPROBS), BeforeValidator(false_as_none)] = None

    @property
    def top(self) -> int | None:
        """See `GenerationRequest.top`."""
        return self.logprobs

    @property
    def echoes(self) -> bool:
        """See `GenerationRequest.echoes`."""
        return self.echo
