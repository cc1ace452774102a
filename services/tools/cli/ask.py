"""Requests to a gateway through the official `openai` client."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import httpx
from pydantic import ValidationError

from services.tools.cli.core.answer_chunk import AnswerChunk, ModelList
from services.tools.cli.core.answer_rounds import AnswerRound, Arrival, rounds_of
from services.tools.cli.core.text_parts import TextPart, counted, text_parts
from services.tools.local.settings import LocalSettings
from shared.errors import SettingsError, WispError

if TYPE_CHECKING:
    from openai import APIConnectionError, APIError, AsyncOpenAI

FIRST_ANSWER_S = 15.0
"""Longest wait for the list of models."""
LONGEST_REASON = 500
URL_ADVICE = "Start a gateway with `wisp up` or `make serve` and give its URL, which ends in /v1, with --url."


def client_at(url: str, key: str | None = None) -> AsyncOpenAI:
    """Return a client for a gateway. key: by default WISP_API_KEY or OPENAI_API_KEY.

    Raises SettingsError for a URL or key that no request can carry.
    """
    from openai import AsyncOpenAI

    if not re.match(r"https?://[^/\s]", url):
        raise SettingsError(f"{url!r} is no URL of a gateway; expected the form http://127.0.0.1:8000/v1")
    key = (key or LocalSettings().api_key.get_secret_value()).strip()
    if not re.fullmatch(r"[!-~]+", key):
        raise SettingsError(
            "the API key (--key, WISP_API_KEY or OPENAI_API_KEY) has characters that no key has; it is one line of "
            "letters, digits and signs, as `wisp keys new` prints it"
        )
    try:
        return AsyncOpenAI(base_url=url, api_key=key, max_retries=0)
    except (ValueError, httpx.InvalidURL) as error:  # also a proxy's URL in the environment
        raise SettingsError(f"no HTTP client can be made for {url}: {error}") from None


async def first_model(client: AsyncOpenAI) -> str:
    """Return the name of the server's first model. Raises WispError if the server has no OpenAI API."""
    from openai import APIConnectionError, APIError, AuthenticationError

    url = address_of(client)
    try:
        with answers_checked(url):
            # The raw response: the client's own reading of it fails in many ways.
            response = await client.get(
                "/models", cast_to=httpx.Response, options={"timeout": FIRST_ANSWER_S, "max_retries": 0}
            )
            return ModelList.model_validate_json(response.content).data[0].id
    except AuthenticationError as error:
        raise WispError(
            f"the gateway at {url} refuses the API key (--key, WISP_API_KEY or OPENAI_API_KEY): {reason_of(error)}"
        ) from None
    except APIConnectionError as error:
        raise unreachable(url, error) from None
    except APIError as error:
        raise WispError(f"{url} answers, but not as a gateway does: {reason_of(error)}. {URL_ADVICE}") from None


@contextmanager
def answers_checked(url: str) -> Iterator[None]:
    """Turn malformed answers, and connections that end within an answer, into WispError."""
    try:
        yield
    except httpx.HTTPError as error:
        raise WispError(f"the connection to {url} ended within an answer: {error or type(error).__name__}") from None
    except ValueError as error:  # JSON, UTF-8 or fields that are wrong
        raise WispError(f"{url} answers, but not as an OpenAI API does: {_problem(error)}. {URL_ADVICE}") from None


def _problem(error: ValueError) -> str:
    """Describe an error of reading an answer in one line."""
    if not isinstance(error, ValidationError):
        return str(error).partition("\n")[0]
    first = error.errors(include_url=False, include_context=False)[0]
    place = ".".join(str(step) for step in first["loc"])
    return f"{place}: {first['msg']}" if place else str(first["msg"])


def address_of(client: AsyncOpenAI) -> str:
    """Return the URL that the client was made for."""
    return str(client.base_url).rstrip("/")


def unreachable(url: str, error: APIConnectionError) -> WispError:
    """Return the error for a URL at which no gateway answers."""
    cause = error.__cause__
    reason = f" ({cause})" if cause is not None and str(cause) else ""
    return WispError(f"no gateway answers at {url}{reason}. {URL_ADVICE}")


def reason_of(error: APIError) -> str:
    """Return the server's reason for an error in one line."""
    text = " ".join(str(error.message).split())
    if re.match(r"<(!doctype|html|\?xml)", text, re.IGNORECASE):
        text = f"status {getattr(error, 'status_code', '')} with a web page"
    return text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]} …"


@dataclass(frozen=True)
class Question:
    """One request: a chat completion if it has messages, else a completion of `prompt`."""

    title: str
    prompt: str = ""
    messages: tuple[dict[str, str], ...] = ()
    max_tokens: int = 128
    options: dict[str, Any] = field(default_factory=dict)
    """Sampling parameters by their names in the API."""


@dataclass
class ClientAnswer:
    """The answer to a question. The summary's durations are the gateway's, in milliseconds."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish: str = ""
    summary: dict[str, float] = field(default_factory=dict)
    arrivals: list[Arrival] = field(default_factory=list)
    total_ms: float = 0.0
    """From sending the request to the end of the answer, measured by the client."""

    @property
    def rounds(self) -> list[AnswerRound]:
        """The rounds that produced the text."""
        return rounds_of(self.arrivals)

    def difference(self, other: ClientAnswer) -> str:
        """Name the first difference in tokens, text or finish reason; empty if all are the same."""
        if self.tokens != other.tokens:
            pairs = enumerate(zip_longest(self.tokens, other.tokens), start=1)
            number, (one, another) = next((number, pair) for number, pair in pairs if pair[0] != pair[1])
            return f"output token {number} is {one} and {another}, of {len(self.tokens)} and {len(other.tokens)} tokens"
        if self.text != other.text:
            return f"the tokens are the same, the text is {self.text!r} and {other.text!r}"
        if self.finish != other.finish:
            return f"the tokens are the same, the finish reason is {self.finish!r} and {other.finish!r}"
        return ""


async def ask(
    client: AsyncOpenAI,
    model: str,
    question: Question,
    draft: str,
    show: Callable[[list[TextPart]], None] | None = None,
) -> ClientAnswer:
    """Stream the answer to a question.

    draft: the draft source. show: called with the parts of each chunk as they arrive. Raises the client's APIError, and
    WispError for an answer that no OpenAI API gives.
    """
    with answers_checked(address_of(client)):
        return await _ask(client, model, question, draft, show)


async def _ask(
    client: AsyncOpenAI,
    model: str,
    question: Question,
    draft: str,
    show: Callable[[list[TextPart]], None] | None,
) -> ClientAnswer:
    extra = {"wisp": {"trace": True, "draft": draft}}
    common: dict[str, Any] = {"model": model, "extra_body": extra, **question.options}
    stream: AsyncIterator[Any]
    started = time.perf_counter()
    if question.messages:
        messages: Any = list(question.messages)
        stream = await client.chat.completions.create(
            messages=messages, max_completion_tokens=question.max_tokens, stream=True, **common
        )
    else:
        stream = await client.completions.create(
            prompt=question.prompt, max_tokens=question.max_tokens, stream=True, **common
        )
    answer = ClientAnswer()
    async for received in stream:
        chunk = AnswerChunk.model_validate(received, from_attributes=True)
        trace = chunk.wisp.fields() if chunk.wisp is not None else {}
        answer.summary.update(trace.get("summary") or {})
        answer.arrivals.append(Arrival((time.perf_counter() - started) * 1000, trace))
        for choice in chunk.choices:
            answer.text += choice.piece
            answer.tokens += [token["id"] for token in trace.get("tokens") or []]
            answer.finish = choice.finish_reason or answer.finish
            if show is not None:
                show(text_parts(choice.piece, trace))
    if not answer.arrivals:
        raise ValueError("it streams no completion")
    answer.total_ms = (time.perf_counter() - started) * 1000
    return answer


def tokens_per_second(summary: dict[str, float]) -> float:
    """Return the output tokens per second after the first token; 0 for a single token."""
    seconds = (summary["total_ms"] - summary["ttft_ms"]) / 1000
    return (summary["tokens"] - 1) / seconds if seconds > 0 else 0.0


def tokens_per_round(summary: dict[str, float]) -> float:
    """Return the mean tokens of a round; 0 without rounds."""
    return (summary["tokens"] - summary.get("run_tokens", 0)) / max(1, summary["rounds"])


def made_in(summary: dict[str, float]) -> str:
    """Describe how the tokens of an answer were made: in rounds, or by the verifier alone."""
    runs, copied = (round(summary.get(name, 0)) for name in ("run_tokens", "copied"))
    copies = f" ({copied} of them copied)" if copied else ""
    alone = f" and {runs} by the verifier alone{copies}" if runs else ""
    return f"{counted(round(summary['tokens']) - runs, 'token')} in {counted(round(summary['rounds']), 'round')}{alone}"


def summary_lines(summary: dict[str, float]) -> list[str]:
    """Format the summary of an answer for people."""
    verified, accepted, copied = (round(summary.get(name, 0)) for name in ("verified", "accepted", "copied"))
    drafts = (
        f"{accepted:,} of {counted(verified, 'draft token')} accepted ({accepted / verified:.0%})"
        if verified
        else "no drafts"
    )
    marked = f"marked above: {counted(accepted, 'accepted draft token')} and {copied:,} copied by the verifier"
    return [
        f"{made_in(summary)}, {tokens_per_round(summary):.2f} tokens per round, {drafts}",
        *([marked] if copied else []),
        f"first token after {summary['ttft_ms']:,.0f} ms, then {tokens_per_second(summary):.1f} tokens per second",
        f"milliseconds: {summary['draft_ms']:,.0f} drafting, {summary['queue_ms']:,.0f} queueing, "
        f"{summary['verify_ms']:,.0f} verifying, {summary['messaging_ms']:,.0f} messaging",
    ]
