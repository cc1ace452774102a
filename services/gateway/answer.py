"""One request's answer: the record that grows from the accepted request to the last token."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from time import monotonic

import msgpack

from services.gateway.core.admission import Unreachable
from services.gateway.core.completion import Completion, Piece
from services.gateway.core.cursor import StreamCursor
from services.gateway.core.turns import Wait
from services.gateway.errors import from_failure
from services.gateway.keys import ApiKey
from services.gateway.tools import ToolForm
from shared.arithmetic import distinct
from shared.messages import Finish, Generate, Record
from shared.prediction import PredictedText
from shared.runtime.tracing import NO_SPAN, Span
from shared.slo import SloOutcome
from shared.state.sessions import Session

NEWER = ("include_stop", "min_tokens", "logprobs", "token_ids", "prompt_logprobs", "prompt_only", "thinks", "tools")
"""Fields of `AnswerForm` that the first versions lack."""


class AnswerForm(Record):
    """The form in which an answer is sent.

    A streamed answer's form is its resume record: it is stored with the first session, so that any gateway can resume
    the stream.
    """

    created: int
    model: str
    chat: bool
    include_usage: bool = False
    service_tier: str | None = None
    """The class that serves the request; None where the request named no tier."""
    service_class: str
    trace: bool = False
    keep: bool = False
    """True if the sessions keep running for a while after the client goes away, so that it can resume the stream."""
    pool: str
    seed: int
    stops: list[str]
    include_stop: bool = False
    """True if texts include the stop string or stop token that ended them."""
    min_tokens: int = 0
    """Output tokens in which no stop string ends the text."""
    logprobs: int | None = None
    """Number of most probable tokens to send with each token's log-probability; None for no log-probabilities."""
    token_ids: bool = False
    """True if the names of tokens in log-probabilities are their ids."""
    prompt_logprobs: int | None = None
    """As `logprobs`, for the prompt's tokens, in vLLM's form."""
    echo: bool = False
    """True if the text, and its log-probabilities, begin with the prompt."""
    prompt_only: bool = False
    """True if no output is sent."""
    thinks: bool | None = None
    """True if the texts begin within the model's reasoning, False if not; None if no reasoning is marked in them."""
    metrics: bool = False
    """True if the answer has vLLM's metrics of speculative decoding."""
    copies: int = 1
    """Completions of each prompt."""
    predicted: list[int] | None = None
    """Tokens of the output that the client expects; None if it expects nothing."""
    echoes: list[str]
    """One per completion: the text before the generated text."""
    prompt_tokens: int
    """Each prompt counts once, however many completions it has."""
    holder: str | None = None
    """Id of the API key of the request. Nobody else can resume the stream."""
    tools: ToolForm | None = None
    """The form of tool calls; None if the model was offered no tools."""
    traceparent: str = ""
    """Context of the first request's trace, to which the trace of a resumed stream has a link; empty for none."""

    def pack(self) -> bytes:
        """Encode for Redis.

        A gateway of a version without one of the `NEWER` fields cannot send this form, so it must not read it.
        """
        fields = self.model_dump()
        if any(fields[name] != type(self).model_fields[name].default for name in NEWER):
            fields = {"newer": fields}
        return msgpack.packb(fields)  # type: ignore[no-any-return]

    @classmethod
    def unpack(cls, body: bytes) -> AnswerForm:
        """Decode from Redis. Raises ValueError."""
        fields = msgpack.unpackb(body)
        return cls.model_validate(fields.get("newer", fields) if isinstance(fields, dict) else fields)


@dataclass(frozen=True)
class Usage:
    """Token counts of an answer."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    """Prompt tokens whose KV was cached."""
    accepted_predicted: int | None = None
    """Tokens of the completions that are as predicted; None without a prediction."""
    rejected_predicted: int | None = None
    """Tokens of the prediction that are not in the completions, for each completion."""
    reasoning_tokens: int | None = None
    """Tokens of a chat's completions that are reasoning, where the model marks it; None for text completions."""

    @property
    def total(self) -> int:
        """Prompt and completion tokens."""
        return self.prompt_tokens + self.completion_tokens


@dataclass
class Answer:
    """One answer: filled in when the request is accepted, when its sessions start, and while they run."""

    answer_id: str
    form: AnswerForm
    started_s: float
    """Arrival of the request, on this process's monotonic clock."""
    stream: bool = True
    event_ids: bool = True
    """True if the events of a stream carry its cursor as their id."""
    key: ApiKey | None = None
    """The API key to charge."""
    reserved_tokens: int = 0
    """Tokens to charge before the start."""
    resumed: bool = False
    """True if the sessions were started for an earlier connection, perhaps by another gateway."""
    cursor: StreamCursor = field(init=False)
    """The part of the stream that the client has."""
    sessions: list[Generate] = field(default_factory=list)
    """One per completion. A resumed answer gets them when its sessions are collected."""
    charged_tokens: int = 0
    """Tokens charged to the key by the connections before this one."""
    unreachable: Unreachable | None = None
    """Set when the answer is accepted with an SLO that no verifier can keep."""
    running: list[RunningSession] = field(default_factory=list)
    """One per completion, from the start of its session on."""
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when a running session has something new."""

    def __post_init__(self) -> None:
        self.cursor = StreamCursor(self.answer_id)
        self.predicted = None if self.form.predicted is None else PredictedText(self.form.predicted)
        """The text that the client expects, for all completions."""

    @property
    def id_suffix(self) -> str:
        """The id without the prefix that tells chats and completions apart."""
        return self.answer_id.partition("-")[2]

    @property
    def session_ids(self) -> list[str]:
        """Ids of the sessions, one per completion."""
        return [session_id(self.answer_id, index) for index in range(len(self.form.echoes))]

    @property
    def usage(self) -> Usage:
        """Token counts so far."""
        completions = [session.completion for session in self.running]
        tokens = sum(completion.tally.tokens for completion in completions)
        cached = sum(completion.cached_prompt for completion in completions[:: self.form.copies])
        counters = [completion.reasoning for completion in completions if completion.reasoning is not None]
        thought = sum(counter.tokens for counter in counters) if self.form.chat else None
        if self.form.predicted is None:
            return Usage(self.form.prompt_tokens, tokens, cached, reasoning_tokens=thought)
        accepted = [one.predicted.accepted for one in completions if one.predicted is not None]
        rejected = [max(0, len(self.form.predicted) - count) for count in accepted]
        return Usage(self.form.prompt_tokens, tokens, cached, sum(accepted), sum(rejected), thought)

    @property
    def committed_in(self) -> list[str]:
        """Arithmetics in which the tokens were committed: several if sessions were moved between them."""
        return distinct(arithmetic for session in self.running for arithmetic in session.completion.committed_in)

    @property
    def ttft_ms(self) -> float:
        """Time from the request to its first token; 0 before it."""
        first = [session.first_s - session.started_s for session in self.running if session.first_s is not None]
        return min(first, default=0.0) * 1000

    @property
    def total_ms(self) -> float:
        """Time from the request to now."""
        return (monotonic() - self.running[0].started_s) * 1000

    async def batches(self) -> AsyncIterator[list[tuple[int, Piece | Finish]]]:
        """Yield what is ready, by completion index: pieces, and the finish reason of a completed one.

        Raises ApiError when a session fails.
        """
        open_indices = list(range(len(self.running)))
        while open_indices:
            await self.wake.wait()
            self.wake.clear()
            batch: list[tuple[int, Piece | Finish]] = []
            for index in tuple(open_indices):
                completion = self.running[index].completion
                batch += [(index, piece) for piece in completion.take()]
                if completion.failure is not None:
                    if batch:
                        yield batch
                    raise from_failure(completion.failure)
                if completion.finish is not None:
                    batch.append((index, completion.finish))
                    open_indices.remove(index)
            if batch:
                yield batch


@dataclass
class RunningSession:
    """A session that this gateway serves. Times are seconds on this process's monotonic clock."""

    generate: Generate
    completion: Completion
    answer: Answer
    started_s: float
    """Arrival of the request, also where another gateway received it."""
    wait: Wait
    """Its wait for its next turn."""
    pause_s: float
    """Wait between two reads of the state of a silent session."""
    check_s: float
    """When the session's state is read from Redis, unless a result arrives before."""
    first_s: float | None = None
    """Time of the first token."""
    token_s: float = 0.0
    """Time of the last token."""
    outcome: SloOutcome | None = None
    """Set at the end."""
    end_reason: str = ""
    """As in the gateway's metrics; set at the end."""
    span: Span = NO_SPAN
    """Its span in the request's trace."""
    starting: bool = False
    """True until the session is created and handed to the drafters: until then its state is not missed."""
    start: asyncio.Task[None] | None = None
    """Its creation and handing over, which the session's end cancels: a frozen RabbitMQ can hold it up for long."""
    checking: bool = False
    """True if a read of the state is in progress."""
    check_again: bool = False
    """True if a gap appeared during the read, so that another one is needed."""

    @property
    def session_id(self) -> str:
        """The session's id."""
        return self.generate.session


def session_id(answer_id: str, index: int) -> str:
    """Return the id of the session of an answer's completion."""
    return f"{answer_id}.{index}" if index else answer_id


def generate_again(session: Session, form: AnswerForm) -> Generate:
    """Return the Generate message that a stored session was started with, as far as it is stored."""
    request = session.request
    return Generate(
        session=request.session,
        gateway=request.gateway,
        prompt=session.tokens[: request.prompt_len],
        sampling=request.sampling,
        stop_ids=request.stop_ids,
        max_tokens=request.max_tokens,
        fingerprint=request.fingerprint,
        vocab_fingerprint="",
        slo=request.slo,
        service_class=form.service_class,
    )
