"""Response bodies: OpenAI's response objects, stream chunks and server-sent events."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from services.gateway.answer import Answer, AnswerForm, Usage
from services.gateway.core.completion import CompletionRound, CompletionTally, Piece, Token
from services.gateway.core.reasoning import SplitText
from services.gateway.core.tool_calls import ContentDelta, ToolDelta
from shared.messages import Slo
from shared.slo import SloOutcome

DONE = b"data: [DONE]\n\n"

Fields = dict[str, Any]


@dataclass(frozen=True)
class Choice:
    """One complete completion of an answer."""

    text: SplitText
    finish: str
    calls: Sequence[CalledTool] = ()
    logprobs: Fields | None = None
    prompt_logprobs: list[Fields | None] | None = None
    """vLLM's, for requests that ask for them."""


@dataclass
class CalledTool:
    """One complete tool call."""

    name: str
    arguments: str = ""


@dataclass(frozen=True)
class Chunks:
    """Makes the chunks of one streamed answer, or its whole response object."""

    answer_id: str
    fingerprint: str
    form: AnswerForm

    @classmethod
    def of(cls, answer: Answer) -> Chunks:
        """Return the chunks of an answer whose sessions are known."""
        return cls(answer.answer_id, answer.sessions[0].fingerprint, answer.form)

    def opening(self, index: int) -> Fields | None:
        """Return the first chunk of a chat completion, which names the role; None for text completions."""
        if not self.form.chat:
            return None
        return self._chunk([self._choice(index, {"role": "assistant", "content": ""}, None)])

    def delta(self, index: int, text: SplitText, logprobs: Fields | None = None) -> Fields:
        """Return a chunk with more text, and the log-probabilities of its tokens if they are asked for."""
        if not self.form.chat:
            return self._chunk([self._choice(index, text.content, None, logprobs)])
        delta = {"reasoning_content": text.reasoning} if text.reasoning else {}
        if text.content or not delta:
            delta["content"] = text.content
        return self._chunk([self._choice(index, delta, None, logprobs)])

    def tool_deltas(
        self, index: int, deltas: Sequence[ToolDelta], reasoning: str = "", logprobs: Fields | None = None
    ) -> Fields:
        """Return a chunk of a chat completion with more reasoning, content, tool calls, or all; it may be empty."""
        delta = {"reasoning_content": reasoning} if reasoning else {}
        return self._chunk([self._choice(index, delta | self._tool_fields(index, deltas), None, logprobs)])

    def closing(self, index: int, finish: str, deltas: Sequence[ToolDelta] = ()) -> Fields:
        """Return the last chunk of a completion, with what is left of a chat's content and tool calls."""
        return self._chunk([self._choice(index, self._tool_fields(index, deltas) if self.form.chat else "", finish)])

    def usage(self, usage: Usage) -> Fields:
        """Return the extra chunk at the end of a stream whose request asked for usage."""
        return {**self._chunk([]), "usage": usage_fields(usage)}

    def whole(self, choices: Sequence[Choice], usage: Usage) -> Fields:
        """Return the response to a request that is not streamed."""
        made: list[Fields] = []
        for index, choice in enumerate(choices):
            text = choice.text.content
            content: Fields = {"message": self._message(index, choice)} if self.form.chat else {"text": text}
            made.append({"index": index, **content, "logprobs": choice.logprobs, "finish_reason": choice.finish})
            if choice.prompt_logprobs is not None and not self.form.chat:
                made[-1]["prompt_logprobs"] = choice.prompt_logprobs
        fields = {**self._common("chat.completion"), "choices": made, "usage": usage_fields(usage)}
        if self.form.chat and choices[0].prompt_logprobs is not None:
            fields["prompt_logprobs"] = choices[0].prompt_logprobs
        return fields

    def _message(self, index: int, choice: Choice) -> Fields:
        """Return a chat's message. Its content is null if it only calls tools."""
        message: Fields = {"role": "assistant", "content": choice.text.content, "refusal": None}
        if self.form.thinks is not None:
            message["reasoning_content"] = choice.text.reasoning or None
        if choice.calls:
            message["content"] = choice.text.content or None
            message["tool_calls"] = [
                {
                    "id": self._call_id(index, number),
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for number, call in enumerate(choice.calls)
            ]
        return message

    def _tool_fields(self, index: int, deltas: Sequence[ToolDelta]) -> Fields:
        """Return the delta of a chat's choice. It is one, because a stream is resumed after a chunk only."""
        content = "".join(delta.text for delta in deltas if isinstance(delta, ContentDelta))
        calls: dict[int, Fields] = {}
        for delta in deltas:
            if isinstance(delta, ContentDelta):
                continue
            if delta.name is not None:
                calls[delta.index] = {
                    "index": delta.index,
                    "id": self._call_id(index, delta.index),
                    "type": "function",
                    "function": {"name": delta.name, "arguments": ""},
                }
            call = calls.setdefault(delta.index, {"index": delta.index, "function": {"arguments": ""}})
            call["function"]["arguments"] += delta.arguments
        fields: Fields = {"content": content} if content else {}
        return {**fields, "tool_calls": list(calls.values())} if calls else fields

    def _call_id(self, index: int, number: int) -> str:
        assert self.form.tools is not None
        return self.form.tools.calls.call_id(self.answer_id, index, number)

    def _choice(self, index: int, content: Fields | str, finish: str | None, logprobs: Fields | None = None) -> Fields:
        return {
            "index": index,
            "delta" if self.form.chat else "text": content,
            "logprobs": logprobs,
            "finish_reason": finish,
        }

    def _chunk(self, choices: list[Fields]) -> Fields:
        fields = {**self._common("chat.completion.chunk"), "choices": choices}
        if self.form.include_usage:
            fields["usage"] = None
        return fields

    def _common(self, chat_object: str) -> Fields:
        fields: Fields = {
            "id": self.answer_id,
            "object": chat_object if self.form.chat else "text_completion",
            "created": self.form.created,
            "model": self.form.model,
            "system_fingerprint": f"fp_{self.fingerprint[:16]}",
        }
        if self.form.service_tier is not None:
            fields["service_tier"] = self.form.service_tier
        return fields


def usage_fields(usage: Usage) -> Fields:
    """Return OpenAI's usage object."""
    fields: Fields = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total,
    }
    fields["prompt_tokens_details"] = {"cached_tokens": usage.cached_tokens}
    details: Fields = {}
    if usage.reasoning_tokens is not None:
        details["reasoning_tokens"] = usage.reasoning_tokens
    if usage.accepted_predicted is not None:
        details["accepted_prediction_tokens"] = usage.accepted_predicted
        details["rejected_prediction_tokens"] = usage.rejected_predicted
    return {**fields, "completion_tokens_details": details} if details else fields


def speculation(tally: CompletionTally) -> Fields:
    """Return vLLM's `metrics.speculative_decoding` of a completion.

    `num_spec_steps` counts the rounds with a verified draft. `num_spec_tokens` is the longest draft: lengths vary.
    """
    steps, longest = tally.drafts, tally.longest_draft
    return {
        "mean_acceptance_length": 1 + tally.accepted / steps if steps else None,
        "draft_acceptance_rate": tally.accepted / tally.verified if tally.verified else None,
        "acceptance_histogram": [tally.accepted_in_round[count] for count in range(longest + 1)],
        "num_spec_steps": steps,
        "num_accepted_draft_tokens": tally.accepted,
        "num_draft_tokens": tally.verified,
        "num_spec_tokens": longest,
    }


_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def encode(fields: Mapping[str, Any]) -> bytes:
    """Encode as JSON in UTF-8 on one line, also for clients that split lines at Unicode's rarer line ends."""
    text = _ENCODER.encode(fields)
    for character, escape in (("\x85", "\\u0085"), ("\u2028", "\\u2028"), ("\u2029", "\\u2029")):
        text = text.replace(character, escape)
    return text.encode()


def event(fields: Fields, cursor: object = None) -> bytes:
    """Encode a server-sent event. Its id is the stream cursor after the event."""
    return (b"" if cursor is None else b"id: %s\n" % str(cursor).encode()) + b"data: " + encode(fields) + b"\n\n"


def trace(piece: Piece) -> Fields:
    """Return the trace of one chunk: its tokens, the round of the last token, and the rounds since the last chunk."""
    return {"tokens": tokens(piece.tokens), "round": piece.round, "rounds": rounds(piece.rounds)}


def rounds(settled: Sequence[CompletionRound]) -> list[Fields]:
    """Return rounds as the trace shows them."""
    return [
        {name: round(value, 3) if isinstance(value, float) else value for name, value in asdict(one).items()}
        for one in settled
    ]


def tokens(made: Sequence[Token]) -> list[Fields]:
    """Return tokens as the trace shows them."""
    return [{"id": token.id, "text": token.text, "draft": token.draft} for token in made]


def summary(
    tallies: Sequence[CompletionTally],
    outcomes: Sequence[SloOutcome],
    ttft_ms: float,
    total_ms: float,
    *,
    service_class: str,
    slo: Slo | None,
) -> Fields:
    """Return the trace's summary of a request: its SLO, its speed and its costs.

    Messaging time is the total minus drafting, queueing and verifying. Times are summed over completions, which run
    side by side, so messaging time is meaningful for a single completion only. A request attains its SLO if all its
    completions do; its time per output token is that of the slowest.
    """
    tpots_ms = [outcome.tpot_ms for outcome in outcomes if outcome.tpot_ms is not None]
    work = {name: sum(getattr(t, name) for t in tallies) for name in ("draft_ms", "queue_ms", "verify_ms")}
    return {
        **{name: sum(getattr(t, name) for t in tallies) for name in _COUNTS},
        "service_class": service_class,
        "slo": slo and {"ttft_ms": slo.ttft_ms, "tpot_ms": slo.tpot_ms},
        "attained": all(outcome.attained for outcome in outcomes),
        "tpot_ms": None if not tpots_ms else round(max(tpots_ms), 3),
        "ttft_ms": round(ttft_ms, 3),
        "total_ms": round(total_ms, 3),
        **{name: round(value, 3) for name, value in work.items()},
        "messaging_ms": round(max(0.0, total_ms - sum(work.values())), 3),
    }


_COUNTS = ("rounds", "tokens", "drafted", "verified", "accepted", "run_tokens", "copied", "copies_verified")
