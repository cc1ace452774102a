"""Parts of messages: the types of their fields, and the records that several of them share."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

DEFAULT_CLASS = "default"
"""Service class of requests without one."""

MOST = 2**53
"""Largest count. Together with the limits of times it keeps every number computed from a message finite."""
SHORTEST_MS, LONGEST_MS = 1e-9, 1e9
"""Limits of SLO times: up to eleven days."""
FARTHEST_MS = 1e20
"""Largest distance of a deadline from now: beyond that of the last of 2**31 tokens."""

RULES = "rules"
"""Feature of a verifier that applies `Sampling.rules`."""
LOGPROBS = "logprobs"
"""Feature of a verifier that returns what `Sampling.logprobs` asks for."""
MOST_LOGPROBS = 20
REASONING_BUDGET = "reasoning_budget_2"
"""Feature of a verifier that keeps `LogitRules.reasoning`. In its first form, tags could have several tokens."""
GRAMMAR = "grammar"
"""Feature of a verifier that follows `Sampling.grammar`."""
LONGEST_GRAMMAR = 1 << 18
"""Longest text of a grammar, in characters."""

Count = Annotated[int, Field(ge=0, le=MOST)]
Length = Annotated[int, Field(ge=1, le=MOST)]
Milliseconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Promised = Annotated[float, Field(ge=SHORTEST_MS, le=LONGEST_MS)]
Slack = Annotated[float, Field(ge=-FARTHEST_MS, le=FARTHEST_MS)]
SignedMilliseconds = Annotated[float, Field(allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_.:-]+$")]
SessionKey = Annotated[str, Field(max_length=64, pattern=r"^[0-9a-f]*$")]
"""HMAC proving that the sender was given this session (`shared.broker.session_keys`); empty where none is required."""
Arithmetic = Annotated[str, Field(max_length=256, pattern=r"^[^\x00-\x1f\x7f]*$")]
"""Name of the arithmetic behind a verifier's logits (`shared.arithmetic`); empty if unknown."""
Ratio = Annotated[float, Field(gt=0, le=MOST)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class Record(BaseModel):
    """A part of a message: strictly typed and immutable; unknown fields are ignored."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


class Message(Record):
    """A record that is sent by itself."""

    type_name: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.type_name = cls.__name__


class TokenBias(Record):
    """A number that is added to the logits of one token."""

    token: TokenId
    bias: Annotated[float, Field(ge=-100, le=100)]


class ReasoningBudget(Record):
    """A limit of the reasoning in an output: after so many tokens of it, the closing tag follows."""

    most: Count
    """Tokens between the tags."""
    opening: TokenId | None
    """The tag that begins the reasoning; None if the prompt ends within it."""
    blank: list[TokenId] = Field(default_factory=list)
    """Tokens of white space: the only ones that may stand before the opening tag."""
    closing: TokenId


class LogitRules(Record):
    """Changes of the target's logits before a token is chosen, by position; see `shared.sampling.rules`.

    The first `prompt_len` tokens of the session are its prompt, all others its output.
    """

    prompt_len: Count
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = 1.0
    logit_bias: list[TokenBias] = Field(default_factory=list)
    min_p: Probability = 0.0
    min_tokens: Count = 0
    withheld_ids: list[TokenId] = Field(default_factory=list)
    """Tokens that are not allowed among the first `min_tokens` output tokens."""
    bad_words: list[Annotated[list[TokenId], Field(min_length=1)]] = Field(default_factory=list)
    """Sequences of tokens that the output must not contain."""
    allowed_token_ids: list[TokenId] | None = None
    """The only allowed tokens; None allows all."""
    reasoning: ReasoningBudget | None = None
    """None for no limit. Needs the feature `REASONING_BUDGET` of the verifier."""


class Logprobs(Record):
    """A request for log-probabilities: the target's own, before temperature, rules and all other sampling options."""

    top: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] = 0
    """Number of most probable tokens that are returned for each position, beside the position's own token."""
    prompt_len: Count | None = None
    """Length of the prompt, if log-probabilities of its tokens are asked for too; None if not."""


class Grammar(Record):
    """A grammar that the answer of a session follows; see `shared.grammar`."""

    text: Annotated[str, Field(min_length=1, max_length=LONGEST_GRAMMAR)]
    """In llguidance's syntax."""
    prompt_len: Count
    """Tokens of the session before its answer."""


class Sampling(Record):
    """Sampling parameters of the target. Temperature 0 is greedy; `top_k` 0 and `top_p` 1 restrict nothing."""

    temperature: Annotated[float, Field(ge=0, le=100)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Count = 0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] = 0
    rules: LogitRules | None = None
    """Changes of the logits before the choice; None for none. Needs the feature `RULES` of the verifier."""
    logprobs: Logprobs | None = None
    """Log-probabilities to return; None for none. Needs the feature `LOGPROBS` of the verifier."""
    grammar: Grammar | None = None
    """The grammar of the answer; None for none. Needs the feature `GRAMMAR` of the verifier."""


class Slo(Record):
    """A promised speed: time to first token, and mean time per output token after it, in milliseconds."""

    ttft_ms: Promised
    tpot_ms: Promised


class HiddenFormat(StrEnum):
    """Format of hidden states in messages; see `shared.models.hidden_states`."""

    BFLOAT16 = "bfloat16"
    INT8 = "int8"
    """With one float32 scale per row."""

    @property
    def width(self) -> int:
        """Bytes per element."""
        return 2 if self is HiddenFormat.BFLOAT16 else 1


class Finish(StrEnum):
    """The reason why a completion ended, decided with the commit."""

    STOP = "stop"
    LENGTH = "length"


class Status(StrEnum):
    """Outcome of one job."""

    COMMITTED = "committed"
    """The round's tokens are committed, now or by an earlier copy of the round."""
    CONFLICT = "conflict"
    """The round did not build on the committed length; `tokens` are the committed ones from `base_len` on."""
    PREFILLED = "prefilled"
    """A chunk of the prompt is in the verifier's KV cache; nothing was sampled."""
    FAILED = "failed"
    """The round cannot be verified, now or later; `error` gives the reason."""


def needing(fingerprint: str, features: Iterable[str]) -> str:
    """Return the fingerprint of a session of this model that needs these features of its verifier.

    A verifier or a scheduler of a version without features takes it for another model, and refuses the session.
    """
    return "+".join([fingerprint, *sorted(features)])


def model_of(fingerprint: str) -> str:
    """Return the fingerprint of the model, given that of a session."""
    return fingerprint.partition("+")[0]


def features_of(fingerprint: str) -> frozenset[str]:
    """Return the features that a session with this fingerprint needs of its verifier."""
    return frozenset(fingerprint.split("+")[1:])
