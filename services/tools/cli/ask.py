"""Requests to a gateway through the official `openai` client."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from services.tools.cli.core.answer_rounds import AnswerRound, Arrival, rounds_of
from services.tools.cli.core.text_parts import TextPart, text_parts
from services.tools.local.settings import LocalSettings

if TYPE_CHECKING:
    from openai import AsyncOpenAI


def client_at(url: str, key: str | None = None) -> AsyncOpenAI:
    """Return a client for a gateway. key: by default WISP_API_KEY or OPENAI_API_KEY."""
    from openai import AsyncOpenAI

    return AsyncOpenAI(base_url=url, api_key=key or LocalSettings().api_key.get_secret_value(), max_retries=0)


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

    draft: the draft source. show: called with the parts of each chunk as they arrive.
    """
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
    async for chunk in stream:
        trace = (chunk.model_extra or {}).get("wisp") or {}
        answer.summary.update(trace.get("summary") or {})
        answer.arrivals.append(Arrival((time.perf_counter() - started) * 1000, trace))
        for choice in chunk.choices:
            delta = (choice.delta.content if question.messages else choice.text) or ""
            answer.text += delta
            answer.tokens += [token["id"] for token in trace.get("tokens") or []]
            answer.finish = choice.finish_reason or answer.finish
            if show is not None:
                show(text_parts(delta, trace))
    answer.total_ms = (time.perf_counter() - started) * 1000
    return answer


def tokens_per_second(summary: dict[str, float]) -> float:
    """Output tokens per second after the first token; 0 for a single token."""
    seconds = (summary["total_ms"] - summary["ttft_ms"]) / 1000
    return (summary["tokens"] - 1) / seconds if seconds > 0 else 0.0


def summary_lines(summary: dict[str, float]) -> list[str]:
    """Format the summary of an answer for people."""
    rounds, verified = summary["rounds"], summary["verified"]
    drafts = (
        f"{summary['accepted'] / verified:.0%} of {verified:,.0f} draft tokens accepted" if verified else "no drafts"
    )
    return [
        f"{summary['tokens']:.0f} tokens in {rounds:.0f} rounds, "
        f"{summary['tokens'] / max(1, rounds):.2f} tokens per round, {drafts}",
        f"first token after {summary['ttft_ms']:,.0f} ms, then {tokens_per_second(summary):.1f} tokens per second",
        f"milliseconds: {summary['draft_ms']:,.0f} drafting, {summary['queue_ms']:,.0f} queueing, "
        f"{summary['verify_ms']:,.0f} verifying, {summary['messaging_ms']:,.0f} messaging",
    ]
